# SPDX-License-Identifier: Apache-2.0
"""What ranks exchange besides tensors: agreement checks, the store barrier, desync reports; deferred signals."""
