# SPDX-License-Identifier: Apache-2.0
"""What a command cannot do, said to the user."""


class CommandError(Exception):
    """Printed without a traceback, with exit code 1: found, expected, remedy."""
