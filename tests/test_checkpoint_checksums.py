# SPDX-License-Identifier: Apache-2.0
"""Checksums of items: what they are, that damage changes them, and that checkpoints with the earlier ones are read."""

from __future__ import annotations

import json
import os
import random
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shardadam
from shardadam import CheckpointError
from shardadam.checkpoint.checksums import CHUNK_BYTES, ROW_BYTES, sums_checksum
from shardadam.checkpoint.files import MANIFEST, digest
from shardadam.layout import ITEM_BYTES
from tests.runs import build, differences

LENGTHS = (1, 7, 8, 9, ROW_BYTES - 1, ROW_BYTES, ROW_BYTES + 1, CHUNK_BYTES - 8, CHUNK_BYTES, CHUNK_BYTES + 3, 700_001)


def random_bytes(nbytes: int) -> bytes:
    return random.Random(nbytes).randbytes(nbytes)


def by_definition(content: bytes) -> int:
    """As "Note: sums of rows and columns" says, with Python's integers."""
    padded = content + bytes(-len(content) % ROW_BYTES)
    words = [int.from_bytes(padded[at : at + 8], "little") for at in range(0, len(padded), 8)]
    rows = [words[at : at + 512] for at in range(0, len(words), 512)]
    sums = [sum(column) for column in zip(*rows, strict=True)] + [sum(row) for row in rows]
    return zlib.crc32(b"".join((value % 2**64).to_bytes(8, "little") for value in sums))


@pytest.mark.parametrize("nbytes", LENGTHS)
def test_is_the_crc_of_sums(nbytes: int) -> None:
    content = random_bytes(nbytes)
    assert sums_checksum(memoryview(content)) == by_definition(content)


@pytest.mark.parametrize("misaligned_by", (1, 4))
def test_does_not_depend_on_where_the_bytes_lie(misaligned_by: int) -> None:
    content = random_bytes(CHUNK_BYTES + 100)
    moved = memoryview(bytes(misaligned_by) + content)[misaligned_by:]
    assert sums_checksum(moved) == sums_checksum(memoryview(content))


def swapped(content: bytes, one: int, other: int, nbytes: int) -> bytes:
    found = bytearray(content)
    found[one : one + nbytes], found[other : other + nbytes] = (
        content[other : other + nbytes],
        content[one : one + nbytes],
    )
    return bytes(found)


def test_damage_changes_it() -> None:
    content = random_bytes(3 * CHUNK_BYTES // 2 + 5)
    expected, chance = sums_checksum(memoryview(content)), random.Random(0)
    damaged = {
        "rows swapped": swapped(content, 0, 5 * ROW_BYTES, ROW_BYTES),
        "rows of two chunks swapped": swapped(content, ROW_BYTES, CHUNK_BYTES, ROW_BYTES),
        "columns swapped": b"".join(
            swapped(content[at : at + ROW_BYTES], 0, 8, 8) for at in range(0, len(content), ROW_BYTES)
        ),
        "words of a row swapped": swapped(content, 64, 128, 8),
        "a row is zeros": content[:ROW_BYTES] + bytes(ROW_BYTES) + content[2 * ROW_BYTES :],
        "a row is repeated": content[:ROW_BYTES] + content[:ROW_BYTES] + content[2 * ROW_BYTES :],
        "all shifted by a row": content[ROW_BYTES:] + content[:ROW_BYTES],
        "all shifted by a word": content[8:] + content[:8],
    }
    for _ in range(300):
        at, bit = chance.randrange(len(content)), 1 << chance.randrange(8)
        damaged[f"bit {bit} of byte {at}"] = content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
    for what, found in damaged.items():
        assert len(found) == len(content) and sums_checksum(memoryview(found)) != expected, what


# In checkpoints


def in_version_3(checkpoint: Path) -> None:
    """Replaces the checksums of items by those that versions 1 to 3 of the format have."""
    content = json.loads((checkpoint / MANIFEST).read_text())["content"]
    names = [name for name, _ in content["index"]["files"]]
    stored = [(checkpoint / name).read_bytes() for name in names]
    for tensor in content["index"]["tensors"].values():
        nbytes = getattr(torch, tensor["dtype"]).itemsize
        for item in tensor["items"]:
            _, numel, file, offset, _ = item
            item[4] = zlib.crc32(stored[file][offset : offset + numel * nbytes])
    manifest = {"format": "shardadam checkpoint", "version": 3, "sha256": digest(content), "content": content}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("version", (3, 4))
def test_both_are_read_and_find_damage(tmp_path: Path, version: int) -> None:
    run = build()
    run.train(range(2))
    path = shardadam.save(tmp_path, step=2, model=run.model, optimizer=run.optimizer)
    assert json.loads((path / MANIFEST).read_text())["version"] == 4
    if version == 3:
        in_version_3(path)
    expected, other = run.everything(), build()
    shardadam.load(tmp_path, model=other.model, optimizer=other.optimizer)
    assert differences(expected, other.everything()) == []
    name = path / "rank-00000.bin"
    stored = bytearray(name.read_bytes())
    stored[40] ^= 1
    name.write_bytes(stored)
    with pytest.raises(CheckpointError, match=r"rank-00000.bin is damaged: .* do not match their checksum"):
        shardadam.load(tmp_path, model=other.model, optimizer=other.optimizer)


class WithLargeObject(nn.Linear):
    def __init__(self, seed: int) -> None:
        super().__init__(1300, 1201)
        self.object = torch.randint(256, (ITEM_BYTES + 5,), generator=torch.Generator().manual_seed(seed))

    def get_extra_state(self) -> Tensor:
        return self.object

    def set_extra_state(self, state: Tensor) -> None:
        self.object = state


def test_reads_that_return_less_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items and objects are longer than a chunk, objects longer than a call."""
    saved, model = WithLargeObject(1), WithLargeObject(2)
    shardadam.save(tmp_path, step=1, model=saved)
    whole, counts = os.preadv, random.Random(0)

    def some(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return whole(descriptor, [buffers[0][: counts.randrange(1, 100_000)]], offset)

    monkeypatch.setattr(os, "preadv", some)
    shardadam.load(tmp_path, model=model)
    assert torch.equal(model.weight, saved.weight) and torch.equal(model.object, saved.object)
