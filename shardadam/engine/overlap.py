# SPDX-License-Identifier: Apache-2.0
"""Runs all-gathers during the next forward: a hook on each module waits for the buckets of its own parameters.

Note: parameters used without calling their module
    A module may use the parameters of another module without calling it (``nn.MultiheadAttention`` and its
    ``out_proj``; a tied matrix). So the first forward waits for all all-gathers, and records which modules are called.
    Every later forward first waits for the parameters of the modules that were not called. If a parameter is still
    used too early, backward raises when it computes the gradient of that parameter.

Note: reads between steps
    Weights are averaged (EMA), copied and logged between steps. ``model.parameters()``, ``model.named_parameters()``,
    ``model.state_dict()``, and copies and pickles of the model, wait for all all-gathers. A list of parameters that was
    made before is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardadam.checks.torch_patches import call_before_parameters_are_read
from shardadam.engine.gathering import ParameterGatherer
from shardadam.engine.storage import FlatBucket, ShardedParam


class OverlappedForward:
    """The hooks on one model. They do not keep the gatherer alive: the model may outlive its optimizer. Local.

    Args:
        model: the forward of each module waits for its own parameters; ``state_dict`` and ``load_state_dict`` wait for
            all parameters.
        params: all params of the optimizer, by ``id(param.parameter)``.
        gatherer: has the all-gathers to wait for.

    Raises:
        RuntimeError: ``model`` has been compiled, and would not call the hooks.
        ValueError: ``model`` has none of the optimizer's parameters.
    """

    def __init__(self, model: nn.Module, params: dict[int, ShardedParam], gatherer: ParameterGatherer) -> None:
        _check_not_compiled(model)
        call_before_parameters_are_read(_wait_for_all_gatherers)
        _gatherers.add(gatherer)
        self._gatherer = weakref.ref(gatherer)
        self._is_recording = True  # until the first forward is complete
        self._called: set[nn.Module] = set()
        self._wait_first: list[int] = []  # indices of the buckets that every forward waits for before it begins
        self._indices: dict[nn.Module, list[int]] = {}  # of the buckets of each module's own parameters
        self._covered: set[int] = set()  # indices of the params in the model
        for module in model.modules():
            own = [params[id(p)] for p in module.parameters(recurse=False) if id(p) in params]
            self._indices[module] = sorted({bucket.index for param in own for bucket in param.buckets})
            self._covered |= {param.index for param in own}
        if not self._covered:
            raise ValueError(
                "overlap_gather: the model has none of the optimizer's parameters. Pass the model whose parameters the "
                "optimizer was given."
            )
        # Compiled code breaks its graph at each hook, and waits there. torch.compiler.disable is not used as a
        # decorator, as that would import torch's compiler with this module, which takes seconds.
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
        """Return whether forwards of the model wait for the bucket: all of its parameters are in the model."""
        return all(param.index in self._covered for param, _ in bucket.segments)

    def _before_root(self, module: nn.Module, *_: Any) -> None:
        if self._is_recording:
            self._called.clear()
        self._before(module)

    def _before(self, module: nn.Module, *_: Any) -> None:
        gatherer = self._gatherer()
        if gatherer is None:
            return
        if self._is_recording:
            self._called.add(module)
            gatherer.wait_all()
        elif gatherer.has_pending:
            gatherer.wait_for(self._wait_first)
            gatherer.wait_for(self._indices[module])

    def _after_root(self, *_: Any) -> None:
        if self._is_recording:
            self._is_recording = False
            not_called = [indices for module, indices in self._indices.items() if module not in self._called]
            self._wait_first = sorted({index for indices in not_called for index in indices})

    def _before_state_dict(self, *_: Any) -> None:
        gatherer = self._gatherer()
        if gatherer is not None:
            gatherer.wait_all()


_gatherers: weakref.WeakSet[ParameterGatherer] = weakref.WeakSet()
"""Those of all optimizers that overlap all-gathers."""


def _wait_for_all_gatherers() -> None:
    for gatherer in list(_gatherers):
        gatherer.wait_all()


def _check_not_compiled(model: nn.Module) -> None:
    compiled = isinstance(model, torch._dynamo.OptimizedModule) or any(
        module._compiled_call_impl is not None for module in model.modules()
    )
    if compiled:
        raise RuntimeError(
            "overlap_gather: the model has been compiled, and compiled code does not call hooks that are registered "
            "later. Call overlap_gather before torch.compile."
        )


def _gradient_check(gatherer: weakref.ref[ParameterGatherer], param: ShardedParam) -> Callable[[Tensor], None]:
    name, indices = param.name, [bucket.index for bucket in param.buckets]

    def check(_: Tensor) -> None:
        live = gatherer()
        if live is not None and live.has_pending and live.is_any_pending(indices):
            raise RuntimeError(
                f"Parameter {name!r} has been used before its all-gather was over: it was read outside the forward of "
                "the model given to overlap_gather, or by code compiled before overlap_gather was called. Call "
                "optimizer.synchronize() before anything else reads parameters, and overlap_gather before "
                "torch.compile."
            )

    return check


class _Hook:
    """A hook that does nothing in copies and in pickles of its module."""

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
    """Return the indices of the buckets that no forward waits for, so that ``step`` must."""
    return [bucket.index for bucket in buckets if not any(overlap.covers(bucket) for overlap in overlaps)]
