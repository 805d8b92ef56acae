# SPDX-License-Identifier: Apache-2.0
"""Checks what a wheel and an sdist hold against the files that git knows. Used by tests/release.sh.

    python tests/release_contents.py SOURCE WHEEL SDIST OTHER_WHEEL

`SOURCE` is a folder that holds the files that git knows, and nothing else. Exits with a message that lists what is
stray or missing, or which file of `OTHER_WHEEL` differs from `WHEEL`.
"""

from __future__ import annotations

import email
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

PACKAGE = "shardadam"
METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
NOT_IN_SDIST = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")
MADE_FOR_SDIST = {"PKG-INFO", "setup.cfg"}  # and a folder *.egg-info


class WrongContents(ValueError):
    """A distribution that must not be released; the message says why."""


def differing(what: str, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raises WrongContents if two lists of names are not equal."""
    found, expected = set(found), set(expected)
    if found != expected:
        raise WrongContents(
            f"{what}: found what git does not know: {sorted(found - expected) or 'nothing'}; missing: "
            f"{sorted(expected - found) or 'nothing'}. Files that are to be released must be known to git; "
            "pyproject.toml and MANIFEST.in choose among them."
        )


def check_wheel(wheel: Path, source: Path, known: set[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
        modules = {name for name in known if name.startswith(f"{PACKAGE}/")}
        differing(wheel.name, archive.namelist(), modules | {f"{info}/{name}" for name in METADATA})
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        for name in modules:
            if archive.read(name) != (source / name).read_bytes():
                raise WrongContents(f"{wheel.name}: {name} is not the file of the checkout")
    required = [one for one in metadata.get_all("Requires-Dist") or [] if "extra ==" not in one]
    if len(required) != 1 or not required[0].startswith("torch>="):
        raise WrongContents(f"{wheel.name}: found the requirements {required}, expected torch alone")


def check_sdist(sdist: Path, known: set[str]) -> None:
    with tarfile.open(sdist) as archive:
        found = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    found = {name for name in found if not name.startswith(f"{PACKAGE}.egg-info/")}
    expected = {name for name in known if not name.startswith(NOT_IN_SDIST)}
    differing(sdist.name, found, expected | MADE_FOR_SDIST)


def check_equal(first: Path, second: Path) -> None:
    """Raises WrongContents unless two wheels hold the same files; the times of files do not count."""
    with zipfile.ZipFile(first) as one, zipfile.ZipFile(second) as other:
        differing(f"{second} beside {first}", other.namelist(), one.namelist())
        for name in one.namelist():
            if one.read(name) != other.read(name):
                raise WrongContents(f"{name} differs between {first} and {second}")


def main(source: Path, wheel: Path, sdist: Path, other_wheel: Path) -> None:
    known = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    check_wheel(wheel, source, known)
    check_sdist(sdist, known)
    check_equal(wheel, other_wheel)
    print(f"{wheel.name}, {sdist.name}: hold what they should; the wheel that the sdist builds is equal")


if __name__ == "__main__":
    try:
        main(*(Path(argument) for argument in sys.argv[1:]))
    except WrongContents as error:
        sys.exit(str(error))
