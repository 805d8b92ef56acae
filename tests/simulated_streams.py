# SPDX-License-Identifier: Apache-2.0
"""CUDA streams and CUDA memory, simulated on the CPU, to find races and broken captures in code written for CUDA.

Tensors stay on the CPU, and operations run at once. Tensors made with ``device="cuda"`` say that they are on CUDA.
Streams and events have vector clocks, and every operation is an access of its tensors on the current stream. So two
accesses that no event orders are found whatever the timing. Results of Triton kernels are not computed.

Note: what is found
    race: two streams, or a stream and the host, use the same memory, one of them writes, and nothing orders them.
    reused: memory was freed while another stream used it, and the stream that it belongs to, which had not waited for
    the other one, allocates again. The allocator may hand out the same memory.
    isolation: a stream waits inside a CUDA graph capture for an event from outside of it, or the other way round.
    unjoined: work of a captured stream that the capturing stream has not waited for when the capture ends.
    uncaptured: an operation that runs at once, during a capture, on a stream that does not take part in it.
    forbidden: the host waits for the device during a capture.
    devices: an operation mixes tensors on the host and on the device.
"""

from __future__ import annotations

import ast
import bisect
import inspect
import sys
import textwrap
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import shardadam
from shardadam.layout import ALIGNMENT_NUMEL

DEVICE = torch.device("cuda", 0)
HOST = torch.device("cpu")
_LIBRARY = str(Path(shardadam.__file__).parent) + "/"
_TESTS = str(Path(__file__).parent) + "/"
_SHOWN_FRAMES = 3


# Places in the code


Place = tuple[tuple[CodeType, int], ...]
"""Frames (code, line), innermost first."""


def here() -> Place:
    """Return the innermost frames of the library; those of the tests, if none is of the library."""
    library: list[tuple[CodeType, int]] = []
    tests: list[tuple[CodeType, int]] = []
    frame = sys._getframe(1)
    while frame is not None and len(library) < _SHOWN_FRAMES:
        code = frame.f_code
        if code.co_filename.startswith(_LIBRARY):
            library.append((code, frame.f_lineno))
        elif code.co_filename.startswith(_TESTS) and code.co_filename != __file__ and len(tests) < _SHOWN_FRAMES:
            tests.append((code, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(library or tests)


def is_in_library(place: Place) -> bool:
    return bool(place) and place[0][0].co_filename.startswith(_LIBRARY)


def spell(place: Place) -> str:
    def one(code: CodeType, line: int) -> str:
        path = code.co_filename.removeprefix(_LIBRARY).removeprefix(_TESTS)
        return f"{path}:{line} {code.co_name}"

    return " < ".join(one(code, line) for code, line in place) or "outside"


# Streams and events


class Queue:
    """The state of a stream, or of the host.

    Attributes:
        clock: by queue: how many of its operations are known to be complete before this queue's next one.
        capture: the capture that it takes part in.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: dict[Queue, int] = {self: 0}
        self.capture: Capture | None = None

    def knows(self, queue: Queue, tick: int) -> bool:
        return self.clock.get(queue, 0) >= tick

    def join(self, clock: Mapping[Queue, int]) -> None:
        for queue, tick in clock.items():
            if self.clock.get(queue, 0) < tick:
                self.clock[queue] = tick

    def advance(self) -> int:
        self.clock[self] += 1
        return self.clock[self]


@dataclass(eq=False)
class Capture:
    """A CUDA graph capture.

    Attributes:
        last: by queue that takes part: its last captured operation, and where that was.
    """

    origin: Queue
    last: dict[Queue, tuple[int, Place]] = field(default_factory=dict)
    has_ended: bool = False


class Event:
    """torch.cuda.Event."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: dict[Queue, int] | None = None
        self.capture: Capture | None = None
        self.place: Place = ()

    def record(self, stream: Stream | None = None) -> None:
        queue = _simulation().queue_of(stream)
        queue.join(_simulation().host.clock)
        self.clock, self.capture, self.place = dict(queue.clock), queue.capture, here()

    def wait(self, stream: Stream | None = None) -> None:
        _simulation().wait(_simulation().queue_of(stream), self)

    def query(self) -> bool:
        """Return whether the host knows that the event is over: a device is as slow as it can be."""
        _simulation().check_may_query(self)
        host = _simulation().host
        return all(host.knows(queue, tick) for queue, tick in (self.clock or {}).items())

    def synchronize(self) -> None:
        _simulation().check_may_query(self)
        _simulation().host_waits(self.clock or {})


class Stream:
    """torch.cuda.Stream: a handle. As in torch, several handles of one stream are equal."""

    def __init__(self, device: Any = None, priority: int = 0, *, queue: Queue | None = None) -> None:
        self.queue = _simulation().new_queue() if queue is None else queue
        self.device = DEVICE
        self.device_index = 0
        self.cuda_stream = id(self.queue)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.queue is self.queue

    def __hash__(self) -> int:
        return hash(self.queue)

    def __repr__(self) -> str:
        return self.queue.name

    def wait_event(self, event: Event) -> None:
        _simulation().wait(self.queue, event)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def query(self) -> bool:
        return self.record_event().query()

    def synchronize(self) -> None:
        self.record_event().synchronize()


# Memory


@dataclass(frozen=True, slots=True)
class Access:
    """One use of ``start : stop`` (addresses) by one operation.

    Args:
        tick: of ``queue`` at the operation.
        operation: its name.
    """

    start: int
    stop: int
    is_write: bool
    queue: Queue
    tick: int
    operation: str
    place: Place

    def __str__(self) -> str:
        does = "writes" if self.is_write else "reads"
        return f"{self.operation} {does} on {self.queue.name} at {spell(self.place)}"


@dataclass(eq=False, slots=True)
class Block:
    """Memory that one storage has allocated.

    Args:
        kind: "device" or "pinned".
        queue: the current stream when it was allocated, to which it returns.
        roles: what parts of it are, for messages: (start, stop, role), the latest last.
        recorded: the streams given to ``record_stream``.
    """

    kind: str
    start: int
    stop: int
    queue: Queue
    place: Place
    accesses: list[Access] = field(default_factory=list)
    roles: list[tuple[int, int, str]] = field(default_factory=list)
    recorded: set[Queue] = field(default_factory=set)

    def describe(self, start: int, stop: int) -> str:
        for first, last, role in reversed(self.roles):
            if first <= start and stop <= last:
                return f"{role} [{start - first}:{stop - first}] (bytes)"
        return f"the {self.kind} memory allocated on {self.queue.name} at {spell(self.place)}"


@dataclass(frozen=True, slots=True)
class Freed:
    """A block that has returned to its stream while ``accesses`` of other streams were not over."""

    block: Block
    accesses: list[Access]
    place: Place


@dataclass(frozen=True, slots=True)
class Finding:
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


class Memory:
    """All memory on the device, and pinned memory on the host."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._starts: list[int] = []  # of the blocks that are not empty, ascending
        self._blocks: list[Block] = []
        self._by_storage: dict[int, Block] = {}
        self._freed: dict[Queue, list[Freed]] = {}

    def block_of(self, tensor: Tensor) -> Block | None:
        """Return the block that the tensor is in; None for ordinary memory of the host."""
        if tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        block = self._by_storage.get(storage._cdata)
        if block is None and (address := storage.data_ptr()) != 0:
            index = bisect.bisect_right(self._starts, address) - 1
            if index >= 0 and address < self._blocks[index].stop:  # a storage over a part of another one's memory
                return self._blocks[index]
        return block

    def kind_of(self, tensor: Tensor) -> str | None:
        block = self.block_of(tensor)
        return None if block is None else block.kind

    def allocate(self, tensor: Tensor, kind: str, queue: Queue) -> None:
        """Register the new storage of ``tensor``. The memory may have been used on ``queue`` just before."""
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        block = Block(kind, start, start + storage.nbytes(), queue, here())
        self._by_storage[storage._cdata] = block
        if start != 0:
            index = bisect.bisect_left(self._starts, start)
            self._starts.insert(index, start)
            self._blocks.insert(index, block)
        weakref.finalize(storage, self._free, storage._cdata, block).atexit = False
        if kind == "device":
            tick = queue.advance()
            block.accesses.append(Access(start, block.stop, True, queue, tick, "allocation", block.place))
            self.check_reuse(queue, block.place)

    def _free(self, storage: int, block: Block) -> None:
        self._by_storage.pop(storage, None)
        if block.start != 0:
            index = self._blocks.index(block)
            del self._blocks[index], self._starts[index]
        unordered = [access for access in block.accesses if self._is_unordered(access, block)]
        if block.kind == "device" and unordered:
            self._freed.setdefault(block.queue, []).append(Freed(block, unordered, here()))

    @staticmethod
    def _is_unordered(access: Access, block: Block) -> bool:
        return access.queue not in block.recorded and not block.queue.knows(access.queue, access.tick)

    def check_reuse(self, queue: Queue, place: Place) -> None:
        """Check that what has returned to ``queue`` may be reused there, as an allocation at ``place`` may do."""
        for freed in self._freed.pop(queue, ()):
            for access in freed.accesses:
                if not queue.knows(access.queue, access.tick):
                    role = freed.block.describe(access.start, access.stop)
                    self._simulation.report(
                        "reused",
                        f"{role} was freed at {spell(freed.place)} and may be handed out on {queue.name} at "
                        f"{spell(place)}, while {access} is not over",
                        (freed.place, queue, access.place, access.queue),
                    )

    def access(self, tensor: Tensor, queue: Queue, tick: int, operation: str, *, is_write: bool) -> None:
        block = self.block_of(tensor)
        if block is None or tensor.numel() == 0:
            return
        start = tensor.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        stop = start + (last + 1) * tensor.element_size()
        self._access(block, start, stop, queue, tick, operation, is_write=is_write)

    def access_range(self, start: int, stop: int, queue: Queue, tick: int, operation: str, *, is_write: bool) -> None:
        """Record an access by addresses, which a registered block must hold."""
        block = self._blocks[bisect.bisect_right(self._starts, start) - 1]
        assert block.start <= start and stop <= block.stop
        self._access(block, start, stop, queue, tick, operation, is_write=is_write)

    def _access(
        self, block: Block, start: int, stop: int, queue: Queue, tick: int, operation: str, *, is_write: bool
    ) -> None:
        new = Access(start, stop, is_write, queue, tick, operation, here())
        kept = []
        for old in block.accesses:
            is_ordered = old.queue is queue or queue.knows(old.queue, old.tick)
            if not is_ordered and (is_write or old.is_write) and old.start < stop and start < old.stop:
                role = block.describe(max(old.start, start), min(old.stop, stop))
                self._simulation.report(
                    "race", f"on {role}: {old}; {new}; nothing orders them", (old.place, old.queue, new.place, queue)
                )
            is_covered = start <= old.start and old.stop <= stop
            if not (is_covered and is_ordered and (is_write or (old.queue is queue and not old.is_write))):
                kept.append(old)
        block.accesses = [*kept, new]

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        """As Tensor.record_stream: the memory is reused only once the stream is done with it."""
        block = self.block_of(tensor)
        # torch's allocator does not know storages over a part of another one's memory.
        if block is not None and tensor.untyped_storage().data_ptr() == block.start:
            block.recorded.add(stream.queue)

    def name(self, tensor: Tensor, role: str) -> None:
        """Call the tensor's memory ``role`` in findings."""
        block = self.block_of(tensor)
        if block is not None and tensor.numel() > 0:
            start = tensor.data_ptr()
            block.roles.append((start, start + tensor.nbytes, role))


# Operations


_NO_ACCESS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_", "lift_fresh"}
"""Operations that neither read nor write elements."""
_NO_READ = {"zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_full"}
"""Operations that read only the shape of their arguments."""
_COPIES = {"copy_", "_to_copy", "_foreach_copy_"}
"""Operations that may move data between host and device."""
_HOST_READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2"}
"""Operations whose result, or its shape, the host reads."""
_C10D_WRITES = {"output_tensor", "output", "tensors", "output_tensors", "outputs", "tensor"}
"""Arguments that collectives write; their schemas do not say so."""


@cache
def _written_arguments(func: Any) -> frozenset[str]:
    schema = func._schema
    if schema.name.startswith("c10d::"):
        return frozenset(_C10D_WRITES)
    return frozenset(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)


@cache
def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


class _Operations(TorchDispatchMode):
    """Passes every operation to the simulation."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._simulation.operation(func, args, kwargs or {}, out)
        return out


class _Functions(TorchFunctionMode):
    """Makes torch's functions accept, and tell, CUDA devices."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation
        self._memory = simulation.memory
        tensor: Any = torch.Tensor
        self._special: dict[Any, Callable[..., Any]] = {
            tensor.device.__get__: lambda t: DEVICE if self._memory.kind_of(t) == "device" else HOST,
            tensor.is_cuda.__get__: lambda t: self._memory.kind_of(t) == "device",
            tensor.to: self._to,
            tensor.cuda: lambda t, *a, **k: self._to(t, DEVICE, **k),
            tensor.cpu: lambda t, **k: self._to(t, HOST, **k),
            tensor.tolist: self._tolist,
            tensor.__setitem__: self._set_item,
            tensor.is_pinned: lambda t, *_: self._memory.kind_of(t) == "pinned",
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        special = self._special.get(func)
        if special is not None:
            return special(*args, **kwargs)
        device, pinned = kwargs.get("device"), kwargs.pop("pin_memory", False)
        if device is None and not pinned:
            return func(*args, **kwargs)
        kind = "pinned" if pinned else _kind(torch.device(HOST if device is None else device))
        if device is not None:
            kwargs["device"] = HOST
        if func in (torch.tensor, torch.as_tensor) and kind == "device":
            return self._from_values(func, args, kwargs)
        with self._simulation.placing(kind):
            made = func(*args, **kwargs)
        if kind == "pinned" and isinstance(made, Tensor) and self._memory.block_of(made) is None:
            self._memory.allocate(made, kind, self._simulation.current)  # torch.tensor runs no operation
        return made

    def _from_values(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Make a tensor on the device from values on the host, which waits for the copy."""
        if isinstance(args[0], Tensor):
            return self._to(args[0], DEVICE, dtype=kwargs.get("dtype"))
        made = func(*args, **kwargs)
        return self._to(made, DEVICE)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As Tensor.to: (device, dtype), (dtype) or (other), in any order and by keyword."""
        target, flags = kwargs.pop("device", None), []
        for value in args:
            if isinstance(value, bool):
                flags.append(value)
            elif isinstance(value, Tensor):
                target, kwargs["dtype"] = self._device_of(value), value.dtype
            elif isinstance(value, torch.dtype):
                kwargs["dtype"] = value
            elif value is not None:
                target = value
        kwargs |= dict(zip(("non_blocking", "copy"), flags, strict=False))
        if kwargs.get("dtype") is None:
            kwargs["dtype"] = tensor.dtype
        here, there = self._device_of(tensor), HOST if target is None else torch.device(target)
        if target is None or there.type == here.type:
            return tensor.to(**kwargs)
        kind = "pinned" if there.type == "cpu" and kwargs.get("non_blocking") else _kind(there)
        with self._simulation.placing(kind):
            return tensor.to(**{**kwargs, "copy": True})

    def _device_of(self, tensor: Tensor) -> torch.device:
        return DEVICE if self._memory.kind_of(tensor) == "device" else HOST

    def _tolist(self, tensor: Tensor) -> Any:
        self._simulation.host_reads(tensor, "tolist")
        return tensor.tolist()

    def _set_item(self, tensor: Tensor, index: Any, value: Any) -> None:
        if not isinstance(value, Tensor) and self._memory.kind_of(tensor) == "device":
            tensor[index].fill_(value)  # as on CUDA: nothing is copied from the host
        else:
            tensor[index] = value


def _kind(device: torch.device) -> str:
    return "device" if device.type == "cuda" else "host"


@cache
def _written_by_kernel(function: Any) -> frozenset[str]:
    """Return the arguments of a Triton kernel that it may store to, from its source."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    names = lambda node: {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}  # noqa: E731
    sources: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign) and not isinstance(node.value, ast.Call):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in names(target):
                    sources.setdefault(name, set()).update(names(node.value))
    written: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "tl.store" or called.startswith("tl.atomic"):
                written |= names(node.args[0])
            elif not called.startswith("tl."):
                written |= {arg.id for arg in node.args if isinstance(arg, ast.Name)}  # what it does is not looked at
    before: set[str] = set()
    while before != written:
        before = set(written)
        written.update(*(sources.get(name, set()) for name in before))
    return frozenset(written & {arg.arg for arg in (*tree.args.args, *tree.args.kwonlyargs)})


# The simulation


class Simulation:
    """
    Args:
        unordered_readers: ends of names of files in which the host reads pinned memory without waiting, on purpose.

    Attributes:
        findings: each once, in the order in which they were found.
        waits: by place: how often the host waited for the device.
        main: the default stream.
    """

    def __init__(self, *, unordered_readers: Sequence[str] = ()) -> None:
        self.findings: list[Finding] = []
        self.waits: Counter[str] = Counter()
        self.launches = 0
        self.host = Queue("the host")
        self._unordered_readers = tuple(unordered_readers)
        self._reported: set[tuple[Any, ...]] = set()
        self._queues: list[Queue] = []
        self._captures: list[Capture] = []
        self._local = threading.local()
        self.memory = Memory(self)
        self._functions = _Functions(self)
        self.main = Stream(queue=self.new_queue("main"))

    # Streams

    def new_queue(self, name: str | None = None) -> Queue:
        """Return a new stream; by default it has the name of the module that makes it."""
        if name is None:
            owners = [Path(code.co_filename).stem for code, _ in here()]
            name = f"{next((owner for owner in owners if owner != 'streams'), 'another')}'s stream {len(self._queues)}"
        self._queues.append(Queue(name))
        return self._queues[-1]

    def stream(self, name: str) -> Stream:
        """Return a new stream of the user's."""
        return Stream(queue=self.new_queue(name))

    @property
    def current(self) -> Queue:
        return getattr(self._local, "queue", self.main.queue)

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        before = self.current
        self._local.queue = self.queue_of(stream)
        try:
            yield
        finally:
            self._local.queue = before

    def set_current(self, stream: Stream) -> None:
        self._local.queue = stream.queue

    def queue_of(self, stream: Stream | None) -> Queue:
        return self.current if stream is None else stream.queue

    def wait(self, queue: Queue, event: Event) -> None:
        """Make ``queue`` wait for ``event``."""
        if event.clock is None:
            return
        has_ended = event.capture is not None and event.capture.has_ended
        if has_ended or (queue.capture is not None and queue.capture is not event.capture):
            other = "from a capture that has ended" if has_ended else "from before it"
            where = "during a capture " if queue.capture is not None else ""
            text = (
                f"{queue.name} waits {where}at {spell(here())} for an event {other}, recorded at {spell(event.place)}"
            )
            self.report("isolation", text, here(), event.place)
            return
        queue.capture = event.capture
        queue.join(event.clock)

    # The host

    def host_waits(self, clock: Mapping[Queue, int]) -> None:
        """Make the host wait for the device."""
        self.waits[spell(here())] += 1
        if self.is_capturing:
            self.report("forbidden", f"the host waits for the device at {spell(here())} during a capture", here())
        self.host.join(clock)

    def host_reads(self, tensor: Tensor, operation: str) -> None:
        """Let the host read the values of ``tensor``."""
        kind = self.memory.kind_of(tensor)
        if kind == "device":
            queue = self.current
            self.memory.access(tensor, queue, self._tick(queue, operation), operation, is_write=False)
            self.host_waits(queue.clock)
        elif kind == "pinned":
            self._host_access(tensor, operation, is_write=False)

    def _host_access(self, tensor: Tensor, operation: str, *, is_write: bool) -> None:
        if not any(here()[0][0].co_filename.endswith(name) for name in self._unordered_readers):
            self.memory.access(tensor, self.host, self.host.advance(), operation, is_write=is_write)

    def check_may_query(self, event: Event) -> None:
        """Find a host that asks for an event during a capture, or for one of a capture."""
        if self.is_capturing or event.capture is not None:
            text = (
                f"the host asks at {spell(here())} for an event, recorded at {spell(event.place)}, of or in a capture"
            )
            self.report("forbidden", text, here(), event.place)

    # Operations

    @contextmanager
    def placing(self, kind: str) -> Iterator[None]:
        """Place the new tensors of the operations inside: "device", "pinned" or "host"."""
        before = getattr(self._local, "kind", None)
        self._local.kind = kind
        try:
            yield
        finally:
            self._local.kind = before

    def operation(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Record what the operation ``func`` has done."""
        schema = func._schema
        name = schema.name.partition("::")[2]
        if _is_view(func) and name not in _COPIES:
            return
        reads: list[Tensor] = []
        writes: list[Tensor] = []
        written = _written_arguments(func)
        for argument, value in zip(schema.arguments, args, strict=False):
            (writes if argument.name in written else reads).extend(_tensors(value))
        for key, value in kwargs.items():
            (writes if key in written else reads).extend(_tensors(value))
        given = {id(tensor) for tensor in (*reads, *writes)}
        kinds = [self.memory.kind_of(tensor) for tensor in (*reads, *writes)]
        target = getattr(self._local, "kind", None) or ("device" if "device" in kinds else "host")
        for tensor in _tensors(out):
            if id(tensor) not in given and tensor.layout == torch.strided:
                kind = self.memory.kind_of(tensor)
                if kind is None and target != "host":
                    self.memory.allocate(tensor, target, self.current)
                    kind = target
                kinds.append(kind)
                writes.append(tensor)
        if name in _NO_ACCESS:
            return
        if name in _NO_READ:
            reads = []
        if "device" not in kinds:
            for tensor in (*reads, *writes):
                if self.memory.kind_of(tensor) == "pinned":
                    is_write = any(tensor is one for one in writes)
                    self._host_access(tensor, str(func), is_write=is_write)
            return
        self._check_devices(name, str(func), reads, writes)
        self._accesses(str(func), reads, writes)
        if name in _HOST_READS or (name in _COPIES and self._blocks_host(func, args, kwargs, reads, writes)):
            self.host_waits(self.current.clock)

    def _accesses(self, operation: str, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        queue = self.current
        tick = self._tick(queue, operation)
        for tensor in reads:
            self.memory.access(tensor, queue, tick, operation, is_write=False)
        for tensor in writes:
            self.memory.access(tensor, queue, tick, operation, is_write=True)

    def _tick(self, queue: Queue, operation: str) -> int:
        queue.join(self.host.clock)
        tick = queue.advance()
        self.launches += 1
        if queue.capture is not None:
            queue.capture.last[queue] = (tick, here())
        elif self._captures and is_in_library(here()):
            self.report("uncaptured", f"{operation} on {queue.name} at {spell(here())}", here(), queue)
        return tick

    def _check_devices(self, name: str, operation: str, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        if name in _COPIES or name.startswith("index"):
            return
        for tensor in (*reads, *writes):
            if tensor.dim() > 0 and self.memory.kind_of(tensor) != "device":
                self.report("devices", f"{operation} mixes tensors of host and device at {spell(here())}", here())

    def _blocks_host(
        self, func: Any, args: Any, kwargs: Any, reads: Sequence[Tensor], writes: Sequence[Tensor]
    ) -> bool:
        """Return whether a copy makes the host wait: between host and device, unless pinned and non-blocking."""
        kinds = {self.memory.kind_of(tensor) for tensor in (*reads, *writes)}
        if kinds == {"device"}:
            return False
        arguments = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        return None in kinds or not arguments.get("non_blocking", False)

    def launch(self, kernel: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Record the launch of a Triton kernel as one access of each of its tensors.

        Two names of arguments mean more: a kernel also reads what is at its ``addresses``, and of its ``parameter`` it
        uses only the blocks at ``positions``.
        """
        function = kernel.fn
        bound = {**dict(zip(inspect.signature(function).parameters, args, strict=False)), **kwargs}
        tensors = {name: value for name, value in bound.items() if isinstance(value, Tensor)}
        written = _written_by_kernel(function)
        operation = f"kernel {function.__name__}"
        self._check_devices("", operation, list(tensors.values()), [])
        with torch._C.DisableTorchFunction():  # these reads are not the host's
            addresses = tensors["addresses"].flatten().tolist() if "addresses" in tensors else []
            positions = tensors["positions"].tolist() if "positions" in tensors else None
        tick = self._tick(self.current, operation)
        for name, tensor in tensors.items():
            parts = _blocks(tensor, positions) if name == "parameter" and positions is not None else [tensor]
            for part in parts:
                for is_write in (False, True) if name in written else (False,):
                    self.memory.access(part, self.current, tick, operation, is_write=is_write)
        for address in filter(None, addresses):
            self.memory.access_range(address, address + 1, self.current, tick, operation, is_write=False)

    # Captures

    @property
    def is_capturing(self) -> bool:
        return self.current.capture is not None

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Context manager: capture a CUDA graph on the current stream, as torch.cuda.graph does."""
        everything: dict[Queue, int] = {}
        for queue in self._queues:
            everything |= {queue: queue.clock[queue]}
        self.host.join(everything)  # torch.cuda.graph synchronizes the device first
        origin = self.current
        capture = origin.capture = Capture(origin)
        self._captures.append(capture)
        try:
            yield
        finally:
            for queue, (tick, place) in capture.last.items():
                if not origin.knows(queue, tick):
                    self.report("unjoined", f"work on {queue.name} at {spell(place)}", place, queue)
            captured = {queue: tick for queue, (tick, _) in capture.last.items()}
            for queue in (*self._queues, self.host):
                queue.join(captured)  # it has not run, so that nothing needs to wait for it
                if queue.capture is capture:
                    queue.capture = None
            capture.has_ended = True
            self._captures.remove(capture)

    # Findings

    def report(self, kind: str, text: str, *about: Any) -> None:
        """Add a finding, unless there is one of this kind ``about`` the same places and streams."""
        if (kind, *about) not in self._reported:
            self._reported.add((kind, *about))
            self.findings.append(Finding(kind, text))

    def check_memory(self, stream: Stream) -> None:
        """Find memory that would be reused too early if ``stream`` allocated now."""
        self.memory.check_reuse(stream.queue, here())

    @contextmanager
    def running(self) -> Iterator[Simulation]:
        """Context manager: simulate CUDA."""
        global _running
        assert _running is None
        with ExitStack() as stack:
            for name, value in {
                "Stream": Stream,
                "Event": Event,
                "stream": self.on,
                "set_stream": self.set_current,
                "current_stream": lambda device=None: Stream(queue=self.current),
                "default_stream": lambda device=None: self.main,
                "is_current_stream_capturing": lambda: self.is_capturing,
                "device_of": lambda tensor: nullcontext(),
                "device": lambda device: nullcontext(),
                "current_device": lambda: 0,
                "synchronize": self._synchronize,
            }.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
            record_stream = lambda tensor, stream: self.memory.record_stream(tensor, stream)  # noqa: E731
            stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", record_stream))
            stack.enter_context(_faked_launches(self))
            engine = torch.autograd._engine_run_backward
            stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", self._with_functions(engine)))
            _running = self
            try:
                with self._functions, _Operations(self):
                    yield self
            finally:
                _running = None

    def _with_functions(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Keep torch's functions replaced while ``call`` runs hooks: torch turns that off inside ``backward``."""

        def with_functions(*args: Any, **kwargs: Any) -> Any:
            is_on = torch.overrides._get_current_function_mode() is self._functions
            with nullcontext() if is_on else self._functions:
                return call(*args, **kwargs)

        return with_functions

    def _synchronize(self, device: Any = None) -> None:
        for queue in self._queues:
            self.host_waits(queue.clock)


def _blocks(flat: Tensor, positions: Sequence[int]) -> list[Tensor]:
    """Return the blocks of ``flat`` at ``positions``, neighbours together."""
    bounds: list[list[int]] = []
    for position in positions:
        if bounds and bounds[-1][1] == position:
            bounds[-1][1] += 1
        else:
            bounds.append([position, position + 1])
    return [flat[first * ALIGNMENT_NUMEL : last * ALIGNMENT_NUMEL] for first, last in bounds]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple | dict):
        return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return []


def _faked_launches(simulation: Simulation) -> AbstractContextManager[Any]:
    """Make Triton kernels record their accesses instead of running."""
    try:
        from triton.runtime.jit import KernelInterface
    except ImportError:
        return nullcontext()

    def choose(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: simulation.launch(kernel, args, kwargs)

    return mock.patch.object(KernelInterface, "__getitem__", choose)


_running: Simulation | None = None


def _simulation() -> Simulation:
    assert _running is not None, "no simulation runs"
    return _running
