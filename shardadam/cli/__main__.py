# SPDX-License-Identifier: Apache-2.0
"""``python -m shardadam.cli``, where the script is not on the path."""

import sys

from shardadam.cli import main

if __name__ == "__main__":
    sys.exit(main())
