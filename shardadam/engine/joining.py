# SPDX-License-Identifier: Apache-2.0
"""Uneven numbers of batches: torch.distributed.algorithms.Join for the optimizer.

A rank that has run out of batches repeats the calls of the others, without gradients of its own, so that they complete.
Each of the others therefore announces its calls: which one, its arguments and the hyperparameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Join, Joinable, JoinHook, _JoinConfig
from torch.distributed.device_mesh import DeviceMesh

from shardadam.checks.claims import AGREED_HYPERPARAMETERS
from shardadam.engine.parameters import listed
from shardadam.engine.step import StepEngine
from shardadam.ranks import agreement


class _Call(NamedTuple):
    """A call that a rank announces.

    Args:
        parameters: of the keyword argument ``parameters``: positions in the optimizer's param groups.
        hyperparameters: of each param group.
    """

    method: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    parameters: list[int] | None
    hyperparameters: list[dict[str, Any]]


class JoinableOptimizer(Joinable):
    """What an optimizer needs to take part in ``Join([optimizer])``."""

    param_groups: list[dict[str, Any]]
    _engine: StepEngine
    _join_group: dist.ProcessGroup | DeviceMesh | None

    def __init__(self) -> None:
        super().__init__()
        self._divides_by_all = True
        self._has_joined = False
        self._has_announced = False  # since the last step

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """Return the hook for torch.distributed.algorithms.Join: ranks may then take different numbers of steps.

        A rank without batches counts as zeros in the average, until all ranks have joined. Within the context, the
        other ranks may call ``step``, ``clip_grad_norm_``, ``clip_grad_value_``, ``gradient_norms`` and a GradScaler's
        methods. Ranks without batches run the optimizer's step hooks: a scheduler that is stepped in one advances alike
        on all ranks.

        Args:
            divide_by_initial_world_size: as in DistributedDataParallel. True (the default): divide sums of gradients
                by the number of all ranks. False: by the number of those that have batches left.

        Raises:
            ValueError: ``gradient_sync`` is "external": a rank without batches has no averaged gradients.
        """
        if self._engine.options.gradient_sync == "external":
            raise ValueError(
                'Join: found gradient_sync="external", expected "backward" or "step". A rank without batches gets no '
                "averaged gradients from other code. Let the optimizer average them, without DDP."
            )
        self._divides_by_all = kwargs.get("divide_by_initial_world_size", True)
        self._has_joined = self._has_announced = False
        return _OptimizerJoinHook(self)

    @property
    def join_device(self) -> torch.device:
        """The device of the parameters, for torch.distributed.algorithms.Join."""
        return self._engine.skipped_steps.device

    @property
    def join_process_group(self) -> Any:
        """The process group of the optimizer, for torch.distributed.algorithms.Join."""
        if isinstance(self._join_group, DeviceMesh):
            return self._join_group.get_group() if self._join_group.ndim == 1 else self._engine.transport.control
        return self._join_group or dist.group.WORLD

    def _refuse_in_join(self, method: str) -> None:
        """Raise RuntimeError within a ``Join`` context, where ranks without batches repeat calls up to a step only."""
        if self._join_config.enable and self._engine.transport.control is not None:
            raise RuntimeError(
                f"{method}: found a call within Join, expected none, as ranks without batches do not repeat it. "
                "Leave it out there, or train without Join."
            )

    def _announce(self, method: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Make the ranks that have joined repeat a call. Collective: they are in ``_repeat_calls``."""
        if not self._has_announced:
            work = Join.notify_join_context(self)
            if work is not None:
                work.wait()
        parameters: list[int] | None = None
        if keywords.get("parameters") is not None:
            positions = {id(p): i for i, p in enumerate(self._all_parameters())}
            parameters = [positions[id(p)] for p in keywords["parameters"] if id(p) in positions]
        call = _Call(
            method,
            tuple(None if callable(one) else _plain(one) for one in arguments),  # a closure runs on this rank only
            {name: _plain(one) for name, one in keywords.items() if name != "parameters" and not callable(one)},
            parameters,
            self._hyperparameters(),
        )
        self._rescale(self._exchange(call))
        self._has_announced = method != "step"

    def _repeat_calls(self) -> None:
        """Repeat the calls of ranks with batches, up to a step. Collective: those ranks are in ``_announce``."""
        if not self._has_joined:
            self._has_joined = self._engine.warnings.has_no_batches = True
            if self._engine.options.gradient_sync == "step":
                for parameter in self._all_parameters():
                    parameter.grad = None  # of the last batch: the loop would have cleared it before the next one
        while True:
            calls = self._exchange(None)
            call = calls[0]
            self._set_hyperparameters(call.hyperparameters)
            self._rescale(calls)
            keywords = dict(call.keywords)
            if call.parameters is not None:
                everything = self._all_parameters()
                keywords["parameters"] = [everything[position] for position in call.parameters]
            getattr(self, call.method)(*call.arguments, **keywords)
            self._has_announced = call.method != "step"
            if call.method == "step":
                return

    def _exchange(self, mine: Any) -> list[Any]:
        """Return what ranks tell each other, without None. Collective."""
        control = self._engine.transport.control
        assert control is not None
        return [one for one in agreement.exchange(mine, control) if one is not None]

    def _hyperparameters(self) -> list[dict[str, Any]]:
        return [{name: _number(group[name]) for name in AGREED_HYPERPARAMETERS} for group in self.param_groups]

    def _set_hyperparameters(self, hyperparameters: list[dict[str, Any]]) -> None:
        for group, values in zip(self.param_groups, hyperparameters, strict=True):
            for name, value in values.items():
                if isinstance(group[name], Tensor):
                    group[name].fill_(value)
                else:
                    group[name] = value

    def _rescale(self, calls: Sequence[_Call]) -> None:
        """Make means those over the ranks that have batches, at the first call since the last step."""
        if not self._divides_by_all and not self._has_announced:
            transport = self._engine.transport
            self._engine.rescale(transport.world_size * transport.replicas / len(calls))

    def _all_parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _leave_join(self, is_last_joiner: bool) -> None:
        """Give all ranks the hyperparameters of those that had the most batches. Collective."""
        self._set_hyperparameters(self._exchange(self._hyperparameters() if is_last_joiner else None)[0])
        self._join_config = _JoinConfig(enable=False, throw_on_early_termination=False, is_first_joinable=False)
        self._has_joined = self._engine.warnings.has_no_batches = False
        self._engine.all_have_joined()


class _OptimizerJoinHook(JoinHook):
    def __init__(self, optimizer: JoinableOptimizer) -> None:
        self._optimizer = optimizer

    def main_hook(self) -> None:
        self._optimizer._repeat_calls()

    def post_hook(self, is_last_joiner: bool) -> None:
        self._optimizer._leave_join(is_last_joiner)


_S = TypeVar("_S", bound=JoinableOptimizer)
_P = ParamSpec("_P")
_R = TypeVar("_R")


def repeated_by_joined_ranks(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """Make ranks without batches repeat the method's calls within a ``Join`` context. Does nothing elsewhere."""

    @wraps(method)
    def call(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if self._join_config.enable and self._engine.transport.control is not None:
            if not self._has_joined:
                if kwargs.get("parameters") is not None:
                    kwargs["parameters"] = listed(kwargs["parameters"])  # type: ignore[arg-type]
                self._announce(method.__name__, args, kwargs)
            with self._engine.joining():
                return method(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return call


def _plain(value: Any) -> Any:
    """Return a copy on the CPU of a tensor, and any other value as it is."""
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _number(value: Any) -> Any:
    """Return the number of a tensor of one element, and any other value as it is."""
    return value.item() if isinstance(value, Tensor) else value
