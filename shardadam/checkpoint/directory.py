# SPDX-License-Identifier: Apache-2.0
"""A directory of checkpoints: ``step-00000020`` and so on, and ``latest``, a file that lists them, newest first.

Note: publishing
    A checkpoint is written to ``.saving-NAME.TOKEN`` and then renamed to ``NAME``: one atomic operation, after
    everything is on the disk, manifest included. ``latest`` lists the new name, followed by the older ones, before the
    rename. So at every moment the first name in ``latest`` that exists is the newest checkpoint. To remove a
    checkpoint, it is renamed to ``.deleting-NAME`` first.

Note: two jobs
    If two jobs saved into one directory in turn, each would remove the other's checkpoints, and ``load`` would find now
    one's, now the other's. So a process remembers what it has saved, and refuses to save if ``latest`` begins with
    another name, unless it has loaded since: the job that came last goes on. For two that save at the same time, see
    ``unpublished``.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from shardadam.checkpoint.disk import on_disk
from shardadam.checkpoint.files import MANIFEST, CheckpointError, read_regular, write_durably
from shardadam.checkpoint.unpublished import DELETING, Unpublished, create_alone

LATEST = "latest"
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


def create_unpublished(directory: Path, step: int) -> Unpublished:
    """Creates an empty, unpublished checkpoint with a name that no other has; removes what crashed saves left behind.

    Raises:
        CheckpointError: another job saves into the directory.
    """
    name = on_disk(f"looking into {directory}", _new_name, directory, step)
    unpublished = create_alone(directory, name)
    with suppress(OSError):  # they stay until the next save
        for path in on_disk(f"looking into {directory}", lambda: list(directory.glob(f"{DELETING}*"))):
            _remove(path)
    return unpublished


def _new_name(directory: Path, step: int) -> str:
    create_directory(directory)
    _refuse_another_jobs(directory)
    name, count = f"step-{step:08d}", 1
    while (directory / name).exists():
        count += 1
        name = f"step-{step:08d}-{count}"
    return name


def publish(unpublished: Unpublished) -> list[str]:
    """Publishes a checkpoint; see the note on publishing.

    Returns:
        The names in ``latest``, newest first.

    Raises:
        CheckpointError: another job has published one in the meantime.
    """
    return on_disk(f"publishing {unpublished.directory / unpublished.name}", _publish, unpublished)


def _publish(unpublished: Unpublished) -> list[str]:
    directory, name = unpublished.directory, unpublished.name
    _refuse_another_jobs(directory)
    history = [older for older in read_history(directory) if (directory / older).is_dir()]
    unlisted = [p.name for p in directory.iterdir() if _NAME.fullmatch(p.name) and p.name not in history]
    history = history or sorted(unlisted, key=_age, reverse=True)
    listed = [name, *history]
    _own_names[_key(directory)].add(name)
    unpublished.end()
    sync_directory(unpublished.path)
    write_durably(directory / LATEST, "\n".join([*listed, _checksum(listed)]) + "\n", through=unpublished.path / LATEST)
    os.rename(unpublished.path, directory / name)
    sync_directory(directory)
    return listed


def remove_older(directory: Path, listed: Sequence[str], keep: int) -> None:
    """Removes the checkpoints that ``publish`` returned, except the ``keep`` newest that exist."""
    what = f"looking into {directory}"
    existing = on_disk(what, lambda: [name for name in listed if (directory / name).is_dir()])
    for older in existing[keep:]:
        on_disk(f"renaming {directory / older}", os.rename, directory / older, directory / (DELETING + older))
        _remove(directory / (DELETING + older))


_own_names: dict[str, set[str]] = {}
"""Checkpoints that this process has saved, by directory, and the one that was the newest before."""


def _key(directory: Path) -> str:
    return os.path.realpath(directory)


def _refuse_another_jobs(directory: Path) -> None:
    """Raises CheckpointError if another job has saved into ``directory`` since this process has. See the note above."""
    newest_names = read_history(directory)[:1]
    own = _own_names.setdefault(_key(directory), set(newest_names))
    if not own.issuperset(newest_names):
        raise CheckpointError(
            f"another job saves into {directory}: it has saved {newest_names[0]} there since this one has saved. Two "
            "jobs must not save into one directory. End one of them, or give each a directory of its own. To continue "
            "from the other's checkpoint, load it first."
        )


def forget(directory: Path) -> None:
    """Lets this process save after checkpoints of another job, because it has loaded one."""
    _own_names.pop(_key(directory), None)


def _remove(path: Path) -> None:
    """Removes a directory, or a link to one: users move checkpoints elsewhere and leave links.

    Another process may remove it at the same time.
    """
    with suppress(FileNotFoundError):
        if on_disk(f"looking into {path}", lambda: path.is_symlink() or not path.is_dir()):
            on_disk(f"removing {path}", path.unlink)
        else:
            for entry in on_disk(f"looking into {path}", lambda: list(path.iterdir())):
                _remove(entry)
            on_disk(f"removing {path}", path.rmdir)


def create_directory(directory: Path) -> list[Path]:
    """Creates a directory and those above it that are missing, so that they outlive a crash of the machine.

    Returns:
        What it created, from the innermost on.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    if missing:
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
