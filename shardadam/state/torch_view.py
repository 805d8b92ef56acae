# SPDX-License-Identifier: Apache-2.0
"""``optimizer.state``, which users may clear, replace and assign to. Every write reaches the flat storage.

Holds views only; the moments live in the arenas. Local: all ranks must make the same writes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any, NoReturn

import torch
from torch import Tensor

from shardadam.engine.storage import ShardedParam
from shardadam.state import averages, local
from shardadam.state.local import SCALARS
from shardadam.state.masters import refresh_, write_master_
from shardadam.update.formats import AVERAGE

_MASTER = "master"


class ParamState(dict[str, Tensor]):
    """``optimizer.state[p]``: this rank's elements of the parameter's state, as 1-D views of the flat storage, by name.

    Assigning to an entry copies a tensor of the entry's shape, or this rank's elements of one of the parameter's shape.
    Clearing restarts the parameter's Adam, as in torch, and its average; an exact master weight stays. Single entries
    cannot be added or removed.

    Args:
        names: has the keys of ``local.torch_state(param)``.

    Attributes:
        addresses: of the views; None before any is read, which makes them.
    """

    __slots__ = ("_param", "addresses")

    def __init__(self, param: ShardedParam, names: Mapping[str, Any]) -> None:
        super().__init__(names)
        self._param = param
        self.addresses: dict[str, int] | None = None

    def __getitem__(self, name: str) -> Tensor:
        self._make_views()
        if name == _MASTER:
            refresh_(self._param)
        elif name == AVERAGE:
            averages.refresh_([self._param])
        return super().__getitem__(name)

    def _make_views(self) -> None:
        if self.addresses is None:
            views = local.torch_state(self._param)
            self._param.has_views = True
            super().update(views)
            self.addresses = {name: view.data_ptr() for name, view in views.items()}

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # overridden so that dict(state) and {**state} read by __getitem__

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401, as dict.get would not call __getitem__

    def items(self) -> Any:
        return {**self}.items()

    def values(self) -> Any:
        return {**self}.values()

    def copy(self) -> dict[str, Tensor]:
        return {**self}

    def __eq__(self, other: object) -> bool:
        return {**self} == other

    def __or__(self, other: Any) -> Any:
        return {**self} | other

    def __ror__(self, other: Any) -> Any:
        return other | {**self}

    def __repr__(self) -> str:
        return repr({**self})

    def __setitem__(self, name: str, value: Any) -> None:
        self._write(name, self._checked(name, value))

    def take_replaced(self) -> None:
        """Copies the values of entries whose data was replaced (``tensor.data = ...``), and makes them views again.

        Raises:
            ValueError: they do not fit. The state is as before.
        """
        for name, address in (self.addresses or {}).items():
            entry = super().__getitem__(name)
            if entry.data_ptr() != address:
                replaced, entry.data = entry.data, local.torch_state(self._param)[name]
                self[name] = replaced

    def replace(self, entries: Mapping[str, Any]) -> None:
        """Clears the state, then copies ``entries``. Changes nothing if one of them does not fit."""
        checked = {name: self._checked(name, value).clone() for name, value in entries.items()}
        for name, tensor in self.items():
            if name != _MASTER:
                tensor.zero_()
        for name, value in checked.items():
            self._write(name, value)

    def clear(self) -> None:
        self.replace({})

    def update(self, *others: Any, **named: Any) -> None:
        checked = {name: self._checked(name, value) for name, value in dict(*others, **named).items()}
        for name, value in checked.items():
            self._write(name, value)

    def __ior__(self, other: Any) -> ParamState:  # type: ignore[override]
        self.update(other)
        return self

    def setdefault(self, name: str, default: Any = None) -> Tensor:
        return self[name] if name in self else self._refuse(name)

    def __delitem__(self, name: str) -> None:
        self._refuse(name)

    def pop(self, name: str, *default: Any) -> NoReturn:
        self._refuse(name)

    def popitem(self) -> NoReturn:
        self._refuse("an entry")

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ({**self},)

    def _refuse(self, name: str) -> NoReturn:
        raise ValueError(
            f"optimizer.state: {name!r} of parameter {self._param.name!r} can be neither added nor removed, expected "
            f"one of {', '.join(self)}. Assign to one of these, clear optimizer.state[p] to restart its Adam, or "
            "keep other values in a dict of your own."
        )

    def _checked(self, name: str, value: Any) -> Tensor:
        """Returns this rank's elements of ``value``; raises ValueError if they do not fit."""
        if name not in self:
            self._refuse(name)
        target = self[name]
        given = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
        if name in SCALARS:
            if given.numel() == 1:
                return given.reshape(())
        elif given.is_floating_point() or given.dtype == target.dtype:
            if given.shape == target.shape:
                return given
            if given.shape == self._param.shape and target.numel() == sum(s.numel for s in self._param.shard_segments):
                return local.own_elements(self._param, given)
        raise ValueError(
            f"optimizer.state: {name!r} of parameter {self._param.name!r}: found a {given.dtype} tensor of shape "
            f"{tuple(given.shape)}, expected {target.dtype} of shape {tuple(target.shape)} (this rank's elements) or "
            f"of the parameter's shape {tuple(self._param.shape)}."
        )

    @torch.no_grad()
    def _write(self, name: str, value: Tensor) -> None:
        self._make_views()
        target = super().__getitem__(name)
        if name == _MASTER:
            self._param.kept_master = None
        if name == _MASTER and value.dtype != target.dtype:
            parameter = local.own_elements(self._param, self._param.local.detach())
            write_master_(self._param, value, state=local.local_state(self._param), parameter=parameter)
        else:
            target.copy_(value)
        if name == AVERAGE:
            super().__getitem__("n_averaged").clamp_(min=1)  # else the next average would copy the weight


class OptimizerState(defaultdict[Tensor, Any]):
    """``optimizer.state``: a ``ParamState`` for each trainable parameter; no write removes or replaces it.

    Args:
        add_unfrozen_params: weak reference to the optimizer's method.
    """

    def __init__(self, add_unfrozen_params: Callable[[], Callable[[], None] | None]) -> None:
        super().__init__(dict)
        self._add_unfrozen_params = add_unfrozen_params

    def __bool__(self) -> bool:
        """True, even without entries: torch's get_optimizer_state_dict would add them by a step with zero gradients.

        It and set_optimizer_state_dict ask for this before they look for entries. A flattened dict is loaded by the
        names of those that are there. So this is collective if parameters were unfrozen since the last step.
        """
        add = self._add_unfrozen_params()
        if add is not None:
            add()
        return True

    def take_replaced(self) -> None:
        """Calls ``ParamState.take_replaced`` of all parameters."""
        for entry in self.values():
            if isinstance(entry, ParamState) and entry.addresses is not None:
                entry.take_replaced()

    def bind(self, params: Iterable[ShardedParam]) -> None:
        """Gives parameters that have become trainable their state: what users assigned while they were frozen.

        Raises:
            ValueError: what they assigned does not fit.
        """
        given = [(param, self.get(param.parameter)) for param in params]
        names = {arena: dict.fromkeys(local.state_names(arena)) for arena in {param.arena: None for param, _ in given}}
        for param, _ in given:
            super().__setitem__(param.parameter, ParamState(param, names[param.arena]))
        for param, entry in given:
            if entry:
                self[param.parameter].replace(entry)

    def replace(self, entries: Mapping[Tensor, Any]) -> None:
        """Implements ``optimizer.state = entries``: parameters that are not in it restart."""
        for parameter in [*self]:
            if parameter not in entries:
                del self[parameter]
        for parameter, entry in entries.items():
            self[parameter] = entry

    def __setitem__(self, parameter: Tensor, entry: Any) -> None:
        bound = self.get(parameter)
        if not isinstance(bound, ParamState):
            super().__setitem__(parameter, entry)
        elif bound is not entry:
            bound.replace(entry)

    def __delitem__(self, parameter: Tensor) -> None:
        bound = self.get(parameter)
        if isinstance(bound, ParamState):
            bound.clear()
        else:
            super().__delitem__(parameter)

    def clear(self) -> None:
        self.replace({})

    def pop(self, parameter: Tensor, *default: Any) -> Any:
        if parameter not in self and default:
            return default[0]
        entry = self[parameter]
        taken = {name: tensor.clone() for name, tensor in entry.items()} if isinstance(entry, ParamState) else entry
        del self[parameter]
        return taken

    def popitem(self) -> NoReturn:
        raise ValueError("optimizer.state: popitem() cannot remove trainable parameters. Call clear() to restart Adam.")

    def update(self, *others: Any, **named: Any) -> None:
        entries: Iterable[tuple[Any, Any]] = dict(*others, **named).items()
        for parameter, entry in entries:
            self[parameter] = entry

    def __ior__(self, other: Any) -> OptimizerState:  # type: ignore[override, misc]
        self.update(other)
        return self

    def setdefault(self, parameter: Tensor, default: Any = None) -> Any:
        if parameter not in self:
            self[parameter] = default
        return self[parameter]

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[Tensor, Any]:
        return deepcopy(dict(self), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ({parameter: dict(entry) for parameter, entry in self.items()},)
