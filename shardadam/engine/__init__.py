# SPDX-License-Identifier: Apache-2.0
"""One step. A gradient passes its modules in this order: reduction, grad_stats, step_sync, update, gathering."""
