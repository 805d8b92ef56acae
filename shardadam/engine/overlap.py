# SPDX-License-Identifier: Apache-2.0
"""All-gathers under the next forward: hooks on modules, each of which waits for its own parameters' buckets.

Note: parameters that no module's forward announces
    A module may use the parameters of another without calling it (``nn.MultiheadAttention`` and its ``out_proj``; a
    matrix that is tied). The first forward after registration therefore waits for everything before it begins, and
    records which modules are called. The parameters of those that are not are waited for at the beginning of every
    forward. Whatever slips through is found in backward, where the gradient of a parameter arrives that nobody has
    waited for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardadam.engine.gathering import ParameterGatherer
from shardadam.engine.storage import FlatBucket, ShardedParam


class OverlappedForward:
    """
    Args:
        model: its forward waits for what it needs; ``state_dict`` and ``load_state_dict``, for everything.
        params: of the optimizer, by the id of their parameters.

    Raises:
        RuntimeError: ``model`` has been compiled, and would not call the hooks.
        ValueError: it has no parameter of the optimizer's.
    """

    def __init__(self, model: nn.Module, params: dict[int, ShardedParam], gatherer: ParameterGatherer) -> None:
        _refuse_compiled(model)
        self._gatherer = weakref.ref(gatherer)  # the model may outlive the optimizer
        self._is_learning = True
        self._called: set[nn.Module] = set()
        self._at_once: list[int] = []  # indices of buckets that any forward waits for
        self._indices: dict[nn.Module, list[int]] = {}
        self._covered: set[int] = set()  # indices
        for module in model.modules():
            own = [params[id(p)] for p in module.parameters(recurse=False) if id(p) in params]
            self._indices[module] = sorted({bucket.index for param in own for bucket in param.buckets})
            self._covered |= {param.index for param in own}
        if not self._covered:
            raise ValueError(
                "overlap_gather: the model has none of the optimizer's parameters. Pass the model that they belong to."
            )
        # Compiled code breaks off for them and waits. Not as decorators: importing torch's compiler takes seconds.
        before_root, before, after_root = map(
            torch.compiler.disable, (self._before_root, self._before, self._after_root)
        )
        for module, indices in self._indices.items():
            if module is model or indices:
                hook = before_root if module is model else before
                module.register_forward_pre_hook(_Hook(hook), prepend=True)
            module.register_state_dict_pre_hook(_Hook(self._before_state_dict))  # type: ignore[no-untyped-call]
            module.register_load_state_dict_pre_hook(_Hook(self._before_state_dict))  # type: ignore[no-untyped-call]
        model.register_forward_hook(_Hook(after_root))
        for param in params.values():
            if param.index in self._covered:
                check = _gradient_check(weakref.ref(gatherer), param)
                param.parameter.register_post_accumulate_grad_hook(check)  # type: ignore[no-untyped-call]

    def covers(self, bucket: FlatBucket) -> bool:
        """Whether a forward waits for all that is in ``bucket``."""
        return all(param.index in self._covered for param, _ in bucket.pieces)

    def _before_root(self, module: nn.Module, *_: Any) -> None:
        if self._is_learning:
            self._called.clear()
        self._before(module)

    def _before(self, module: nn.Module, *_: Any) -> None:
        gatherer = self._gatherer()
        if gatherer is None:
            return
        if self._is_learning:
            self._called.add(module)
            gatherer.wait_all()
        elif gatherer.has_pending:
            gatherer.wait_for(self._at_once)
            gatherer.wait_for(self._indices[module])

    def _after_root(self, *_: Any) -> None:
        if self._is_learning:
            self._is_learning = False
            silent = [indices for module, indices in self._indices.items() if module not in self._called]
            self._at_once = sorted({index for indices in silent for index in indices})

    def _before_state_dict(self, *_: Any) -> None:
        gatherer = self._gatherer()
        if gatherer is not None:
            gatherer.wait_all()


def _refuse_compiled(model: nn.Module) -> None:
    compiled = isinstance(model, torch._dynamo.OptimizedModule) or any(
        module._compiled_call_impl is not None for module in model.modules()
    )
    if compiled:
        raise RuntimeError(
            "overlap_gather: the model has been compiled, and compiled code does not call hooks that are registered "
            "after it. Call overlap_gather first and torch.compile then."
        )


def _gradient_check(gatherer: weakref.ref[ParameterGatherer], param: ShardedParam) -> Callable[[Tensor], None]:
    name, indices = param.name, [bucket.index for bucket in param.buckets]

    def check(_: Tensor) -> None:
        live = gatherer()
        if live is not None and live.has_pending and live.is_any_pending(indices):
            raise RuntimeError(
                f"Parameter {name!r} has been used before its all-gather was over: the forward of the model that was "
                "given to overlap_gather did not run, or runs code that was compiled before. Call "
                "optimizer.synchronize() before anything else reads parameters, and overlap_gather before "
                "torch.compile."
            )

    return check


class _Hook:
    """A hook that copies and pickles of the module leave behind."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> None:
        self._call(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(_nothing)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing,)


def _nothing(*_: Any) -> None:
    return None


def uncovered(buckets: Iterable[FlatBucket], overlaps: Sequence[OverlappedForward]) -> list[int]:
    """Indices of the buckets that no forward waits for."""
    return [bucket.index for bucket in buckets if not any(overlap.covers(bucket) for overlap in overlaps)]
