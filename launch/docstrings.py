# SPDX-License-Identifier: Apache-2.0
"""Labelled texts for fine-tuning: docstrings of Python's standard library, labelled by module, or the user's own file.

The result depends on the files only. A hash of each text decides whether it is for training or validation.
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
SMALLEST_WORDS = 5  # of a docstring: shorter ones ("Return self.") fit any module
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
    """Each text is in one part, once. `names` are the labels; `source` is for the log."""

    training: Texts
    validation: Texts
    names: tuple[str, ...]
    source: str


def load(path: str | None, *, classes: int, per_class: int) -> Task:
    """Reads the task in `path`, or makes one of the running Python's docstrings: its `classes` most frequent modules,
    with at most `per_class` texts each.

    Raises DataError where the file does not hold {"text", "label"} lines, or holds too few.
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
        parts[hash_fraction(text) < VALIDATION_SHARE].append((text, label))
    for name, part in (("training", parts[False]), ("validation", parts[True])):
        if not part:
            raise DataError(f"Of the {len(pairs)} texts of {source}, none is for {name}. Give more texts.")
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
        except (SyntaxError, ValueError):  # lib2to3 and others hold files that do not parse on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if len(paragraph.split()) >= SMALLEST_WORDS:
                    yield paragraph, module


def chosen(pairs: Iterable[tuple[str, str]], *, classes: int, per_class: int) -> list[tuple[str, str]]:
    """Texts of the most frequent labels, without duplicates; words that hold the name of a label are masked."""
    known = distinct(pairs)
    counts = Counter(label for _, label in known)
    names = sorted(counts, key=lambda name: (-counts[name], name))[:classes]
    masked = distinct((mask(text, names), label) for text, label in known if label in names)
    # Not the hash that splits: sorted by that, a label's validation texts would come first.
    masked.sort(key=lambda pair: digest("chosen " + pair[0]))
    return [pair for name in names for pair in [pair for pair in masked if pair[1] == name][:per_class]]


def distinct(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each text once, ignoring case, in order of first appearance; without texts that have several labels."""
    labels: dict[str, set[str]] = {}
    forms: dict[str, set[str]] = {}
    for text, label in pairs:
        labels.setdefault(text.lower(), set()).add(label)
        forms.setdefault(text.lower(), set()).add(text)
    return [(min(forms[key]), found.pop()) for key, found in labels.items() if len(found) == 1]


def mask(text: str, names: Sequence[str]) -> str:
    """Replaces every word of `text` that holds one of `names`. A name of up to 3 letters must be a part of its own.

    Masks all names in all texts: if a text lost only its own label, the mask would reveal it.
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


def hash_fraction(text: str) -> float:
    """A hash in [0, 1), so that new texts do not move the others between training and validation."""
    return int.from_bytes(digest(text)[:8], "big") / 2**64
