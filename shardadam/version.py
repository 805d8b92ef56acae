# SPDX-License-Identifier: Apache-2.0
"""The version of the package: the only place that names it. Must stay a plain string, which builds read as text."""

__version__ = "0.2.0"
