# SPDX-License-Identifier: Apache-2.0
"""Which rank writes what several ranks have, and one description of what all of them have together.

Data-parallel ranks have the same contents. With model parallelism, others have other names (pipeline stages, experts)
or other boxes of DTensors. Everything is written once: by the first rank that has it, or in turns by all that have it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from shardadam.checkpoint.contents import Contents
from shardadam.checkpoint.exchange import RankExchange
from shardadam.checkpoint.files import DISTINCT_NAMES, CheckpointError, described, digest
from shardadam.checkpoint.part import OtherTensor, Part, hyperparameters
from shardadam.transport.placement import placements_of

Listing = dict[str, Any]


def listing_of(contents: Contents, part: Part) -> Listing:
    """Returns what this rank has, as JSON."""
    groups = None if contents.optimizer is None else [_plain(group) for group in hyperparameters(contents)]
    listing = {
        "groups": contents.groups,
        "trained": [parameter.value_key for parameter in contents.owned],
        "aliases": contents.aliases,
        "objects": list(contents.objects),
        "others": [_entry(other) for other in part.others],
        "hyperparameters": groups,
    }
    found: Listing = json.loads(json.dumps(listing))  # as other ranks find it
    return found


def digest_of(listing: Listing) -> str:
    """Returns a digest that is equal on ranks that have the same parts of a model."""
    return digest({name: value for name, value in listing.items() if name != "hyperparameters"})


def _plain(group: Mapping[str, Any]) -> dict[str, str]:
    return {key: repr(value.tolist() if isinstance(value, Tensor) else value) for key, value in sorted(group.items())}


def share(exchange: RankExchange, contents: Contents, part: Part, listing: Listing, digests: Sequence[str]) -> None:
    """Adds to this rank's part its share of what several ranks have. Collective if not all digests are equal.

    Args:
        digests: of the listings of all ranks, in rank order.

    Raises:
        CheckpointError: ranks have different tensors of one name, or different param groups; on all ranks.
    """
    rank = exchange.store_barrier.rank
    ranks_of: dict[str, list[int]] = {}
    for position, found in enumerate(digests):
        ranks_of.setdefault(found, []).append(position)
    listings = [(listing, ranks_of[digests[rank]])]
    if len(ranks_of) > 1:
        with exchange.phase("contents") as phase:
            if ranks_of[digests[rank]][0] == rank:
                phase.value = listing
                if rank > 0:
                    part.describe(contents)
        listings = [(phase.values[ranks[0]], ranks) for ranks in ranks_of.values()]
        _check_groups(listings)
    owners = _owners_of_objects(listings)
    part.objects = {key: value for key, value in part.objects.items() if owners.get(key, rank) == rank}
    holders = _holders(listings)
    turns: Counter[tuple[int, ...]] = Counter()
    for other in part.others:
        ranks = tuple(sorted(holders[_identity(_entry(other))]))
        holds = other.is_parameter or rank == ranks[0]
        if holds and (other.box.numel > 0 or other.spec.numel == 0):
            part.boxes[other.key] = other.spec, other.box
        for start, stop in other.cuts():
            if rank == ranks[turns[ranks] % len(ranks) if other.is_parameter else 0]:
                part.add_other(other, start, stop)
            turns[ranks] += other.is_parameter
    part.others = []


def _entry(other: OtherTensor) -> tuple[Any, ...]:
    if not other.is_parameter and not placements_of(other.tensor):  # its shape may differ between ranks, too
        return other.key, "some buffer", (), (), ()
    return other.key, described(other.spec), other.box.offset, other.box.shape, other.box.runs


def _identity(entry: Sequence[Any]) -> str:
    """Returns the same text for equal entries, of this rank or from others."""
    return json.dumps(entry)


Listings = Sequence[tuple[Listing, Sequence[int]]]
"""Different listings, and the ranks that have each."""


def _holders(listings: Listings) -> dict[str, list[int]]:
    """Returns the ranks that hold each box; of a buffer that is no DTensor, those that have one of this name.

    Raises:
        CheckpointError: tensors of one name have different shapes or dtypes.
    """
    holders: dict[str, list[int]] = {}
    first: dict[str, tuple[str, int]] = {}
    for listing, ranks in listings:
        for entry in listing["others"]:
            key, spec = entry[:2]
            known, rank = first.setdefault(key, (spec, ranks[0]))
            if known != spec:
                raise CheckpointError(
                    f"{key}: found a tensor of {known} on rank {rank} and of {spec} on rank {ranks[0]}, expected the "
                    f"same. {DISTINCT_NAMES}"
                )
            holders.setdefault(_identity(entry), []).extend(ranks)
    return holders


def _owners_of_objects(listings: Listings) -> dict[str, int]:
    """Returns the rank that writes each of the model's objects: the first that has it."""
    owners: dict[str, int] = {}
    for listing, ranks in listings:
        for key in listing["objects"]:
            owners[key] = min(ranks[0], owners.get(key, ranks[0]))
    return owners


def _check_groups(listings: Listings) -> None:
    """Raises CheckpointError unless all ranks have the same hyperparameters: a checkpoint has one list of groups."""
    (expected, first), *others = [(listing["hyperparameters"], ranks[0]) for listing, ranks in listings]
    for found, rank in others:
        if found == expected:
            continue
        if found is None or expected is None:
            raise CheckpointError(f"Of ranks {first} and {rank}, only one saves an optimizer. Pass it on all ranks.")
        differing = [
            f"{name} of param group {index} is {one.get(name)} on rank {first} and {other.get(name)} on rank {rank}"
            for index, (one, other) in enumerate(zip(expected, found, strict=False))
            for name in sorted(one.keys() | other.keys())
            if one.get(name) != other.get(name)
        ] or [f"rank {first} has {len(expected)} param groups and rank {rank} {len(found)}"]
        raise CheckpointError(
            f"The param groups are not the same on all ranks: {differing[0]}. Build all optimizers with the same "
            "number of groups and the same hyperparameters; a group may be empty on some ranks."
        )


def merged_description(descriptions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what the manifest says of the whole checkpoint, from what ranks say of their parts, in rank order."""
    first = dict(descriptions[0])
    first["aliases"] = {alias: key for each in reversed(descriptions) for alias, key in each["aliases"].items()}
    optimizers = [each["optimizer"] for each in descriptions if "optimizer" in each]
    if len(optimizers) > 1:
        parameters: dict[str, dict[str, Any]] = {}
        for optimizer in optimizers:
            for name, scalars in optimizer["parameters"].items():
                if name not in parameters or scalars["step"] > parameters[name]["step"]:
                    parameters[name] = scalars
        first["optimizer"] = {
            **optimizers[0],
            "groups": [
                list(dict.fromkeys(name for names in group for name in names))
                for group in zip(*(optimizer["groups"] for optimizer in optimizers), strict=True)
            ],
            "masters": sorted({kind for optimizer in optimizers for kind in optimizer["masters"]}),
            "parameters": parameters,
        }
    return first
