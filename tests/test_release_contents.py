# SPDX-License-Identifier: Apache-2.0
"""``tests/release_contents.py`` refuses a wheel or an sdist that holds a stray file, lacks one, or asks for more than
torch. CI runs it on the real ones (``tests/release.sh``).
"""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.release_contents import METADATA, WrongContents, main

KNOWN = ["shardadam/__init__.py", "shardadam/py.typed", "README.md", "tests/test_a.py", ".ci/run"]
INFO = "shardadam-1.0.dist-info"


def write_wheel(path: Path, added: dict[str, str], removed: str = "", requires: str = "torch>=2.11") -> Path:
    metadata = (
        f"Metadata-Version: 2.4\nName: shardadam\nRequires-Dist: {requires}\nRequires-Dist: rich; extra == 'launch'\n"
    )
    files = {name: name for name in KNOWN if name.startswith("shardadam/")}
    files |= {f"{INFO}/{name}": metadata if name == "METADATA" else "" for name in METADATA}
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (files | added).items():
            if name != removed:
                archive.writestr(name, text)
    return path


def write_sdist(path: Path, source: Path, added: str = "", removed: str = "") -> Path:
    made = ["PKG-INFO", "setup.cfg", "shardadam.egg-info/SOURCES.txt"]
    with tarfile.open(path, "w:gz") as archive:
        for name in [*KNOWN, *made, added]:
            if name and name != removed and not name.startswith(".ci"):
                archive.add(source / "README.md", f"shardadam-1.0/{name}")
    return path


@pytest.mark.parametrize(
    ("wheel", "sdist", "other", "expected"),
    [
        ({}, {}, {}, None),
        ({"added": {"shardadam/__pycache__/a.pyc": ""}}, {}, {}, "__pycache__/a.pyc"),
        ({"removed": "shardadam/py.typed"}, {}, {}, "missing: ['shardadam/py.typed']"),
        ({"removed": f"{INFO}/licenses/LICENSE"}, {}, {}, "licenses/LICENSE"),
        ({"added": {"shardadam/__init__.py": "old"}}, {}, {}, "is not the file of the checkout"),
        ({"requires": "numpy"}, {}, {}, "expected torch alone"),
        ({}, {"added": "tests/cache.nbi"}, {}, "tests/cache.nbi"),
        ({}, {"removed": "tests/test_a.py"}, {}, "missing: ['tests/test_a.py']"),
        ({}, {}, {"added": {f"{INFO}/WHEEL": "other"}}, "WHEEL differs"),
        ({}, {}, {"removed": "shardadam/py.typed"}, "missing: ['shardadam/py.typed']"),
    ],
)
def test_only_what_git_knows_is_released(
    wheel: dict, sdist: dict, other: dict, expected: str | None, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    for name in KNOWN:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    paths = [
        write_wheel(tmp_path / "dist" / "shardadam-1.0-py3-none-any.whl", **{"added": {}, **wheel}),
        write_sdist(tmp_path / "shardadam-1.0.tar.gz", source, **sdist),
        write_wheel(tmp_path / "other" / "shardadam-1.0-py3-none-any.whl", **{"added": {}, **other}),
    ]
    if expected is None:
        main(source, *paths)
        return
    with pytest.raises(WrongContents) as error:
        main(source, *paths)
    assert expected in str(error.value)
