# SPDX-License-Identifier: Apache-2.0
"""What one step costs on a GPU, counted without one: operations, launches, bytes of device memory, and events.

    OMP_NUM_THREADS=1 python benchmarks/ledger.py [--json FILE] [--operations]

Runs the library itself, as rank 0 of N, on a fake CUDA device (``fake_cuda.py``) and torch's fake process group: the
7B decoder's shapes, "backward", ``max_grad_norm``, one backward a step. Counts the third step, from the first gradient
to the return of ``step``. Nothing is computed or allocated, so it takes seconds, and the counts are exact: equal in
every run, on every machine.

Note: the model of launches
    An operator that writes device memory is one launch: a kernel, a memset or a copy; one that makes a view or empty
    memory is none. ``torch._foreach_*`` is what ATen's MultiTensorApply makes of it: at most 320 blocks of 65,536
    elements and, for 1, 2, 3 lists of tensors, 110, 64, 48 tensors a launch; or one launch for each tensor off its
    fast path. ``torch.cat`` is one launch for each 128 inputs on its fast path, else one for each input. A Triton
    kernel and a transfer of NCCL are one each.

Note: the model of bytes
    Each operator reads each of its tensors once and writes each of its results once, temporaries included, as if
    nothing stayed in the L2 cache. A Triton kernel reads and writes what ``KERNELS`` says. NCCL's own reads and writes
    are left out: they depend on its algorithm.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fake_cuda import Observer, fake_cuda, on_device
from fake_world import rank_0_of
from scale_model import DECODERS, Decoder
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from shardadam import Precision, ShardedAdamW
from shardadam.layout import ALIGNMENT_NUMEL

_BLOCKS, _CHUNK_NUMEL = 320, 65536  # of one launch of multi_tensor_apply; elements of a block
_TENSORS = (110, 64, 48, 36, 30)  # of one launch, by the number of lists
_CAT_INPUTS, _CAT_DIMS = 128, 4
_aten = torch.ops.aten
_WRITES_ONLY = {_aten.copy_, _aten.fill_, _aten.zero_, _aten._foreach_copy_, _aten._foreach_zero_}
"""In-place operators that do not read what they write."""
_COPIES = {_aten.copy_, _aten._to_copy}
_NO_KERNEL = {_aten._unsafe_view, _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.set_}
_NO_KERNEL |= {_aten.new_empty_strided, _aten.resize_}


Arguments = dict[str, Any]


def _bytes(arguments: Arguments, *names: str) -> int:
    """Return the bytes of the tensors among these arguments."""
    return sum(value.nbytes for name in names if isinstance(value := arguments[name], Tensor))


def _scattered_bytes(arguments: Arguments) -> int:
    """Return the bytes of the gradients at ``addresses`` in the blocks of a shard, and of the tables that find them."""
    numel = arguments["block_count"] * ALIGNMENT_NUMEL
    tables = _bytes(arguments, "addresses", "numels", "blocks", "positions")
    return numel * arguments["ELEMENT"].primitive_bitwidth // 8 + tables


def _prologue(arguments: Arguments) -> tuple[int, int]:
    counters = _bytes(arguments, "steps", "bounds", "n_averaged")
    reads = counters + _bytes(arguments, "param_ids", "first_blocks", "used", "found_inf", "coefficient", "lr")
    return reads, counters + _bytes(arguments, "table")


def _update(arguments: Arguments) -> tuple[int, int]:
    # With positions, ``parameter`` is the arena's whole, of which the kernel uses the shard's blocks.
    state = arguments["block_count"] * ALIGNMENT_NUMEL * arguments["parameter"].element_size()
    state += _bytes(arguments, "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "kept", "average")
    if arguments["addresses"] is not None:
        gradients = _scattered_bytes(arguments)
    else:
        gradients = _bytes(arguments, "gradient", "blocks", "positions")
    return state + gradients + _bytes(arguments, "table"), state


def _sum_sources(arguments: Arguments) -> tuple[int, int]:
    shard = _bytes(arguments, "shard")
    sources = arguments["COUNT"] * arguments["numel"] * arguments["source"].element_size()
    return sources + (shard if arguments["ACCUMULATE"] else 0), shard + _bytes(arguments, "squares")


def _measure_flat(arguments: Arguments) -> tuple[int, int]:
    return _bytes(arguments, "flat"), _bytes(arguments, "squares")


def _measure_blocks(arguments: Arguments) -> tuple[int, int]:
    return _scattered_bytes(arguments) + _bytes(arguments, "first_blocks"), _bytes(arguments, "squares")


KERNELS: dict[str, Callable[[Arguments], tuple[int, int]]] = {
    "prologue": _prologue,
    "update": _update,
    "sum_sources": _sum_sources,
    "measure_flat": _measure_flat,
    "measure_blocks": _measure_blocks,
}
"""By the name of a Triton kernel: the bytes that it reads, and those that it writes, from its arguments."""


@dataclass
class Row:
    """The operations of one name."""

    calls: int = 0
    launches: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


@dataclass
class Ledger(Observer):
    """Counts what is enqueued while ``is_counting``.

    Attributes:
        rows: by the operator's or the kernel's name.
        events: by kind: "record", "wait_event" and "wait_stream" (which torch makes of a record and a wait).
        waits: why the host waits for the device.
    """

    rows: dict[str, Row] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    is_counting: bool = False

    @property
    def launches(self) -> int:
        return sum(row.launches for row in self.rows.values())

    @property
    def bytes(self) -> int:
        return sum(row.read_bytes + row.written_bytes for row in self.rows.values())

    def on_op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if not self.is_counting:
            return
        name = str(func).removeprefix("aten.").removesuffix(".default")
        if func.namespace == "c10d":
            self._add(name, 1, 0, 0)
            return
        reads, writes = accesses(func, args, kwargs, out)
        if writes or func.overloadpacket in _COPIES:  # to the host
            read_bytes, written_bytes = (sum(map(distinct_bytes, tensors)) for tensors in (reads, writes))
            self._add(name, launches_of(func, args, writes), read_bytes, written_bytes)

    def on_kernel(self, name: str, arguments: dict[str, Any]) -> None:
        if not self.is_counting:
            return
        self._add(f"Triton {name}", 1, *KERNELS[name](arguments))

    def on_event(self, kind: str) -> None:
        if self.is_counting:
            self.events[kind] += 1

    def on_wait(self, what: str) -> None:
        if self.is_counting:
            self.waits[what] += 1

    def _add(self, name: str, launches: int, read_bytes: int, written_bytes: int) -> None:
        row = self.rows.setdefault(name, Row())
        row.calls += 1
        row.launches += launches
        row.read_bytes += read_bytes
        row.written_bytes += written_bytes


def accesses(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors on the device that an operator reads, and those that it writes."""
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    schema, packet = func._schema, func.overloadpacket
    if packet in _NO_KERNEL:
        return reads, writes
    reads_nothing = func._schema.name.endswith("_like") or func._schema.name.startswith("aten::new_")  # but shapes
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    for argument in schema.arguments:
        tensors = [leaf for leaf in tree_leaves(given.get(argument.name)) if on_device(leaf)]
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written:
            writes += tensors
        is_read = not is_written or not (argument.kwarg_only or packet in _WRITES_ONLY)
        if is_read and not reads_nothing:
            reads += tensors
    results = out if len(schema.returns) > 1 else (out,)
    for result, returned in zip(results, schema.returns, strict=False):  # some have none, and return None
        if returned.alias_info is None:
            writes += [leaf for leaf in tree_leaves(result) if on_device(leaf)]
    return reads, writes


def launches_of(func: Any, args: tuple[Any, ...], writes: Sequence[Tensor]) -> int:
    """Return the number of launches of an operator that writes ``writes``; see "the model of launches"."""
    name = func._schema.name.removeprefix("aten::")
    if name.startswith(("_foreach_", "_fused_adam")):
        lists = [[leaf for leaf in value if leaf.numel() > 0] for value in args if _is_tensors(value)]
        if not _is_fast(lists):
            return len(lists[0])
        return multi_tensor_launches([tensor.numel() for tensor in lists[0]], len(lists))
    if name == "cat":
        tensors = [tensor for tensor in args[0] if tensor.numel() > 0]
        same_dtype = {tensor.dtype for tensor in (*tensors, *writes)}
        fast = len(same_dtype) == 1 and all(t.is_contiguous() and t.numel() < 2**31 for t in (*tensors, *writes))
        return -(-len(tensors) // _CAT_INPUTS) if fast and writes[0].dim() <= _CAT_DIMS else len(tensors)
    return 1


def _is_tensors(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(leaf, Tensor) for leaf in value)


def _is_fast(lists: Sequence[Sequence[Tensor]]) -> bool:
    """Return whether ATen's fast path takes lists of tensors: one dtype a list, and equal sizes and strides."""
    same_dtype = all(len({tensor.dtype for tensor in tensors}) <= 1 for tensors in lists)
    return same_dtype and all(
        len({(tensor.shape, tensor.stride()) for tensor in tensors}) == 1 for tensors in zip(*lists, strict=True)
    )


def multi_tensor_launches(numels: Sequence[int], depth: int) -> int:
    """Return the launches of multi_tensor_apply over ``depth`` lists of tensors of ``numels`` elements, none empty."""
    launches = tensors = blocks = 0
    for numel in numels:
        tensors += 1
        chunks = -(-numel // _CHUNK_NUMEL)
        for chunk in range(1, chunks + 1):
            blocks += 1
            is_last = chunk == chunks
            if blocks == _BLOCKS or (is_last and tensors == _TENSORS[depth - 1]):
                launches += 1
                blocks, tensors = 0, 0 if is_last else 1
    return launches + (blocks > 0)


def distinct_bytes(tensor: Tensor) -> int:
    """Return the bytes of the elements; those that ``expand`` repeats count once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or size == 0)
    return math.prod(sizes) * tensor.element_size()


@dataclass(frozen=True)
class Form:
    """How parameters and their state are stored."""

    name: str
    dtype: torch.dtype
    precision: Precision = field(default_factory=Precision)


FP32 = Form("fp32", torch.float32)
SPLIT = Form("bf16 split", torch.bfloat16, Precision(master="split"))
INT8 = Form("bf16 int8", torch.bfloat16, Precision(master="split", moments="int8"))
SETTINGS = ((FP32, 1), (FP32, 8), (FP32, 64), (SPLIT, 1), (SPLIT, 8), (SPLIT, 64), (INT8, 8), (INT8, 64))


class _Gradient(torch.autograd.Function):
    """Passes a number on. Its backward gives ``parameter`` a gradient of empty memory, which costs nothing."""

    @staticmethod
    def forward(ctx: Any, number: Tensor, parameter: Tensor) -> Tensor:
        ctx.parameter = parameter
        return number.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.empty_like(ctx.parameter)


def backward(parameters: Iterable[nn.Parameter]) -> None:
    """Run a backward that computes the gradient of the last parameter first."""
    number = torch.zeros((), requires_grad=True, device="cpu")
    for parameter in parameters:
        number = _Gradient.apply(number, parameter)  # type: ignore[no-untyped-call]
    torch.autograd.backward(number, torch.ones((), device="cpu"))


def count_step(shapes: Iterable[tuple[int, ...]], form: Form, ranks: int, **options: Any) -> tuple[Ledger, int]:
    """Return the ledger of the third step, and the number of buckets.

    Args:
        options: of the optimizer; by default it clips.
    """
    ledger = Ledger()
    with rank_0_of(ranks, as_nccl=True), fake_cuda(ledger):
        parameters = [nn.Parameter(torch.empty(shape, dtype=form.dtype, device="cuda")) for shape in shapes]
        options = {"max_grad_norm": 1.0, "transport": "collective", **options}
        optimizer = ShardedAdamW(parameters, precision=form.precision, **options)
        for step in range(3):
            ledger.is_counting = step == 2
            backward(parameters)
            optimizer.step()
            if optimizer.gradient_sync != "backward":
                optimizer.zero_grad()
        ledger.is_counting = False
        buckets = len(optimizer._engine.parameters.buckets)
    return ledger, buckets


def summary(
    decoder: Decoder, settings: Sequence[tuple[Form, int]] = SETTINGS, *, operations: bool = False
) -> dict[str, Any]:
    """Print one line a setting, and return what ``--json`` writes."""
    numel = sum(decoder.numels)
    result: dict[str, Any] = {"bytes_per_parameter": {}}
    print(f"{'format':>10s} | {'N':>3s} | bytes a parameter | launches | events | buckets | waits of the host")
    for form, ranks in settings:
        ledger, buckets = count_step(decoder.shapes(), form, ranks)
        per_parameter = ledger.bytes / numel
        events = ledger.events.total()
        print(
            f"{form.name:>10s} | {ranks:3d} | {per_parameter:17.2f} | {ledger.launches:8,d} | {events:6,d} "
            f"| {buckets:7d} | {ledger.waits.total():d}"
        )
        if operations:
            print_operations(ledger, numel)
        result["bytes_per_parameter"][f"{form.name} {ranks}"] = round(per_parameter, 4)
        if (form, ranks) == (SPLIT, 8):
            result |= {"launches_7b": ledger.launches, "events_7b": events, "buckets_7b": buckets}
    return result


def print_operations(ledger: Ledger, numel: int) -> None:
    print(f"    {'operation':32s} {'calls':>6s} {'launches':>8s} {'read':>7s} {'written':>8s}  (bytes a parameter)")
    for name, row in sorted(ledger.rows.items(), key=lambda item: -item[1].read_bytes - item[1].written_bytes):
        read, written = row.read_bytes / numel, row.written_bytes / numel
        print(f"    {name:32s} {row.calls:6d} {row.launches:8d} {read:7.3f} {written:8.3f}")
    print(f"    events: {', '.join(f'{kind} {count}' for kind, count in sorted(ledger.events.items()))}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument("--operations", action="store_true", help="print every kind of operation")
    arguments = parser.parse_args()
    result = summary(DECODERS[0], operations=arguments.operations)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
