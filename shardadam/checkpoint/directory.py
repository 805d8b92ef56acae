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
from contextlib import suppress
from itertools import islice
from pathlib import Path

from shardadam.checkpoint.files import MANIFEST, CheckpointError, read_regular, write_durably

LATEST = "latest"
_SAVING, _DELETING = ".saving-", ".deleting-"
_NAME = re.compile(r"step-([0-9]{8,})(?:-([0-9]+))?")
_MAX_LATEST_BYTES = 64 * 2**20
_MAX_SEARCHED = 1000


def newest(directory: Path) -> Path:
    """Returns the newest checkpoint in ``directory``, or ``directory`` itself if it is one.

    Raises:
        CheckpointError: there is none, or the directory cannot be read.
    """
    try:
        found = _newest(directory)
        if found is not None:
            return found
        raise CheckpointError(_why_none(directory))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}.") from error


def has_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Returns whether ``load`` would find a checkpoint in ``directory``. Local.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    try:
        return _newest(Path(directory)) is not None
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}.") from error


def _newest(directory: Path) -> Path | None:
    if (directory / MANIFEST).exists():
        return directory
    if not directory.is_dir():
        return None
    history = [name for name in read_history(directory) if (directory / name).is_dir()]
    names = history or sorted((p.name for p in directory.iterdir() if _NAME.fullmatch(p.name)), key=_age, reverse=True)
    if names:
        return directory / names[0]
    # A checkpoint without its manifest; Reader explains.
    return directory if _NAME.fullmatch(directory.name) else None


def _why_none(directory: Path) -> str:
    if not directory.is_dir():
        found = "not a directory" if directory.exists() else "no such directory"
        return f"{directory}: found {found}, expected a directory that shardadam.save wrote to."
    below = sorted(_checkpoints_below(directory), key=lambda path: path.stat().st_mtime, reverse=True)
    if below:
        more = f", the newest of {len(below)}" if len(below) > 1 else ""
        return (
            f"{directory} holds no checkpoint itself, but there is one in {below[0]}{more}. Pass that directory: "
            "ShardedTrainer and ShardedAccelerator save into a directory of their own."
        )
    if (directory / ".metadata").exists():
        return (
            f"{directory} was written by torch.distributed.checkpoint, not by shardadam.save. Load it with "
            "torch.distributed.checkpoint.load; its metadata is a pickle, so load it only if you trust who wrote it."
        )
    some = ", ".join(sorted(path.name for path in directory.iterdir())[:3]) or "nothing"
    return f"{directory} holds no checkpoint (found {some}), expected one that shardadam.save wrote."


def _checkpoints_below(directory: Path) -> list[Path]:
    """Returns directories that hold checkpoints, up to three levels below. Follows no links; gives up after many."""
    found, level, searched = [], [directory], 0
    for _ in range(3):
        level = [path for each in level for path in _directories_in(each)][: _MAX_SEARCHED - searched]
        searched += len(level)
        found += [path for path in level if _holds_checkpoint(path)]
        level = [path for path in level if not path.name.startswith(".") and path not in found]
    return found


def _holds_checkpoint(path: Path) -> bool:
    with suppress(OSError):
        return _newest(path) is not None
    return False


def _directories_in(directory: Path) -> list[Path]:
    with suppress(OSError), os.scandir(directory) as entries:
        return [Path(entry.path) for entry in islice(entries, _MAX_SEARCHED) if entry.is_dir(follow_symlinks=False)]
    return []


def _age(name: str) -> tuple[int, int]:
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1]), int(match[2] or 1)


def read_history(directory: Path) -> list[str]:
    """Returns the names in ``latest``, newest first; none if it is missing or damaged."""
    try:
        text = read_regular(directory / LATEST, max_bytes=_MAX_LATEST_BYTES).decode()
        *names, checksum = text.splitlines()
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
    create_directory(directory)
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


def create_directory(directory: Path) -> list[Path]:
    """Creates a directory and those above it that are missing, so that they outlive a crash of the machine.

    Returns:
        What it created, from the innermost on.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_directory(path.parent)
    return missing


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
