# SPDX-License-Identifier: Apache-2.0
"""What ranks tell each other outside of tensors: agreement, the store barrier, desync reports, signals."""
