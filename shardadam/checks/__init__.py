# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments, of misuse, and of replicas. Must not change what is trained."""
