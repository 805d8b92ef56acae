# SPDX-License-Identifier: Apache-2.0
"""A tensor stored as boxes of any tiling is read into the boxes of any other, bit for bit; nothing else is read."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from torch import Tensor

from shardadam import CheckpointError
from shardadam.checkpoint import DcpReader, files
from shardadam.checkpoint.boxes import BoxSpec, Region, Run, check_tiling, whole_box
from shardadam.checkpoint.contents import random_state
from shardadam.checkpoint.export import export
from shardadam.checkpoint.files import MANIFEST, PartWriter, TensorSpec, index_to_json, manifest_text, merge
from shardadam.checkpoint.objects import safely_pickled
from shardadam.checkpoint.reader import Reader
from shardadam.checkpoint.schema import index_from_json, random_state_key
from shardadam.checkpoint.values import Values
from shardadam.layout import ALIGNMENT_NUMEL
from tests.test_checkpoint_safety import rewrite_manifest
from tests.test_checkpoint_schema import mutations

# Tilings


@st.composite
def tilings(draw: Any, shape: tuple[int, ...], cuts: int) -> list[Region]:
    """Cuts the whole, and then some of the boxes, at random."""
    regions = [Region((0,) * len(shape), shape)]
    for _ in range(cuts):
        region = regions.pop(draw(st.integers(0, len(regions) - 1)))
        wide = [dim for dim, size in enumerate(region.shape) if size > 1]
        if not wide:
            regions.append(region)
            continue
        dim = draw(st.sampled_from(wide))
        at = draw(st.integers(1, region.shape[dim] - 1))
        for begin, size in ((0, at), (at, region.shape[dim] - at)):
            offset, cut = list(region.offset), list(region.shape)
            offset[dim], cut[dim] = offset[dim] + begin, size
            regions.append(Region(tuple(offset), tuple(cut)))
    return regions


@st.composite
def box_specs(draw: Any, shape: tuple[int, ...]) -> list[BoxSpec]:
    """A tiling whose boxes have any order of dimensions each; or several boxes side by side in the memory of each."""
    if draw(st.booleans()):
        of_dims = [draw(runs_of_ranks(size)) for size in shape]
        return [with_runs(runs, draw(st.permutations(range(len(shape))))) for runs in itertools.product(*of_dims)]
    regions = draw(tilings(shape, draw(st.integers(0, 6))))
    return [BoxSpec(*region, tuple(draw(st.permutations(range(len(shape)))))) for region in regions]


@st.composite
def runs_of_ranks(draw: Any, size: int) -> list[tuple[tuple[int, int], ...]]:
    """Cuts a dimension; each of up to three ranks has some of the pieces, in any order."""
    ends = sorted(draw(st.sets(st.integers(0, size), max_size=4)) | {0, size})
    pieces = [(start, stop - start) for start, stop in pairwise(ends)]
    owners = [draw(st.integers(0, 2)) for _ in pieces]
    shares = [[piece for piece, owner in zip(pieces, owners, strict=True) if owner == rank] for rank in range(3)]
    return [tuple(draw(st.permutations(share))) for share in shares if share]


def with_runs(runs: Any, order: Any) -> BoxSpec:
    offset, shape = tuple(one[0][0] for one in runs), tuple(sum(length for _, length in one) for one in runs)
    is_box = all(len(one) == 1 for one in runs)
    return BoxSpec(offset, shape, tuple(order), () if is_box else tuple(runs))


shapes = st.lists(st.integers(1, 7), max_size=4).map(tuple)


def grown(region: Region, dim: int, by: int) -> Region:
    shape = list(region.shape)
    shape[dim] += by
    return Region(region.offset, tuple(shape))


@given(shapes, st.data())
def test_every_tiling_is_one_and_nothing_else_is(shape: tuple[int, ...], data: st.DataObject) -> None:
    regions = data.draw(tilings(shape, data.draw(st.integers(0, 6))))
    check_tiling(shape, regions)
    number = data.draw(st.integers(0, len(regions) - 1))
    broken = [*regions[:number], *regions[number + 1 :]]
    change = data.draw(st.sampled_from(["lost", "twice", "moved", "larger"] if shape else ["lost", "twice"]))
    if change == "twice":
        broken = [*regions, regions[number]]
    elif change in ("moved", "larger"):
        dim = data.draw(st.integers(0, len(shape) - 1))
        offset = list(regions[number].offset)
        offset[dim] += data.draw(st.sampled_from([-1, 1]))
        moved = Region(tuple(offset), regions[number].shape)
        broken.append(moved if change == "moved" else grown(regions[number], dim, 1))
    with pytest.raises(ValueError, match="found"):
        check_tiling(shape, broken)


def test_tilings_need_not_be_made_by_cuts() -> None:
    wheel = [Region((0, 0), (1, 2)), Region((0, 2), (2, 1)), Region((2, 1), (1, 2)), Region((1, 0), (2, 1))]
    check_tiling((3, 3), [*wheel, Region((1, 1), (1, 1))])
    with pytest.raises(ValueError, match="each once"):
        check_tiling((3, 3), wheel)


def test_gaps_that_overlaps_make_up_for_are_found() -> None:
    with pytest.raises(ValueError, match=r"found the boxes \[0:2\] and \[1:3\]"):
        check_tiling((4,), [Region((0,), (2,)), Region((1,), (2,))])


# Reading any boxes from any others


@cache
def a_random_state() -> bytes:
    return safely_pickled(random_state_key(0), random_state(), groups=0)


@contextmanager
def stored(
    tensors: dict[str, tuple[TensorSpec, list[tuple[BoxSpec, Tensor]]]], *, ranks: int = 3, item_bytes: int = 64
) -> Any:
    """A checkpoint of boxes, given in memory order, each of which two ranks write in two parts."""
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "ITEM_BYTES", item_bytes)
        directory = Path(name)
        writers = [PartWriter(directory, rank) for rank in range(ranks)]
        turn = 0
        for key, (spec, boxes) in tensors.items():
            for box, flat in boxes:
                per = item_bytes // spec.dtype.itemsize
                middle = flat.numel() // per // 2 * per
                for start, stop in ((middle, flat.numel()), (0, middle)):
                    turn += 1
                    if stop > start or flat.numel() == 0:
                        writers[turn % ranks].write(key, spec, box, start, flat[start:stop])
        for rank, writer in enumerate(writers):
            key = random_state_key(rank)
            writer.write_object(key, a_random_state())
        indices = [json.loads(json.dumps(index_to_json(writer.close()))) for writer in writers]
        index = merge([index_from_json(index) for index in indices])
        content = {"step": 1, "world_size": ranks, "shardadam": "1", "torch": "2", "aliases": {}}
        content |= {"extras": [None] * ranks, "index": index_to_json(index)}
        (directory / MANIFEST).write_text(manifest_text(content))
        yield directory


def values_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    numel = math.prod(shape)
    return torch.arange(1, numel + 1).to(dtype).view(shape)


def in_memory(whole: Tensor, box: BoxSpec) -> Tensor:
    """The elements of the box in its memory order."""
    for dim, runs in enumerate(box.all_runs):
        whole = torch.cat([whole.narrow(dim, at, length) for at, length in runs], dim)
    return whole.permute(box.order).reshape(-1)


@settings(deadline=None, max_examples=40)
@given(shapes, st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]), st.data())
def test_any_boxes_are_read_from_any_others(shape: tuple[int, ...], dtype: torch.dtype, data: st.DataObject) -> None:
    whole = values_of(shape, dtype)
    order = tuple(data.draw(st.permutations(range(len(shape)))))
    boxes = [(box, in_memory(whole, box)) for box in data.draw(box_specs(shape))]
    with stored({"model.x": (TensorSpec(dtype, shape, order), boxes)}) as directory:
        with Reader(directory) as reader:
            for box in data.draw(box_specs(shape)):
                expected = in_memory(whole, box)
                ends = sorted(data.draw(st.sets(st.integers(0, box.numel), max_size=3)) | {0, box.numel})
                for start, stop in pairwise(ends):
                    found = torch.zeros(stop - start, dtype=dtype)
                    reader.read_("model.x", box, start, found)
                    assert torch.equal(found, expected[start:stop])
            expected = in_memory(whole, whole_box(shape, order))
            assert torch.equal(torch.cat(list(Values(reader).chunks("model.x"))), expected)
        into = {"model": {"x": torch.zeros(shape, dtype=dtype)}}
        dcp.load(into, storage_reader=DcpReader(directory), no_dist=True)
        assert torch.equal(into["model"]["x"], whole)
        (path,) = export(directory, format="torch", output=directory / "exported")
        exported = torch.load(path, weights_only=True)["x"]
        assert torch.equal(exported, whole)
        assert exported.permute(order).is_contiguous()


def test_a_plain_tensor_needs_no_description_of_its_box() -> None:
    whole = values_of((3, 5), torch.float32)
    spec, box = TensorSpec(torch.float32, (3, 5), (0, 1)), whole_box((3, 5), (0, 1))
    with stored({"model.x": (spec, [(box, whole.view(-1))])}) as directory:
        manifest = json.loads((directory / MANIFEST).read_text())
    entry = manifest["content"]["index"]["tensors"]["model.x"]
    assert entry.keys() == {"dtype", "shape", "order", "items"}


def test_only_items_with_needed_elements_are_read() -> None:
    whole = values_of((64, 64), torch.float32)
    columns = [BoxSpec((0, at), (64, 32), (0, 1)) for at in (0, 32)]
    spec = TensorSpec(torch.float32, (64, 64), (0, 1))
    with stored({"model.x": (spec, [(box, in_memory(whole, box)) for box in columns])}, item_bytes=128) as directory:
        with Reader(directory) as reader:
            rows = BoxSpec((16, 0), (2, 64), (0, 1))
            reader.read_("model.x", rows, 0, torch.zeros(128))
            assert reader.bytes_read == 128 * 4
        with Reader(directory) as reader:
            column = BoxSpec((0, 40), (64, 1), (0, 1))
            reader.read_("model.x", column, 0, torch.zeros(64))
            assert reader.bytes_read == 64 * 128  # one item in each row of one box


def test_runs_of_one_box_copy_what_both_have() -> None:
    box = whole_box((4, 6), (1, 0))
    one, other = torch.zeros(10), torch.arange(24.0)
    Run(box, 7, one).copy_(Run(box, 5, other[5:15]))
    assert one.tolist() == [*range(7, 15), 0, 0]


# What is refused


def two_halves() -> dict[str, Any]:
    whole = values_of((4, 6), torch.float32)
    halves = [BoxSpec((0, at), (4, 3), (0, 1)) for at in (0, 3)]
    spec = TensorSpec(torch.float32, (4, 6), (0, 1))
    return {"model.x": (spec, [(box, in_memory(whole, box)) for box in halves])}


Tensors = dict[str, Any]
WRONG: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "a gap": (lambda t: t["model.x"]["boxes"].pop(0), "1 boxes of 12 elements, expected all of shape"),
    "an overlap": (lambda t: t["model.x"]["boxes"][1].update(offset=[0, 2]), "expected none that overlap"),
    "outside": (lambda t: t["model.x"]["boxes"][1].update(offset=[1, 3]), "expected one inside the shape"),
    "another order": (lambda t: t["model.x"]["boxes"].reverse(), "found boxes in another order"),
    "no boxes": (lambda t: t["model.x"].update(boxes=[]), "0 boxes of 0 elements"),
    "a box without elements": (
        lambda t: t["model.x"]["boxes"].insert(0, {"offset": [0, 0], "shape": [0, 6], "order": [0, 1], "items": []}),
        "without elements",
    ),
    "too few dimensions": (lambda t: t["model.x"]["boxes"][1].update(offset=[0]), "expected 2 numbers"),
    "an order of others": (lambda t: t["model.x"]["boxes"][1].update(order=[0, 2]), "in the order of dimensions"),
    "runs of another length": (
        lambda t: t["model.x"]["boxes"][1].update(runs=[[[0, 4]], [[3, 1], [5, 1]]]),
        "found runs",
    ),
    "runs elsewhere": (lambda t: t["model.x"]["boxes"][1].update(runs=[[[0, 4]], [[4, 2], [3, 1]]]), "found runs"),
    "runs over others": (
        lambda t: t["model.x"]["boxes"][1].update(runs=[[[0, 4]], [[3, 2], [2, 1]]]),
        "expected none that overlap",
    ),
    "blocks": (lambda t: t["model.x"].update(block_numel=2), "found blocks of 2 elements"),
    "items twice": (
        lambda t: t["model.x"]["boxes"][1].update(items=t["model.x"]["boxes"][0]["items"]),
        "lies over something else",
    ),
    "too few items": (lambda t: t["model.x"]["boxes"][1]["items"].pop(), "found items up to element"),
}


@pytest.mark.parametrize("how", WRONG)
def test_boxes_that_are_no_tiling_are_refused(how: str) -> None:
    change, words = WRONG[how]
    with stored(two_halves(), item_bytes=16) as directory:
        Reader(directory).close()
        rewrite_manifest(directory, lambda content: change(content["index"]["tensors"]))
        with pytest.raises(CheckpointError, match="is damaged") as error:
            Reader(directory)
    assert words in str(error.value)


def strided_halves() -> dict[str, Any]:
    whole = values_of((4, 6), torch.float32)
    halves = [with_runs([((0, 4),), runs], (0, 1)) for runs in (((0, 2), (3, 1)), ((2, 1), (4, 2)))]
    spec = TensorSpec(torch.float32, (4, 6), (0, 1))
    return {"model.x": (spec, [(box, in_memory(whole, box)) for box in halves])}


@pytest.mark.parametrize("tensors", [two_halves, strided_halves])
def test_any_wrong_value_of_boxes_is_refused_or_harmless(tensors: Callable[[], Any]) -> None:
    expected = values_of((4, 6), torch.float32)
    with stored(tensors(), item_bytes=16) as directory:
        content = json.loads((directory / MANIFEST).read_text())["content"]
        refused = harmless = 0
        cases = mutations(content["index"]["tensors"])
        for what, change in random.Random(0).sample(cases, 300):
            changed = copy.deepcopy(content)
            change(changed["index"]["tensors"])
            try:
                (directory / MANIFEST).write_text(manifest_text(changed))
                with Reader(directory) as reader:
                    found = {key: torch.cat(list(Values(reader).chunks(key))) for key in reader.index.tensors}
            except RecursionError:  # it cannot be written
                continue
            except CheckpointError as error:
                assert str(directory) in str(error) and len(str(error)) < 2000, what
                refused += 1
                continue
            harmless += 1
            assert all(torch.equal(value.view(-1), expected.view(-1)) for value in found.values()), what
        assert refused > 200 and harmless < 60, (refused, harmless)


def test_boxes_cut_in_many_dimensions_are_refused() -> None:
    """The check that they tile the tensor would take long."""
    with pytest.raises(ValueError, match="cut in 30 dimensions"):
        check_tiling((2,) * 30, [Region((0,) * 30, (1,) * 30)])


def written(*boxes: tuple[int, TensorSpec, BoxSpec]) -> str:
    """Each rank writes a box; return the error of merging."""
    with TemporaryDirectory() as directory:
        writers = [PartWriter(Path(directory), rank) for rank in range(3)]
        for rank, spec, box in boxes:
            writers[rank].write("model.0.weight", spec, box, 0, torch.zeros(box.numel))
        with pytest.raises(CheckpointError) as error:
            merge([writer.close() for writer in writers])
    return str(error.value)


def test_two_ranks_that_write_different_things_under_one_name_are_named() -> None:
    small, large = (TensorSpec(torch.float32, (2, size), (0, 1)) for size in (3, 4))
    found = written((0, small, whole_box((2, 3), (0, 1))), (2, large, whole_box((2, 4), (0, 1))))
    assert "model.0.weight: found a tensor of shape (2, 3) and dtype float32 on rank 0 and of shape (2, 4)" in found
    assert "on rank 2, expected the same" in found and "names in the whole model" in found
    for other in (whole_box((2, 3), (0, 1)), whole_box((2, 3), (1, 0)), BoxSpec((1, 0), (1, 3), (0, 1))):
        found = written((0, small, whole_box((2, 3), (0, 1))), (2, small, other))
        assert "written by ranks [0, 2]" in found and "names in the whole model" in found


# Scales belong to the blocks of a box


def test_scales_of_boxes_follow_each_other_in_one_dimension() -> None:
    boxes = [BoxSpec((0, at), (100, size), (0, 1)) for at, size in ((0, 3), (3, 5))]
    spec = TensorSpec(torch.float32, (100, 8), (0, 1), block_numel=ALIGNMENT_NUMEL)
    counts = [-(-box.numel // ALIGNMENT_NUMEL) for box in boxes]
    parts = [
        (box, torch.arange(float(count)) + 10 * i) for i, (box, count) in enumerate(zip(boxes, counts, strict=True))
    ]
    with stored({"model.x": (spec, parts[::-1])}, item_bytes=8) as directory, Reader(directory) as reader:
        tensor = reader.index.tensors["model.x"]
        assert tensor.spec == TensorSpec(torch.float32, (sum(counts),), (0,))
        assert torch.equal(torch.cat(list(Values(reader).chunks("model.x"))), torch.cat([flat for _, flat in parts]))
