# SPDX-License-Identifier: Apache-2.0
"""A directory of checkpoints: ``step-00000020`` and so on, and ``latest``, a file that lists them, newest first.

Note: publishing
    A checkpoint is written to ``.saving-NAME`` and then renamed to ``NAME``: one atomic operation, after everything is
    on the disk, manifest included. ``latest`` lists the new name, followed by the older ones, before the rename. So at
    every moment the first name in ``latest`` that exists is the newest checkpoint. To remove a checkpoint, it is
    renamed to ``.deleting-NAME`` first.
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
    """Returns the newest checkpoint in ``directory``, or ``directory`` itself if it is one.

    Raises:
        CheckpointError: there is none.
    """
    if (directory / MANIFEST).exists():
        return directory
    if not directory.is_dir():
        found = "not a directory" if directory.exists() else "no such directory"
        raise CheckpointError(f"{directory}: found {found}, expected a directory that shardadam.save wrote to.")
    history = [name for name in read_history(directory) if (directory / name).is_dir()]
    names = history or sorted((p.name for p in directory.iterdir() if _NAME.fullmatch(p.name)), key=_age, reverse=True)
    if names:
        return directory / names[0]
    if _NAME.fullmatch(directory.name):  # a checkpoint without its manifest; Reader explains
        return directory
    if (directory / ".metadata").exists():
        raise CheckpointError(
            f"{directory} was written by torch.distributed.checkpoint, not by shardadam.save. Load it with "
            "torch.distributed.checkpoint.load; its metadata is a pickle, so load it only if you trust who wrote it."
        )
    some = ", ".join(sorted(path.name for path in directory.iterdir())[:3]) or "nothing"
    raise CheckpointError(f"{directory} holds no checkpoint (found {some}), expected one that shardadam.save wrote.")


def has_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Returns whether ``load`` would find a checkpoint in ``directory``. Local."""
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
    """Returns the names in ``latest``, newest first; none if it is missing or damaged."""
    try:
        *names, checksum = (directory / LATEST).read_text().splitlines()
    except (OSError, ValueError):
        return []
    whole = checksum == _checksum(names) and all(_NAME.fullmatch(name) for name in names)
    return names if whole else []


def _checksum(names: list[str]) -> str:
    return f"crc32 {zlib.crc32(chr(10).join(names).encode()):08x}"


def create_unpublished(directory: Path, step: int) -> str:
    """Creates an empty, unpublished checkpoint; removes what crashed saves left behind.

    Returns:
        Its name, which no other checkpoint has.
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
    """Returns where a checkpoint lies until it is published."""
    return directory / (_SAVING + name)


def discard_unpublished(directory: Path, name: str) -> None:
    shutil.rmtree(unpublished_path(directory, name), ignore_errors=True)


def publish(directory: Path, name: str) -> None:
    """Publishes a checkpoint; see the note on publishing."""
    history = [older for older in read_history(directory) if (directory / older).is_dir()]
    unlisted = [p.name for p in directory.iterdir() if _NAME.fullmatch(p.name) and p.name not in history]
    history = history or sorted(unlisted, key=_age, reverse=True)
    listed = [name, *history]
    sync_directory(unpublished_path(directory, name))
    write_durably(directory / LATEST, "\n".join([*listed, _checksum(listed)]) + "\n")
    os.rename(unpublished_path(directory, name), directory / name)
    sync_directory(directory)


def remove_older(directory: Path, keep: int) -> None:
    """Removes the checkpoints that ``latest`` lists, except the ``keep`` newest."""
    existing = [name for name in read_history(directory) if (directory / name).is_dir()]
    for older in existing[keep:]:
        os.rename(directory / older, directory / (_DELETING + older))
        _remove(directory / (_DELETING + older))


def _remove(path: Path) -> None:
    """Removes a directory, or a link to one: users move checkpoints elsewhere and leave links."""
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
