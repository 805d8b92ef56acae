# SPDX-License-Identifier: Apache-2.0
"""Labelled texts to fine-tune on: docstrings of Python's standard library, told apart by module, or a file of your own.

What comes out depends on the files alone. Whether a text is for training or validation depends on the text alone.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data import DataError, stdlib_files

VALIDATION_SHARE = 0.25
SMALLEST_WORDS = 5  # of a docstring: shorter ones ("Return self.") could come from anywhere
MASK = "_"
WORD = re.compile(r"[^\W_]\w*")
PART = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+(?![a-z])")  # of a word: XMLParser is XML and Parser


@dataclass(frozen=True)
class Texts:
    """Texts and the indices of their labels."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Task:
    """No text is in both parts, or twice in one. `names` are the labels; `source` is for the reader of the log."""

    training: Texts
    validation: Texts
    names: tuple[str, ...]
    source: str


def load(path: str | None, *, classes: int, per_class: int) -> Task:
    """The task in the file `path`, or of the running Python's docstrings: its `classes` most frequent modules, each
    with `per_class` texts at most.

    Raises DataError where a file cannot be read as {"text", "label"} lines, or there is too little to train on.
    """
    if path is None:
        pairs = chosen(stdlib_docstrings(), classes=classes, per_class=per_class)
        source = f"docstrings of {sysconfig.get_paths()['stdlib']}"
    else:
        pairs, source = distinct(lines_of(Path(path))), path
    names = sorted({label for _, label in pairs})
    if len(names) < 2:
        raise DataError(f"Found {len(names)} labels in {source}, expected 2 or more. Give texts of different labels.")
    parts: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for text, label in pairs:
        parts[place(text) < VALIDATION_SHARE].append((text, label))
    for name, part in (("training", parts[False]), ("validation", parts[True])):
        if not part:
            raise DataError(f"Of the {len(pairs)} texts of {source} none fell to {name}. Give more texts.")
    return Task(indexed(parts[False], names), indexed(parts[True], names), tuple(names), source)


def indexed(pairs: Sequence[tuple[str, str]], names: Sequence[str]) -> Texts:
    return Texts(tuple(text for text, _ in pairs), tuple(names.index(label) for _, label in pairs))


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """(text, label) of every line of a JSONL file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"--data {path}: no such file (looked from {Path.cwd()}).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--data {path} cannot be read: {error}.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            raise DataError(f"--data {path}, line {number}: not JSON ({error}). Write one object a line.") from error
        if not (
            isinstance(content, dict)
            and isinstance(content.get("text"), str)
            and isinstance(content.get("label"), str)
            and content["text"].strip()
        ):
            raise DataError(
                f"--data {path}, line {number}: found {line[:60]!r}, expected "
                '{"text": "...", "label": "..."} with a text that is not empty.'
            )
        yield " ".join(content["text"].split()), content["label"]


# Docstrings


@cache
def stdlib_docstrings() -> tuple[tuple[str, str], ...]:
    """(first paragraph, top-level module) of the functions, methods and classes of Python's own modules."""
    return tuple(found_in_stdlib())


def found_in_stdlib() -> Iterator[tuple[str, str]]:
    for name, content in stdlib_files():
        module = name.split("/")[0].removesuffix(".py")
        try:
            tree = ast.parse(content)
        except (SyntaxError, ValueError):  # lib2to3 and others hold files that are not meant to parse
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if len(paragraph.split()) >= SMALLEST_WORDS:
                    yield paragraph, module


def chosen(pairs: Iterable[tuple[str, str]], *, classes: int, per_class: int) -> list[tuple[str, str]]:
    """Those of the most frequent labels, without duplicates, and without any word that holds a label's name."""
    known = distinct(pairs)
    counts = Counter(label for _, label in known)
    names = sorted(counts, key=lambda name: (-counts[name], name))[:classes]
    masked = distinct((mask(text, names), label) for text, label in known if label in names)
    # A hash chooses, but not the one that splits: by that, those of a label's texts would come first that validate.
    masked.sort(key=lambda pair: digest("chosen " + pair[0]))
    return [pair for name in names for pair in [pair for pair in masked if pair[1] == name][:per_class]]


def distinct(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each text once, whatever its case; in order of first appearance.

    What stands under several labels tells nothing, and is left out.
    """
    labels: dict[str, set[str]] = {}
    forms: dict[str, set[str]] = {}
    for text, label in pairs:
        labels.setdefault(text.lower(), set()).add(label)
        forms.setdefault(text.lower(), set()).add(text)
    return [(min(forms[key]), found.pop()) for key, found in labels.items() if len(found) == 1]


def mask(text: str, names: Sequence[str]) -> str:
    """`text` with every word that holds one of `names` replaced; names of up to 3 letters only as a part of their own.

    All names are masked in all texts: if a text lost only its own, the loss itself would tell the label.
    """
    plain = [name.removeprefix("_py").strip("_").lower() for name in names]  # _pydecimal is known as decimal
    short, long = {name for name in plain if len(name) <= 3}, [name for name in plain if len(name) > 3]

    def replaced(match: re.Match[str]) -> str:
        word = match.group()
        holds = any(name in word.lower() for name in long) or short & {part.lower() for part in PART.findall(word)}
        return MASK if holds else word

    return WORD.sub(replaced, text)


def digest(text: str) -> bytes:
    return hashlib.sha256(text.lower().encode("utf-8", "surrogatepass")).digest()


def place(text: str) -> float:
    """Where a text stands in [0, 1): a hash, so that texts added later do not move the others."""
    return int.from_bytes(digest(text)[:8], "big") / 2**64
