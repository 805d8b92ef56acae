# SPDX-License-Identifier: Apache-2.0
"""The timeline of a step of a user's script: ``trace`` computes, ``timeline`` draws, ``profiling`` records."""

from shardadam.profiler.profiling import StepProfile, profile

__all__ = ["StepProfile", "profile"]
