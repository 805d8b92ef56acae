# SPDX-License-Identifier: Apache-2.0
"""ShardedAdam, the public optimizer: torch.optim's interface over ``engine/step.py``.

Does no arithmetic and calls no collectives.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import ParamsT

from shardadam.checks import arguments
from shardadam.checks.misuse import refuse_torchs_grad_scaler, watch_torch
from shardadam.engine.checkpoint_seam import CheckpointSeam
from shardadam.engine.collective_method import collective
from shardadam.engine.garbage import garbage_collection_paused
from shardadam.engine.inspection import InspectableOptimizer
from shardadam.engine.joining import JoinableOptimizer, repeated_by_joined_ranks
from shardadam.engine.parameters import (
    ShardedParameters,
    agreed,
    agreed_or_closed,
    built_or_aborted,
    named_parameters,
)
from shardadam.engine.step import StepEngine
from shardadam.engine.storage import NamedParameter
from shardadam.offload import Offload, check_offload
from shardadam.precision import Precision
from shardadam.ranks import desync
from shardadam.ranks.agreement import Claim
from shardadam.transport import Transport, connect, connect_job, placement

GradientSync = Literal["backward", "step", "external"]


class ShardedAdam(InspectableOptimizer):
    """torch.optim.Adam with its state split over the ranks of a process group (ZeRO stages 1 and 2).

    Collective: all ranks must build the same optimizer over the same model. It broadcasts rank 0's parameter values and
    makes trainable parameters views of flat buffers. Their shapes, strides, ties and identities stay the same.

    Args:
        params: what torch.optim.Adam takes: tensors, (name, tensor) pairs, or param groups of either.
        lr: learning rate, a float or a tensor of one element.
        betas: decay rates of exp_avg and exp_avg_sq, floats.
        eps: added to the denominator.
        weight_decay: coefficient of the L2 penalty, or of decoupled decay.
        amsgrad: not supported, must be False.
        maximize: maximise the objective instead of minimising it.
        decoupled_weight_decay: decay as in AdamW.
        process_group: a ProcessGroup or a 1-D DeviceMesh to shard over. None: the default group, or this process alone
            if torch.distributed is not initialised. A 2-D DeviceMesh (replicas, shards) splits state over its last
            dimension, keeps equal shards along its first, and averages gradients over both (hybrid sharding).
        gradient_sync: who averages gradients over ranks, and when. ``"backward"``: this optimizer reduce-scatters them
            while backward runs and frees them (ZeRO-2). ``"step"``: they stay in ``p.grad``, and ``step`` reduces them
            (ZeRO-1). ``"external"``: DDP or a trainer has averaged ``p.grad``; only state is sharded.
        max_grad_norm: clip the global 2-norm of the averaged gradients inside ``step``.
        precision: number formats of the state, and of gradients in transfer.
        bucket_mb: size of a bucket, in MiB of parameters. None: on the CPU 8, but at most a quarter of the parameters,
            and at least 0.25; on GPUs 128, or 2 for each rank of the shard group if that is more, but at most 1024 and
            at most a sixteenth of the parameters, and at least 32.
        transport: ``"shared_memory"``: CPU ranks of one host read each other's memory. ``"collective"``:
            torch.distributed. ``"auto"``: shared memory where possible, else torch.distributed. Or a Transport that no
            other optimizer uses.
        foreach: accepted for compatibility and ignored: the update is always fused.
        capturable: as ``foreach``.
        fused: as ``foreach``.
        differentiable: not supported, must be False.
        model_parallel_group: a ProcessGroup, or a DeviceMesh of any dimensions, of the ranks that hold other parts of
            the same copy of the model: tensor- and pipeline-parallel ranks, this rank among them, but no other of
            ``process_group``. Norms, skipped steps and checkpoints are then those of the whole model. None: the ranks
            along the meshes of DTensor parameters, if there are any.
        update: when parameters are updated. ``"backward"``: each bucket as soon as its gradients are reduced, while
            backward goes on, so that no rank keeps gradients; ``step`` updates the rest and gathers. Equal to
            ``"step"`` bit for bit, but nothing can clip, scale, read or discard gradients, and only one backward
            between two steps may be outside of ``no_sync``. Hyperparameters are those during backward. Where the
            gradients of a rank's shard of a bucket are not finite, that shard alone stays as it is.
        ema_decay: keep an exponential moving average of the exact weights, in float32 (float64 for float64 parameters),
            split over ranks like the moments: average = ema_decay * average + (1 - ema_decay) * weight after every
            step that is not skipped; the first one copies the weight, as torch.optim.swa_utils.AveragedModel does. At
            least 0 and less than 1; None: no average. See ``averaged_parameters``.
        offload: where moments and masters are kept between steps: ``HostOffload()``, in pinned memory of the host, or
            ``DiskOffload(directory)``, in files. None: on the device of their parameters. Results are the same.

    A param group may have ``process_group``: those ranks of the optimizer's process group that hold the same parameters
    (experts), a ProcessGroup or a 1-D DeviceMesh; their state is split over these ranks. It may have
    ``gradient_divisor``, by which the sum of gradients over its ranks is divided: by default the size of the
    optimizer's process group, as one expert sees the tokens of all its ranks. Both are read when the group is added.

    Parameters may be DTensors (``parallelize_module``, ``distribute_tensor``): this rank trains their local tensors.
    Those of ``fully_shard`` need ``gradient_sync="external"``; their storage stays FSDP's.

    Raises:
        ValueError, TypeError: an argument is not as described, a parameter cannot be trained or broadcast, or ranks
            disagree (on every rank).
        RuntimeError: another rank could not build its optimizer; or torchrun has started several processes
            (``WORLD_SIZE``), and torch.distributed is not initialised.
        RankDesyncError: names the ranks that did not come to build theirs within the timeout of the process group, or
            have ended.

    ``skipped_steps`` counts the steps skipped because a gradient was infinite or NaN on some rank: 0-dim int64 on the
    device. With ``update="backward"``, it counts the shards of all ranks that stayed as they were instead.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        amsgrad: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
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
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        options = arguments.Options(
            gradient_sync=gradient_sync,
            max_grad_norm=max_grad_norm,
            precision=Precision() if precision is None else precision,
            bucket_mb=bucket_mb,
            transport="auto" if isinstance(transport, Transport) else transport,
            update=update,
            ema_decay=ema_decay,
            offload=offload,
        )
        JoinableOptimizer.__init__(self)
        self._join_group = process_group
        with desync.in_call(type(self).__name__, self, builds=True), garbage_collection_paused():
            if not isinstance(transport, Transport):
                exact_sums = getattr(precision, "accumulate", None) == "fp32"
                transport = connect(process_group, kind=transport, exact_sums=exact_sums)
            self._parameters = ShardedParameters(transport, options)
            with agreed_or_closed(transport) as claims:
                options.check()
                check_offload(offload)
                super().__init__(arguments.read_once(params), defaults)
                named = named_parameters(self.param_groups)
                self._parameters.check(named)
                parts = arguments.model_parallel_ranks(model_parallel_group, named, transport)
                claims += [*options.claims(), *self._parameters.claims(self.param_groups, named)]
                claims.append(Claim("the number of model-parallel ranks:", "", str(len(parts))))
            # A part of the model without trainable parameters must send on the device of the others.
            in_order = sorted(named, key=lambda p: not p.parameter.requires_grad)
            device = next((p.local.device for p in in_order), torch.device("cpu"))
            with built_or_aborted(self._parameters):
                job, groups = connect_job(transport, parts), weakref.WeakMethod(self._current_groups)
                self._engine = StepEngine(self._parameters, job, device, lambda: groups()())  # type: ignore[misc]
                self.skipped_steps = self._engine.skipped_steps
                self._add_params(named)
        watch_torch(self._engine.reducer)
        self._is_built = True
        weakref.finalize(self, self._engine.release).atexit = False

    @property
    def gradient_sync(self) -> str:
        """``"backward"``, ``"step"`` or ``"external"``, as passed to the constructor."""
        return self._engine.options.gradient_sync

    # The step

    @collective
    @repeated_by_joined_ranks
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters with the gradients since the last step, averaged over ranks. Collective.

        A parameter without a gradient on any rank stays as it is. If only some ranks have one, the others count as
        zeros. If a gradient is infinite or NaN on any rank, ``step`` changes nothing but ``skipped_steps``.

        Args:
            closure: reevaluates the model and returns the loss, as in torch.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            RuntimeError: a parameter has changed its device, dtype or shape since the optimizer was built, another
                optimizer was built over it, or an earlier call was interrupted while it wrote.
            ValueError, TypeError: on every rank, if ranks make different calls or have different hyperparameters, or if
                one is not a finite number. Nothing has been written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._add_unfrozen_params(between_steps=False)
        if self._engine.must_sync:
            refuse_torchs_grad_scaler(self.__dict__)
            self._engine.step(self.param_groups)
            self._consolidated = None
            self._engine.warnings.give()
        return loss

    @collective
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard all gradients, also reduced ones, which ``model.zero_grad()`` cannot reach.

        Collective with ``gradient_sync="backward"``: it completes started reductions. The first call after a step costs
        nothing. A second one, to skip a batch, also runs the reductions that a rank missed because its forward or
        backward raised.
        """
        if self._is_built:
            self._engine.zero_grad()
        super().zero_grad(set_to_none)

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context in which backward accumulates into ``p.grad`` and reduces nothing, as in DDP. Local.

        All ranks must use it around the same backward passes. The next backward outside of it, or ``step``, reduces the
        accumulated gradients.
        """
        return self._engine.reducer.no_sync()

    @collective
    @repeated_by_joined_ranks
    def clip_grad_norm_(
        self,
        max_norm: float | Tensor,
        norm_type: float = 2.0,
        *,
        parameters: Tensor | Iterable[Tensor] | None = None,
    ) -> Tensor:
        """Clip the norm of averaged gradients to ``max_norm``, as torch.nn.utils.clip_grad_norm_ would. Collective.

        Computes the scale from the present gradients; ``step`` applies it. If backward runs again before ``step``, and
        all parameters are clipped together, its gradients get the same scale. With ``gradient_sync`` "step" and
        "external", gradients that change before ``step`` are not clipped.

        Args:
            max_norm: the largest norm.
            norm_type: p of the p-norm, positive; ``float("inf")`` for the largest absolute value.
            parameters: those to clip, by their own norm; the same on all ranks. None: all parameters.

        Returns:
            The norm before clipping, 0-dim on the device, float32 (float64 if any parameter of this rank is).

        Raises:
            ValueError: ``norm_type`` is not positive, or one of ``parameters`` is not this optimizer's.
        """
        self._add_unfrozen_params(between_steps=False)
        return self._engine.clip_grad_norm_(max_norm, self.param_groups, norm_type=norm_type, parameters=parameters)

    @collective
    @repeated_by_joined_ranks
    def clip_grad_value_(self, clip_value: float, *, parameters: Tensor | Iterable[Tensor] | None = None) -> None:
        """Clamp every element of the averaged gradients to [-clip_value, clip_value]. Collective.

        As torch.nn.utils.clip_grad_value_ on averaged gradients, except that a step with an infinite gradient is still
        skipped. Gradients that backward adds later are not clipped; with ``gradient_sync`` "step" and "external",
        those that change before ``step`` are not, either.

        Args:
            clip_value: the largest absolute value, a number.
            parameters: those to clip; the same on all ranks. None: all parameters.

        Raises:
            ValueError: ``clip_value`` is negative or NaN, or one of ``parameters`` is not this optimizer's.
        """
        self._add_unfrozen_params(between_steps=False)
        self._engine.clip_grad_value_(clip_value, self.param_groups, parameters=parameters)

    def overlap_gather(self, model: torch.nn.Module, blocks: Iterable[torch.nn.Module] | None = None) -> None:
        """Overlap all-gathers with the next forward of ``model``: from now on ``step`` does not wait for them.

        Before its forward, each block waits for its own parameters; the model waits for those outside of blocks. The
        model's ``parameters``, ``named_parameters``, ``state_dict``, ``load_state_dict`` and ``to``, copies and pickles
        of it, and the optimizer's methods wait for all; an attribute such as ``model.head.weight`` waits for itself.
        After a step, call ``synchronize`` before anything writes parameters, and before they are read in other ways:
        from a list made earlier, or from ``param_groups``. Local, but all ranks must call it, before torch.compile;
        blocks may be compiled already.

        Args:
            blocks: modules inside the model that its forward calls. None: the elements of its lists and sequences of
                equal modules, such as transformer layers, and the modules beside those.

        Raises:
            RuntimeError: ``model`` is compiled already, and would not wait.
            ValueError: ``model`` has none of the optimizer's parameters, or one of ``blocks`` is not inside it.
        """
        self._engine.overlap_gather(model, blocks)

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Context manager: parameters have the values of their averages (``ema_decay``). Collective, also at its end.

        Gathers the averages into the model, rounded to the parameters' dtype; puts the training weights back at the
        end, bit for bit, also if the body raises. Meanwhile each rank keeps its shards of the training weights: 1/N of
        the parameters. Both ends cost an all-gather, and a backward through a graph from before either one raises.
        Before the first step, the averages are the weights. With ``update="backward"``, a backward within the context
        accumulates in ``p.grad``, as in ``no_sync``. With ``fully_shard``, call ``model.reshard()`` after a
        forward without backward, before each end: FSDP would go on using the values that it has gathered.

        Raises:
            RuntimeError: the optimizer has no ``ema_decay``. Within the context, ``step``, ``load_state_dict``, methods
                that return the state, ``add_param_group``, ``shardadam.save`` and ``load`` of this optimizer, and a
                second ``averaged_parameters`` raise; nothing is lost by it.
        """
        with desync.in_call("averaged_parameters", self):
            self._put_averages()
        try:
            yield
        finally:
            with desync.in_call("averaged_parameters", self):
                self._put_weights_back()

    @collective
    def _put_averages(self) -> None:
        engine = self._engine
        engine.averages.check()
        engine.check_between_steps()
        self._add_unfrozen_params()
        engine.gatherer.synchronize()
        engine.refresh_masters()
        engine.averages.begin(nullcontext() if engine.in_backward is None else engine.reducer.no_sync())

    @collective
    def _put_weights_back(self) -> None:
        self._engine.averages.end()

    @collective
    def synchronize(self) -> None:
        """Wait until all parameters are gathered and no peer reads them any more. Collective.

        Without ``overlap_gather``, returns at once.
        """
        self._engine.gatherer.synchronize()

    @collective
    @repeated_by_joined_ranks
    @torch.no_grad()
    def _unscale(self, inverse_scale: Tensor, *, in_place: bool) -> Tensor:
        """Call ``StepEngine.unscale``, for GradScaler. Collective."""
        self._add_unfrozen_params(between_steps=False)
        if not self._engine.must_sync:
            return torch.zeros((), device="cpu")
        return self._engine.unscale(inverse_scale, self.param_groups, in_place=in_place)

    @collective
    @repeated_by_joined_ranks
    @torch.no_grad()
    def _measure(self, count: int) -> tuple[Tensor, Tensor]:
        """Call ``StepEngine.measure``, for ``clip_grad_norm_`` of ``count`` optimizers. Collective."""
        self._add_unfrozen_params(between_steps=False)
        return self._engine.measure(f"clip_grad_norm_ of {count} optimizers", self.param_groups)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True makes torch's GradScaler set ``grad_scale`` before ``step``, which then raises."""
        return self.gradient_sync != "external"

    # Parameters

    @collective
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch. Collective: all ranks must add the same. Raises as the constructor does."""
        count = len(self.param_groups)
        if not self._is_built:  # called by torch.optim.Optimizer.__init__
            arguments.check_group(param_group, self.defaults)
            super().add_param_group(self._parameters.take_group(count, param_group))
            return
        engine, parameters = self._engine, self._parameters
        engine.averages.refuse("add_param_group()")
        trained = len(parameters.params)
        try:
            with agreed(engine.transport.control) as claims:
                arguments.check_group(param_group, self.defaults)
                super().add_param_group(parameters.take_group(count, param_group))
                named = named_parameters(self.param_groups, count)
                parameters.check(named)
                parts = [*parameters.taken(), *(one.parameter for one in named)]
                arguments.check_parts(parts, engine.job, engine.transport)
                claims += parameters.claims(self.param_groups[count:], named, first_group=count)
            parameters.connect_groups(named)
            self._add_params(named)
        except Exception:
            if len(parameters.params) == trained:  # else the group was added, and what followed has failed
                del self.param_groups[count:]
                parameters.forget_group(count)
            raise

    def _current_groups(self) -> list[dict[str, Any]]:
        return self.param_groups

    def _add_params(self, named: list[NamedParameter]) -> None:
        self._state.bind(self._engine.add_params(named))

    @collective
    def sync_module(self, module: torch.nn.Module) -> None:
        """Broadcast rank 0's buffers of ``module``, and its parameters that this optimizer does not have. Collective.

        DDP's constructor does the same. From then on, ``step`` warns once if nobody averages those parameters'
        gradients.
        """
        self._engine.gatherer.synchronize()
        left = [*self._engine.outside(module).values(), *module.buffers()]
        self._engine.parameters.broadcast([placement.local_tensor(tensor) for tensor in left])

    @collective
    def average_gradients(self, parameters: Tensor | Iterable[Tensor]) -> None:
        """Average ``p.grad`` of parameters that another optimizer trains over all ranks, in place. Collective.

        Call it on all ranks between backward and the other optimizer's step. If a parameter has a gradient on some
        ranks only, the others count as zeros and get one. Sums in float32, or in float64 for float64.

        Args:
            parameters: the same on all ranks, none of this optimizer's. Gradients may be sparse (COO).

        Raises:
            ValueError: one of them is this optimizer's, which averages its own, or not a parameter.
        """
        self._engine.average_gradients(parameters)

    @property
    def _checkpoint_seam(self) -> CheckpointSeam:
        return CheckpointSeam(self._engine, self._add_unfrozen_params, self._state_was_loaded)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"A {type(self).__name__} holds buffers and process groups and cannot be copied or pickled. Build a new "
            "one and load state_dict() into it."
        )
