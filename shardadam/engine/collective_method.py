# SPDX-License-Identifier: Apache-2.0
"""Marks methods that all ranks must call."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from shardadam.engine.step import StepEngine
from shardadam.ranks import desync
from shardadam.ranks.signals import defer_signals


class _Optimizer(Protocol):
    _is_built: bool
    _engine: StepEngine


_S = TypeVar("_S", bound=_Optimizer)
_P = ParamSpec("_P")
_R = TypeVar("_R")


def collective(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """Make desync reports name the method while it runs, and defer signals until it is complete.

    If a second signal interrupts the call, the optimizer refuses to step until a checkpoint is loaded.
    """

    @wraps(method)
    def call(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with desync.in_call(method.__name__, self), defer_signals():
            try:
                return method(self, *args, **kwargs)
            except Exception:
                raise
            except BaseException as error:
                if self._is_built:
                    self._engine.poison.reason = f"{method.__name__}() did not complete ({type(error).__name__})"
                    self._engine.parameters.abort()
                raise

    return call
