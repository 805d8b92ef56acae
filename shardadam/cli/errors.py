# SPDX-License-Identifier: Apache-2.0
"""The error that commands raise for what the user can correct."""


class CommandError(Exception):
    """``shardadam`` prints it without a traceback and exits with code 1. The message: found, expected, remedy."""
