# SPDX-License-Identifier: Apache-2.0
"""Bytes of text files, split into training and validation by file, and the windows that each rank reads.

The global batch of a step depends on the seed, the step and the files only, not on the optimizer, the number of ranks
or earlier steps. Ranks divide it, evenly or not.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

SEPARATOR = b"\0"  # before every file, and before generated text
VALIDATION_SHARE = 0.05
# Folders that are not the standard library's own code: tests, installed packages, tables (encodings, pydoc_data).
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}


class DataError(ValueError):
    """Unsuitable data; the message says what was found, what is expected and what to do."""


@dataclass(frozen=True)
class Corpus:
    """Training and validation bytes (uint8, on the CPU), and their source, for the log."""

    training: Tensor
    validation: Tensor
    source: str


def load(paths: Sequence[str], context: int) -> Corpus:
    """Reads `paths` (files, or directories with text files), or the standard library's sources if empty.

    Raises DataError where a path is missing or there is too little text for one window of `context` + 1 bytes.
    """
    files = list(user_files(paths) if paths else stdlib_files())
    source = " ".join(paths) if paths else f"the sources of {sysconfig.get_paths()['stdlib']}"
    if not files:
        raise DataError(f"Found no text in {source}. Give text files, or directories with some, with --data.")
    training, validation = split(files)
    for name, text in (("training", training), ("validation", validation)):
        if len(text) <= context:
            raise DataError(
                f"The {name} text of {source} has {len(text):,} bytes, and a window needs {context + 1:,} "
                f"(--context {context} and the byte that follows). Give more text, or a shorter --context."
            )
    return Corpus(as_tensor(training), as_tensor(validation), source)


def stdlib_files() -> Iterator[tuple[str, bytes]]:
    """(relative name, content) of the running Python's own modules, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for name, path in walk(root, skipped=SKIPPED):
        if path.suffix == ".py":
            yield name, path.read_bytes()


def user_files(paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """(relative name, content) of the given files, and of every visible text file under the given directories."""
    seen: set[Path] = set()
    for given in paths:
        root = Path(given)
        if not root.exists():
            raise DataError(f"--data {given}: no such file or directory (looked from {Path.cwd()}).")
        for name, path in [(root.name, root)] if root.is_file() else walk(root, skipped={"__pycache__"}):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            try:
                content = path.read_bytes()
            except OSError as error:
                raise DataError(f"--data {given}: {path} cannot be read ({error.strerror}).") from error
            if content and b"\0" not in content[:8192]:  # a zero byte near the start: not text
                yield name, content


def walk(root: Path, skipped: set[str]) -> Iterator[tuple[str, Path]]:
    """(name relative to root, with forward slashes; path) of every file under root, in equal order on all machines."""
    for directory, directories, files in os.walk(root):
        directories[:] = sorted(d for d in directories if d not in skipped and not d.startswith("."))
        for file in sorted(files):
            path = Path(directory, file)
            if not file.startswith(".") and path.is_file():
                yield path.relative_to(root).as_posix(), path


def split(files: Sequence[tuple[str, bytes]]) -> tuple[bytes, bytes]:
    """Training and validation text. A hash of a file's name decides, so that new files do not move the others.

    At least one file is for validation; with a single file, its end is.
    """
    if len(files) == 1:
        text = files[0][1]
        cut = len(text) - max(1, int(len(text) * VALIDATION_SHARE))
        return SEPARATOR + text[:cut], SEPARATOR + text[cut:]
    order = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 for name, _ in files}
    limit = max(VALIDATION_SHARE, min(order.values()))
    training = [text for name, text in files if order[name] > limit]
    validation = [text for name, text in files if order[name] <= limit]
    return SEPARATOR + SEPARATOR.join(training), SEPARATOR + SEPARATOR.join(validation)


def as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def windows(text: Tensor, starts: Tensor, context: int) -> Tensor:
    """(len(starts), context + 1) int64: the windows of `text` that begin at `starts`."""
    return text[starts[:, None] + torch.arange(context + 1)].long()


def training_starts(text: Tensor, *, step: int, batch: int, context: int, seed: int) -> Tensor:
    """(batch,) positions where the windows of a step's global batch begin, equal on any number of ranks."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(len(text) - context, (batch,), generator=generator)


def parts(batch: int, *, rank: int, world_size: int, micro_batch: int | None) -> list[slice]:
    """The windows of a global batch that this rank takes in each of its backward passes, at most `micro_batch` in one.

    All ranks have equally many passes. Parts differ by one window at most, and may be empty.
    """
    largest = -(-batch // world_size)
    passes = -(-largest // (micro_batch or largest))
    first, last = rank * batch // world_size, (rank + 1) * batch // world_size
    cuts = [first + i * (last - first) // passes for i in range(passes + 1)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]


def validation_starts(text: Tensor, *, count: int, context: int) -> Tensor:
    """(count,) positions, evenly spaced over the text, equal in every run."""
    return torch.linspace(0, len(text) - context - 1, count, dtype=torch.float64).long()
