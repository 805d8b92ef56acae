# SPDX-License-Identifier: Apache-2.0
"""The commands of ``shardadam``, one module each, in one process, without a GPU.

Prints, and gives exit codes: 0, all is well; 1, a checkpoint is not whole, what was asked for does not fit, or
something cannot be done; 2, wrong usage. Imports torch alone: what else a command needs, it imports when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from shardadam.checkpoint.files import CheckpointError
from shardadam.cli import checkpoints, environment, plan
from shardadam.cli.errors import CommandError
from shardadam.version import __version__

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Local.

    Args:
        arguments: default: the process's.

    Returns:
        The exit code. Wrong usage exits with 2 at once.
    """
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CheckpointError, CommandError, OSError) as error:
        print(f"shardadam: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardadam",
        description="Plans the memory of sharded training, looks into checkpoints that shardadam.save has written, and "
        "describes this machine.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan.add_command(commands)
    checkpoints.add_commands(commands)
    environment.add_command(commands)
    return parser
