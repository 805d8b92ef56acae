# SPDX-License-Identifier: Apache-2.0
"""Runs all-gathers during the next forward: a hook on each block of the model waits for the buckets of its parameters.

Note: blocks
    Compiled code breaks its graph at each hook. So hooks are on blocks, such as the layers of a transformer, and not on
    every module: a block that is compiled by itself has no break inside, and a compiled model has one for each block.
    A block's hook waits for all parameters inside it. The hook of the whole model waits for those outside of blocks.

Note: parameters used without calling their block
    A block's parameters may be used without calling it (a tied matrix). So the first forward waits for all all-gathers,
    and records which blocks are called. Every later forward first waits for the parameters of the blocks that were not
    called. If a parameter is still used too early, backward raises when it computes the gradient of that parameter.

Note: reads between steps
    Weights are averaged (EMA), copied, converted and logged between steps. ``model.parameters()``,
    ``model.named_parameters()``, ``model.state_dict()``, ``model.to()``, and copies and pickles of the model, wait for
    all all-gathers; ``module.weight`` waits for those of that parameter. A list of parameters that was made before is
    not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from shardadam.checks.torch_patches import call_before_parameters_are_read
from shardadam.engine.gathering import ParameterGatherer
from shardadam.engine.storage import FlatBucket, ShardedParam


class OverlappedForward:
    """The hooks on one model. They do not keep the gatherer alive: the model may outlive its optimizer. Local.

    Args:
        model: has the blocks; ``state_dict`` and ``load_state_dict`` of it and its modules wait for all parameters.
        params: all params of the optimizer, by ``id(param.parameter)``.
        gatherer: has the all-gathers to wait for.
        blocks: modules inside the model; the forward of each waits for all parameters inside it. None: ``find_blocks``.

    Raises:
        RuntimeError: ``model``, or a module that has blocks inside, has been compiled, and would not call their hooks.
        ValueError: ``model`` has none of the optimizer's parameters, or not all of ``blocks``.
    """

    def __init__(
        self,
        model: nn.Module,
        params: dict[int, ShardedParam],
        gatherer: ParameterGatherer,
        blocks: Iterable[nn.Module] | None = None,
    ) -> None:
        owners = [model, *(find_blocks(model) if blocks is None else _inside(model, blocks))]
        members = {owner: [params[id(p)] for p in own if id(p) in params] for owner, own in _split(model, owners)}
        self._covered = {param.index for own in members.values() for param in own}  # indices of the params in the model
        if not self._covered:
            raise ValueError(
                "overlap_gather: the model has none of the optimizer's parameters. Pass the model whose parameters the "
                "optimizer was given."
            )
        hooked = [owner for owner, own in members.items() if own or owner is model]
        _check_not_compiled(model, hooked)
        call_before_parameters_are_read(_wait_for_all_gatherers)
        _gatherers.add(gatherer)
        self._gatherer = weakref.ref(gatherer)
        self._is_recording = True  # until the first forward is complete
        self._called: set[nn.Module] = set()
        self._wait_first: list[int] = []  # indices of the buckets that every forward waits for before it begins
        self._indices = {owner: _bucket_indices(members[owner]) for owner in hooked}
        _keep_hooks_out_of_compiled_code()
        for owner in hooked:
            owner.register_forward_pre_hook(_Hook(self._before_root if owner is model else self._before), prepend=True)
        model.register_forward_hook(_Hook(self._after_root))
        for module in model.modules():
            module.register_state_dict_pre_hook(_Hook(self._before_state_dict))  # type: ignore[no-untyped-call]
            module.register_load_state_dict_pre_hook(_Hook(self._before_state_dict))  # type: ignore[no-untyped-call]
            _wait_at_attributes(module, params, self._gatherer)
        for param in params.values():
            if param.index in self._covered:
                check = _gradient_check(self._gatherer, param)
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
            not_called = [indices for owner, indices in self._indices.items() if owner not in self._called]
            self._wait_first = sorted({index for indices in not_called for index in indices})

    def _before_state_dict(self, *_: Any) -> None:
        gatherer = self._gatherer()
        if gatherer is not None:
            gatherer.wait_all()


# Blocks

_LISTS = (nn.ModuleList, nn.ModuleDict)
"""Modules that are never called: code calls the modules in them."""


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are called one after the other in a forward, as far as the structure tells.

    A stack is a ``ModuleList``, or a dict or sequence with two or more modules of one class, such as the layers of a
    transformer. Its elements are blocks. So are modules outside of stacks that have none inside (embeddings, norms,
    heads). A module that has stacks inside is one only if it also has parameters of its own.
    """
    return list(dict.fromkeys(_blocks_inside(model)))


def _blocks_inside(module: nn.Module) -> Iterator[nn.Module]:
    is_stack = _is_stack(module)
    for child in module.children():
        if isinstance(child, _LISTS) or (not is_stack and any(map(_is_stack, child.modules()))):
            if any(True for _ in child.parameters(recurse=False)):
                yield child
            yield from _blocks_inside(child)
        else:
            yield child


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, (*_LISTS, nn.Sequential)):
        return False
    classes = [type(child) for child in module.children() if any(True for _ in child.parameters())]
    return len(classes) > (0 if isinstance(module, nn.ModuleList) else len(set(classes)))


def _inside(model: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the blocks, which must be modules inside the model."""
    chosen, inside = list(blocks), set(model.modules()) - {model}
    for position, block in enumerate(chosen):
        if block not in inside:
            raise ValueError(
                f"overlap_gather: blocks[{position}] is a {type(block).__name__} that is not inside the model. Pass "
                "modules that the model's forward calls, such as list(model.layers)."
            )
    return chosen


def _split(model: nn.Module, owners: Iterable[nn.Module]) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Return for each owner the parameters inside it, without those of another owner inside it."""
    own: dict[nn.Module, list[nn.Parameter]] = {owner: [] for owner in owners}
    seen: set[tuple[nn.Module, nn.Module]] = set()
    rest = [(model, model)]
    while rest:
        module, owner = rest.pop()
        if (module, owner) not in seen:
            seen.add((module, owner))
            own[owner] += module.parameters(recurse=False)
            rest += [(child, child if child in own else owner) for child in module.children()]
    return list(own.items())


def _bucket_indices(params: Iterable[ShardedParam]) -> list[int]:
    return sorted({bucket.index for param in params for bucket in param.buckets})


def _check_not_compiled(model: nn.Module, hooked: Sequence[nn.Module]) -> None:
    """Raise RuntimeError if compiled code would call a hooked module. A hooked module itself may be compiled: torch
    calls its hooks before its compiled code.
    """
    for name, module in model.named_modules():
        is_wrapper = isinstance(module, torch._dynamo.OptimizedModule)
        if is_wrapper or module._compiled_call_impl is not None:
            calls = set(module.modules()) - {module}
            if module is model or any(one in calls for one in hooked):
                what = "the model" if module is model else f"module {name!r}"
                raise RuntimeError(
                    f"overlap_gather: {what} has been compiled, and compiled code does not call hooks that are "
                    "registered later. Call overlap_gather before torch.compile, or compile the blocks only."
                )


# Reads between steps

_gatherers: weakref.WeakSet[ParameterGatherer] = weakref.WeakSet()
"""Those of all optimizers that overlap all-gathers."""


def _wait_for_all_gatherers() -> None:
    for gatherer in list(_gatherers):
        gatherer.wait_all()


class _WaitingParameters(dict[str, Any]):
    """The parameters of a module: reading ``module.weight`` waits for its all-gathers. Copies and pickles are dicts."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__(parameters)
        self.waits: dict[str, tuple[weakref.ref[ParameterGatherer], list[int]]] = {}  # bucket indices by name

    def __getitem__(self, name: str) -> Any:
        if not torch.compiler.is_compiling() and name in self.waits:
            gatherer, indices = self.waits[name]
            live = gatherer()
            if live is not None and live.is_any_pending(indices):
                live.wait_for(indices)
        return dict.__getitem__(self, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _wait_at_attributes(
    module: nn.Module, params: dict[int, ShardedParam], gatherer: weakref.ref[ParameterGatherer]
) -> None:
    mine = {name: params[id(p)] for name, p in module._parameters.items() if id(p) in params}
    if not mine:
        return
    parameters: Any = module._parameters
    if not isinstance(parameters, _WaitingParameters):
        module.__dict__["_parameters"] = parameters = _WaitingParameters(parameters)
    parameters.waits |= {name: (gatherer, _bucket_indices([param])) for name, param in mine.items()}


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


@cache
def _keep_hooks_out_of_compiled_code() -> None:
    # Not a decorator, as that would import torch's compiler with this module, which takes seconds.
    _Hook.__call__ = torch.compiler.disable(_Hook.__call__)  # type: ignore[method-assign, no-untyped-call]


def _nothing(*_: Any) -> None:
    return None


def uncovered(buckets: Iterable[FlatBucket], overlaps: Sequence[OverlappedForward]) -> list[int]:
    """Return the indices of the buckets that no forward waits for, so that ``step`` must."""
    return [bucket.index for bucket in buckets if not any(overlap.covers(bucket) for overlap in overlaps)]
