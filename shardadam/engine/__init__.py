# SPDX-License-Identifier: Apache-2.0
"""One step, room by room, in the order in which a gradient passes them: reduction, grad_stats, step_sync, update,
gathering.
"""
