# SPDX-License-Identifier: Apache-2.0
"""ShardedAdamW: ``ShardedAdam`` with torch.optim.AdamW's decoupled weight decay."""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import ParamsT

from shardadam.offload import Offload
from shardadam.optimizer import GradientSync, ShardedAdam
from shardadam.precision import Precision
from shardadam.transport import Transport


class ShardedAdamW(ShardedAdam):
    """torch.optim.AdamW with its state split over the ranks of a process group.

    ``ShardedAdam`` with decoupled weight decay. Collective: all ranks must build it over the same model.

    Args:
        params: tensors, (name, tensor) pairs such as ``model.named_parameters()``, or param groups of either.
        lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW.
        process_group: a ProcessGroup or DeviceMesh to shard over. None: the default group.
        gradient_sync: who averages gradients: ``"backward"``, this optimizer while backward runs (``p.grad`` is None
            afterwards); ``"step"``, this optimizer in ``step``; ``"external"``, DDP or a trainer.
        max_grad_norm: clip the 2-norm of all averaged gradients in ``step``; ``grad_norm`` is then the norm before.
        precision: formats of the state and of gradients, as ``Precision(moments="int8")``.
        bucket_mb: MiB of parameters in a bucket. None: chosen by device and model.
        transport: how ranks exchange data. ``"auto"``: shared memory if possible, else torch.distributed.
        model_parallel_group: ranks that hold other parts of the model. None: found from DTensors.
        update: ``"backward"`` updates parameters while backward runs, without a gradient shard; nothing can clip then.
        ema_decay: keep an exponential moving average of the weights.
        offload: ``HostOffload()`` or ``DiskOffload(directory)``; None: state stays on the parameters' device.
        foreach, fused, capturable: accepted and ignored.
        amsgrad, differentiable: not supported, must be False.

    ``help(shardadam.ShardedAdam)`` says more about each argument, and which errors are raised.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        gradient_sync: GradientSync = "backward",
        max_grad_norm: float | None = None,
        precision: Precision | None = None,
        bucket_mb: float | None = None,
        transport: Literal["auto", "collective", "shared_memory"] | Transport = "auto",
        model_parallel_group: dist.ProcessGroup | DeviceMesh | None = None,
        update: Literal["step", "backward"] = "step",
        ema_decay: float | None = None,
        offload: Offload | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            process_group=process_group,
            gradient_sync=gradient_sync,
            max_grad_norm=max_grad_norm,
            precision=precision,
            bucket_mb=bucket_mb,
            transport=transport,
            model_parallel_group=model_parallel_group,
            update=update,
            ema_decay=ema_decay,
            offload=offload,
        )
