# SPDX-License-Identifier: Apache-2.0
"""The optimizer's state as torch and torch.distributed.checkpoint see it: this rank's shards, whole tensors, bytes."""
