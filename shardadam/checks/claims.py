# SPDX-License-Identifier: Apache-2.0
"""What ranks must have in common to train one model: hyperparameters, and names, shapes and formats of parameters.

Says it as ``Claim``s, which ``ranks/agreement.py`` compares. Local.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from torch import Tensor

from shardadam.engine.storage import NamedParameter
from shardadam.ranks.agreement import Claim, ManyClaims
from shardadam.transport import placement

AGREED_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay")


def of_groups(groups: Sequence[Mapping[str, Any]], *, first_group: int = 0, may_wait: bool = True) -> list[Claim]:
    """Return claims about param groups with all their hyperparameters.

    Args:
        first_group: the index of ``groups[0]`` in the optimizer's ``param_groups``.
        may_wait: whether to read a learning rate that is a tensor on a device, which waits for the device. If False,
            only its device type is compared.
    """
    result: list[Claim] = []
    for index, group in enumerate(groups, first_group):
        for field in AGREED_HYPERPARAMETERS:
            value = group[field]
            if isinstance(value, Tensor):
                may_read = value.numel() == 1 and (may_wait or value.device.type == "cpu")
                value = value.item() if may_read else (tuple(value.shape), value.device.type)
            result.append(Claim(f"param group {index}", field, repr(value)))
        result.append(Claim(f"param group {index}", "number of parameters", str(len(group["params"]))))
    return result


def of_parameters(
    parameters: Sequence[NamedParameter], *, unnamed: Set[int] = frozenset(), elsewhere: Set[int] = frozenset()
) -> ManyClaims:
    """Return claims about parameters whose layout is to be computed.

    Args:
        unnamed: the ``param_id`` of parameters (experts) that may have other names on other ranks.
        elsewhere: of those of which each rank holds another part (``fully_shard``).
    """

    def spelled_out() -> list[Claim]:
        return [
            claim
            for position, named in enumerate(parameters)
            for claim in _of_parameter(position, named, named.param_id in unnamed, named.param_id in elsewhere)
        ]

    def values() -> list[object]:
        return [_values(named, named.param_id in unnamed, named.param_id in elsewhere) for named in parameters]

    return ManyClaims(values, spelled_out)


def _of_parameter(position: int, named: NamedParameter, is_unnamed: bool, is_elsewhere: bool) -> Iterator[Claim]:
    parameter, local = named.parameter, named.local
    subject = f"parameter {position}" if is_unnamed else f"parameter {named.name!r}"
    if not is_unnamed:
        yield Claim(f"the name of parameter {position}", "", repr(named.name), is_name=True)
        if placement.mesh_of(parameter) is not None:
            yield Claim(subject, "placements", str(tuple(placement.placements_of(parameter))))
            if not is_elsewhere:
                yield Claim(subject, "part", placement.part_of(parameter))
    yield Claim(subject, "dtype", str(parameter.dtype))
    if is_elsewhere:
        yield Claim(subject, "shape", str(tuple(parameter.shape)))
    else:
        yield Claim(subject, "shape", str(tuple(local.shape)))
        yield Claim(subject, "strides", str(tuple(local.stride())))
    yield Claim(subject, "device type", parameter.device.type)
    yield Claim(subject, "requires_grad", str(parameter.requires_grad))


def _values(named: NamedParameter, is_unnamed: bool, is_elsewhere: bool) -> object:
    """Return what ``_of_parameter`` says, in a tuple."""
    parameter = named.parameter
    name = None if is_unnamed else named.name
    placed: tuple[object, ...] = ()
    if not is_unnamed and placement.mesh_of(parameter) is not None:
        placed = (placement.placements_of(parameter), None if is_elsewhere else placement.part_of(parameter))
    local = parameter if is_elsewhere else named.local
    strides = None if is_elsewhere else local.stride()
    return name, placed, parameter.dtype, tuple(local.shape), strides, parameter.device.type, parameter.requires_grad
