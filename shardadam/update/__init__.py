# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of Adam on one flat shard: a readable truth (``reference``) and the fast forms that must equal it."""
