# SPDX-License-Identifier: Apache-2.0
"""Runs the commands as ``python -m shardadam.cli``, for when the script ``shardadam`` is not on the path."""

import sys

from shardadam.cli import main

if __name__ == "__main__":
    sys.exit(main())
