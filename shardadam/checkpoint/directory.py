# SPDX-License-Identifier: Apache-2.0
"""A directory of checkpoints: ``step-00000020`` and so on, and ``latest``, which lists them, newest first.

Note: publishing
    A checkpoint is written to ``.saving-NAME``. To publish it is to rename that to ``NAME``: one atomic operation after
    everything, manifest included, is on the disk. ``latest`` names the new one already before, and the one it
    follows after it: of the names in it, the first that exists is the newest checkpoint, at every moment.
    Checkpoints are removed the other way round: renamed out of sight first.
"""

from __future__ import annotations

import os
import re
import shutil
import zlib
from pathlib import Path

from shardadam.checkpoint.files import MANIFEST, CheckpointError, write_durably

LATEST = "latest"
_SAVING, _DELETING = ".saving-", ".deleting-"
_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")


def newest(directory: Path) -> Path:
    """The newest checkpoint in ``directory``, or ``directory`` itself where it is one.

    Raises:
        CheckpointError: there is none.
    """
    if (directory / MANIFEST).exists():
        return directory
    if not directory.is_dir():
        found = "not a directory" if directory.exists() else "no such directory"
        raise CheckpointError(f"{directory}: {found}. Expected one that shardadam.save has written to.")
    history = [name for name in read_history(directory) if (directory / name).is_dir()]
    names = history or sorted((p.name for p in directory.iterdir() if _NAME.fullmatch(p.name)), key=_age, reverse=True)
    if names:
        return directory / names[0]
    if _NAME.fullmatch(directory.name):  # one that lacks its manifest
        return directory
    if (directory / ".metadata").exists():
        raise CheckpointError(
            f"{directory} was written by torch.distributed.checkpoint, not by shardadam.save. Load it with "
            "torch.distributed.checkpoint.load; its metadata is a pickle, so load it only if you trust who wrote it."
        )
    some = ", ".join(sorted(path.name for path in directory.iterdir())[:3]) or "nothing"
    raise CheckpointError(f"{directory} holds no checkpoint (found {some}). Expected one written by shardadam.save.")


def has_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Whether ``load`` would find something in ``directory``."""
    try:
        newest(Path(directory))
    except CheckpointError:
        return False
    return True


def _age(name: str) -> tuple[int, int]:
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1]), int(match[2] or 1)


def read_history(directory: Path) -> list[str]:
    """The names in ``latest``, newest first; none where it is missing or damaged."""
    try:
        *names, checksum = (directory / LATEST).read_text().splitlines()
    except (OSError, ValueError):
        return []
    whole = checksum == _checksum(names) and all(_NAME.fullmatch(name) for name in names)
    return names if whole else []


def _checksum(names: list[str]) -> str:
    return f"crc32 {zlib.crc32(chr(10).join(names).encode()):08x}"


def create_unpublished(directory: Path, step: int) -> str:
    """Makes room for a new checkpoint and removes what crashed saves have left.

    Returns:
        Its name: another than those that are there.
    """
    if not directory.exists():
        directory.mkdir(parents=True, exist_ok=True)
        sync_directory(directory.parent)
    for path in directory.iterdir():
        if path.name.startswith((_SAVING, _DELETING)):
            _remove(path)
    (directory / f".{LATEST}.saving").unlink(missing_ok=True)
    name, count = f"step-{step:08d}", 1
    while (directory / name).exists():
        count += 1
        name = f"step-{step:08d}-{count}"
    unpublished_path(directory, name).mkdir()
    return name


def unpublished_path(directory: Path, name: str) -> Path:
    """Where a checkpoint lies until it is published."""
    return directory / (_SAVING + name)


def discard_unpublished(directory: Path, name: str) -> None:
    shutil.rmtree(unpublished_path(directory, name), ignore_errors=True)


def publish(directory: Path, name: str) -> None:
    """See the note on publishing."""
    history = [older for older in read_history(directory) if (directory / older).is_dir()]
    unlisted = [p.name for p in directory.iterdir() if _NAME.fullmatch(p.name) and p.name not in history]
    history = history or sorted(unlisted, key=_age, reverse=True)
    listed = [name, *history]
    sync_directory(unpublished_path(directory, name))
    write_durably(directory / LATEST, "\n".join([*listed, _checksum(listed)]) + "\n")
    os.rename(unpublished_path(directory, name), directory / name)
    sync_directory(directory)


def remove_older(directory: Path, keep: int) -> None:
    """Removes all checkpoints but the ``keep`` newest, of those that ``latest`` lists."""
    there = [name for name in read_history(directory) if (directory / name).is_dir()]
    for older in there[keep:]:
        os.rename(directory / older, directory / (_DELETING + older))
        _remove(directory / (_DELETING + older))


def _remove(path: Path) -> None:
    """A checkpoint may have been moved elsewhere, and a link left in its place."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
