# SPDX-License-Identifier: Apache-2.0
"""Tells the root cause if a framework, or something that it imports, is missing or broken.

transformers imports lazily, and reports any error below as "Could not import module 'Trainer'".
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing(framework: str, *, has_extra: bool = True) -> Iterator[None]:
    """Return a context that imports ``framework``, whose integration has the same name.

    Args:
        has_extra: whether an extra of the same name installs it.

    Raises:
        ImportError: the import failed; says what failed first, and why.
    """
    handled = sys.exc_info()[1]
    try:
        yield
    except Exception as error:
        root = _root_of(error, handled)
        what = f"shardadam.integrations.{framework} could not import {framework}"
        if isinstance(root, ModuleNotFoundError) and root.name == framework:
            package = f"'shardadam[{framework}]'" if has_extra else framework
            raise ImportError(f"{what}, which is not installed. pip install {package}.") from error
        broken = _imported_in(root) or framework
        remedy = f"Reproduce it with: python -c 'import {broken}'. Install a {broken} that fits the installed torch"
        if broken != framework:
            remedy += f", or uninstall {broken} if you do not need it"
        raise ImportError(f"{what}: {broken} failed with {type(root).__name__}: {root}. {remedy}.") from error


def _root_of(error: BaseException, handled: BaseException | None) -> BaseException:
    """Return the error that came first, but after ``handled``, which the user's script was handling already."""
    while True:
        earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if earlier is None or earlier is handled:
            return error
        error = earlier


def _imported_in(error: BaseException) -> str | None:
    """Return the package of the innermost module whose import raised ``error``."""
    names = [
        str(frame.f_globals.get("__name__", ""))
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"
    ]
    package = names[-1].partition(".")[0] if names else ""
    return package if package not in ("", "__main__", "shardadam") else None
