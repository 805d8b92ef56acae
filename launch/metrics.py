# SPDX-License-Identifier: Apache-2.0
"""What ShardedAdamW can say about one step, as numbers by TensorBoard name. Collective: all ranks call it alike."""

from __future__ import annotations

from dataclasses import asdict

from shardadam import ShardedAdamW


def before_step(optimizer: ShardedAdamW) -> dict[str, float]:
    """Norms of averaged gradients before clipping: by parameter, by param group, and of all."""
    norms = optimizer.gradient_norms()
    found = {f"gradient_norm/{name}": norm for name, norm in norms.parameters.items()}
    found |= {f"gradient_norm_of_group/{index}": norm for index, norm in enumerate(norms.groups)}
    return found | {"gradient_norm_of_all": norms.total}


def after_step(optimizer: ShardedAdamW) -> dict[str, float]:
    """Update-to-weight ratios by parameter, skipped steps, and the bytes that this rank holds, by kind."""
    memory = optimizer.memory()
    found = {f"update_ratio/{name}": ratio for name, ratio in optimizer.update_ratios().items()}
    found |= {f"memory/{kind}": float(nbytes) for kind, nbytes in asdict(memory).items() if nbytes}
    return found | {"memory/total": float(memory.total), "skipped_steps": float(optimizer.skipped_steps)}
