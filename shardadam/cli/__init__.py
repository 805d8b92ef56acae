# SPDX-License-Identifier: Apache-2.0
"""The command ``shardadam``: one module for each subcommand. Runs in one process and needs no GPU.

Exit codes: 0, success; 1, a checkpoint is damaged, the requested training does not fit, or an error; 2, wrong usage.
Imports only torch at first: a command imports what else it needs when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from shardadam.checkpoint.files import CheckpointError
from shardadam.cli import checkpoints, environment, plan
from shardadam.cli.errors import CommandError
from shardadam.cli.text import show
from shardadam.version import __version__

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: without the program's name; None: from ``sys.argv``.

    Returns:
        The exit code.

    Raises:
        SystemExit: wrong usage, with code 2; or after ``--help``.
    """
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has closed the pipe, as ``head`` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CheckpointError, CommandError, OSError) as error:
        show(f"shardadam: {error}", to="stderr")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardadam",
        description="Plans the memory of sharded training, inspects and exports checkpoints that shardadam.save has "
        "written, and describes this machine for a bug report.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan.add_command(commands)
    checkpoints.add_commands(commands)
    environment.add_command(commands)
    return parser
