# SPDX-License-Identifier: Apache-2.0
"""A CUDA device that computes nothing, for counting what the library enqueues and for finding where the host waits.

Note: meta tensors that say "cuda:0"
    On the inside every tensor of the device is on "meta": it has a shape and an autograd graph, and no memory. Python
    sees "cuda:0" and ``is_cuda``, so the library takes the path that it takes on a GPU, with real hooks in real
    backwards. torch.cuda's streams and events, Triton's launches and torch.distributed's transfers are recorded only.
    FakeTensorMode cannot do this: torch's CPU builds abort when they build an autograd graph of its CUDA tensors.

Note: what the host reads
    Nothing on the device has a value, except what was copied there, until a kernel writes it. So an asynchronous copy
    to the host yields zeros, and ones from the fifth element on: what a sync of ranks that agree, with finite
    gradients of all parameters, would yield (``step_sync``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from shardadam.engine import storage

DEVICE = torch.device("cuda", 0)
_META = torch.device("meta")
_device_of: Callable[[Tensor], torch.device] = torch._C.TensorBase.device.__get__  # type: ignore[attr-defined]
_aten = torch.ops.aten
_ALIGNMENT = 512  # of storages, in bytes

# Operators whose result has a size, or a value, that the host must learn.
_WAITS = {
    _aten._local_scalar_dense,
    _aten.equal,
    _aten.is_nonzero,
    _aten.masked_select,
    _aten.nonzero,
    _aten.repeat_interleave,
    _aten.unique_consecutive,
    _aten._unique2,
}
_MASKABLE = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}  # a bool index is a nonzero
_FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}


class Observer:
    """What is told about each thing that is enqueued. Does nothing; to be overridden."""

    def on_op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """An operator that has tensors of the device among its arguments or results has been enqueued."""

    def on_kernel(self, name: str, arguments: dict[str, Any]) -> None:
        """A Triton kernel has been launched."""

    def on_event(self, kind: str) -> None:
        """``kind``: "record", "wait_event" or "wait_stream"."""

    def on_synchronize(self, event: Event) -> None:
        """The host waits for an event."""

    def on_wait(self, what: str) -> None:
        """The host waits for everything that has been enqueued, for the reason ``what``."""


@dataclass(eq=False)
class Event:
    """
    Args:
        label: ``FakeCuda.label`` when it was recorded; None before.
    """

    label: Any = None

    def record(self, stream: Stream | None = None) -> None:
        _live().observer.on_event("record")
        self.label = _live().label

    def wait(self, stream: Stream | None = None) -> None:
        _live().observer.on_event("wait_event")

    def query(self) -> bool:
        """Return False: the device is as far behind as it can be."""
        return False

    def synchronize(self) -> None:
        _live().observer.on_synchronize(self)


class Stream:
    device = DEVICE

    def __init__(self, device: object = None, priority: int = 0) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        _live().observer.on_event("wait_stream")

    def synchronize(self) -> None:
        _live().observer.on_wait("Stream.synchronize")


class FakeCuda:
    """The device, while ``fake_cuda`` is open.

    Attributes:
        label: kept by every event that is recorded, such as the number of the step.
        is_capturing: what ``torch.cuda.is_current_stream_capturing`` returns.
        pinned_count: the number of allocations of pinned memory.
    """

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.label: Any = None
        self.is_capturing = False
        self.is_inside = 0  # an operator runs, and must see "meta"
        self._default = Stream()
        self._streams = [self._default]
        self.pinned_count = 0
        self._pinned: dict[int, Tensor] = {}  # by the address of the storage's C++ object
        self._contents = WeakTensorKeyDictionary()  # of tensors that were copied from the host
        self._addresses: dict[tuple[int, int], int] = {}  # of storages
        self._next_address = _ALIGNMENT

    # Streams

    def current_stream(self, device: object = None) -> Stream:
        return self._streams[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._streams.append(stream)
        try:
            yield
        finally:
            self._streams.pop()

    # Tensors

    def address(self, tensor: Tensor) -> int:
        """Return an address of the first element, by which views of one storage overlap, and others do not."""
        if not on_device(tensor):
            return torch._C.TensorBase.data_ptr(tensor)
        storage = tensor.untyped_storage()
        key = storage._cdata, storage.nbytes()
        if key not in self._addresses:
            self._addresses[key] = self._next_address
            self._next_address += -(-max(storage.nbytes(), 1) // _ALIGNMENT) * _ALIGNMENT
        return self._addresses[key] + tensor.storage_offset() * tensor.element_size()

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned_count += 1
        self._pinned[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _is_view(func):
            return func(*args, **kwargs)
        packet = func.overloadpacket
        is_on_device = has_device_tensor(args) or has_device_tensor(kwargs.values())
        if packet is _aten._pin_memory:
            return self.pin(args[0].clone())
        if packet is _aten.is_pinned:
            return self.is_pinned(args[0])
        if kwargs.get("pin_memory"):
            return self.pin(func(*args, **{**kwargs, "pin_memory": False}))
        if func.namespace == "c10d" and is_on_device:
            out = _on_fake_group(func, args, kwargs)
        elif packet in (_aten.copy_, _aten._to_copy):
            out = self._copy(func, args, kwargs)
        elif packet in _WAITS and is_on_device:
            return self._read_now(func, args, kwargs)
        else:
            if packet in _MASKABLE and any(t.dtype == torch.bool for t in tree_leaves(args[1]) if t is not None):
                self.observer.on_wait(f"{func} with a mask")
            out = func(*args, **kwargs)
        if is_on_device or has_device_tensor(out if isinstance(out, (list, tuple)) else (out,)):
            self.observer.on_op(func, args, kwargs, out)
        return out

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func.overloadpacket is _aten.copy_:
            target, source = args[:2]
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            to_device, is_target_pinned = on_device(target), self.is_pinned(target)
        else:
            target, source, non_blocking = None, args[0], kwargs.get("non_blocking", False)
            device = kwargs.get("device")
            to_device = on_device(source) if device is None else device.type == "meta"
            is_target_pinned = False  # torch pins the result of no copy unless it is asked to
        if on_device(source) == to_device:
            return func(*args, **kwargs)
        if to_device:
            if not (non_blocking and self.is_pinned(source)):
                self.observer.on_wait(f"a copy of pageable memory to the device ({tuple(source.shape)})")
            out = func(*args, **kwargs)
            self._contents[out] = source.detach().clone()
            return out
        if not (non_blocking and is_target_pinned):
            self.observer.on_wait(f"a copy to the host ({tuple(source.shape)})")
        if target is None:
            target = torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype, device="cpu")
        return target.copy_(self._read(source))

    def _read(self, source: Tensor) -> Tensor:
        if source in self._contents:
            return self._contents[source]
        values = torch.zeros(source.shape, dtype=source.dtype, device="cpu")
        values.view(-1)[4:] = 1
        return values

    def _read_now(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.observer.on_wait(str(func))
        on_host = tree_map(lambda leaf: self._read(leaf) if on_device(leaf) else leaf, (args, kwargs))
        return func(*on_host[0], **on_host[1])


def on_device(value: object) -> bool:
    """Return whether ``value`` is a tensor of the fake device."""
    return isinstance(value, Tensor) and _device_of(value).type == "meta"


def has_device_tensor(values: Iterable[object]) -> bool:
    """Return whether any of ``values``, or of the members of lists among them, is a tensor of the fake device."""
    return any(
        on_device(value) or (isinstance(value, (list, tuple)) and any(map(on_device, value))) for value in values
    )


@cache
def _is_view(func: Any) -> bool:
    """Return whether an operator returns views and writes nothing."""
    returns = [result.alias_info for result in func._schema.returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in returns)


def _on_fake_group(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a collective of the fake group on small tensors of the host, whose sizes have the same ratios."""
    numels = [leaf.numel() for leaf in tree_leaves((args, kwargs)) if on_device(leaf) and leaf.numel() > 0]
    unit = min(numels, default=1)

    def small(leaf: Any) -> Any:
        return torch.zeros(leaf.numel() // unit, dtype=leaf.dtype, device="cpu") if on_device(leaf) else leaf

    args, kwargs = tree_map(small, (args, kwargs))
    return func(*args, **kwargs)


class _Python(TorchFunctionMode):
    """Replaces the device in every call from Python."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:  # it is Python, in which hooks run: stay active
            with self:
                return torch.autograd.backward(*args, grad_tensors=kwargs.pop("gradient", None), **kwargs)
        if func is torch.device:
            return func(*args, **kwargs)
        args, there = [_device(value) for value in args], {key: _device(value) for key, value in kwargs.items()}
        if func in _FROM_HOST:
            if there.get("device") == _META and not any(map(on_device, args)):
                self._cuda.observer.on_wait(f"{func.__name__} of a host value on the device")
            if there.pop("pin_memory", False):
                return self._cuda.pin(func(*args, **there))
        return func(*args, **there)


def _device(value: Any) -> Any:
    if isinstance(value, torch.device):
        return _META if value.type == "cuda" else value
    return _META if isinstance(value, str) and value.startswith("cuda") else value


class _Dispatch(TorchDispatchMode):
    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._cuda.is_inside += 1
        try:
            return self._cuda.dispatch(func, args, kwargs or {})
        finally:
            self._cuda.is_inside -= 1


_open: list[FakeCuda] = []


def _live() -> FakeCuda:
    return _open[-1]


def _seen_device(tensor: Tensor) -> torch.device:
    device = _device_of(tensor)
    return DEVICE if device.type == "meta" and not (_open and _open[-1].is_inside) else device


def _launch(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
    arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    _live().observer.on_kernel(kernel.__name__, arguments)


def _view_of(flat: Tensor, param: storage.ShardedParam, view: Tensor | None = None) -> Tensor:
    """``storage.view_of`` without a storage of its own, which meta tensors cannot slice."""
    found = flat.as_strided(param.shape, param.stride, param.offset)
    if view is None:
        return found
    view.data = found
    return view


@contextmanager
def fake_cuda(observer: Observer) -> Iterator[FakeCuda]:
    """Context manager: in this thread, device "cuda" is a fake one that tells ``observer`` what is enqueued.

    Optimizers that were built inside must not be used afterwards.
    """
    cuda = FakeCuda(observer)

    def waits(*_: Any) -> None:
        observer.on_wait("torch.cuda.synchronize")

    replaced: Sequence[tuple[Any, str, Any]] = (
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "Event", Event),
        (torch.cuda, "stream", cuda.stream),
        (torch.cuda, "current_stream", cuda.current_stream),
        (torch.cuda, "synchronize", waits),
        (torch.cuda, "device_of", lambda _: nullcontext()),
        (torch.cuda, "device", lambda _: nullcontext()),
        (torch.cuda, "is_initialized", lambda: False),  # Triton is taken to work
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "is_current_stream_capturing", lambda: cuda.is_capturing),
        (torch.autograd, "has_torch_function", lambda _: False),  # backward would suspend the mode, and run hooks
        (JITFunction, "run", _launch),
        (InterpretedFunction, "run", _launch),
        (storage, "view_of", _view_of),
    )
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        # These hide attributes of TensorBase, which torch.Tensor inherits.
        for name, value in (
            ("device", property(_seen_device)),
            ("data_ptr", lambda tensor: cuda.address(tensor)),
            ("is_cuda", property(lambda tensor: _seen_device(tensor).type == "cuda")),
            ("__repr__", lambda tensor, **_: f"Tensor({tuple(tensor.shape)}, {tensor.dtype}, {_seen_device(tensor)})"),
        ):
            stack.enter_context(mock.patch.object(torch.Tensor, name, value, create=True))
        _open.append(cuda)
        stack.callback(_open.pop)
        stack.enter_context(_Python(cuda))
        stack.enter_context(_Dispatch(cuda))
        yield cuda
