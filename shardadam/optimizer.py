# SPDX-License-Identifier: Apache-2.0
"""ShardedAdam and ShardedAdamW: torch.optim's surface. ``engine/step.py`` does the work."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import Optimizer, ParamsT

from shardadam.checks import arguments, replicas
from shardadam.checks.misuse import warn_of_torchs_clipping
from shardadam.engine.checkpoint_seam import CheckpointSeam
from shardadam.engine.collective import collective
from shardadam.engine.parameters import agreed, named_parameters
from shardadam.engine.step import StepEngine
from shardadam.engine.step_sync import ALIKE
from shardadam.engine.storage import NamedParameter
from shardadam.precision import Precision
from shardadam.ranks import agreement
from shardadam.state import local, memory, whole
from shardadam.state.memory import Memory
from shardadam.state.state_dict import local_state_dict, shallow_copy, whole_state_dict
from shardadam.state.torch_view import OptimizerState
from shardadam.transport import Transport, connect

GradientSync = Literal["backward", "step", "external"]


class ShardedAdam(Optimizer):
    """torch.optim.Adam with its state split over the ranks of a process group (ZeRO stages 1 and 2).

    Collective: all ranks must build the same optimizer over the same model. It broadcasts rank 0's parameter values and
    makes trainable parameters views of flat buffers; their shape, strides, ties and identity stay.

    Args:
        params: what torch.optim.Adam takes: tensors, (name, tensor) pairs, or param groups of either.
        lr: learning rate, a float or a tensor of one element.
        betas: decay rates of exp_avg and exp_avg_sq, floats.
        eps: added to the denominator.
        weight_decay: coefficient of the L2 penalty, or of decoupled decay.
        amsgrad: True is refused.
        maximize: maximise the objective instead of minimising it.
        decoupled_weight_decay: decay as in AdamW.
        process_group: a ProcessGroup or a 1-D DeviceMesh to shard over. None: the default group, or this process alone
            if torch.distributed is not initialised. A 2-D DeviceMesh (replicas, shards) splits state over its last
            dimension, keeps equal shards along its first, and averages gradients over both (hybrid sharding).
        gradient_sync: who averages gradients over ranks, and when. ``"backward"``: this optimizer reduce-scatters them
            while backward runs and frees them (ZeRO-2). ``"step"``: they stay in ``p.grad``, and ``step`` reduces them
            (ZeRO-1). ``"external"``: ``p.grad`` is averaged already (DDP, Trainer); only state is sharded.
        max_grad_norm: clip the global 2-norm of the averaged gradients inside ``step``.
        precision: number formats of the state, and of gradients in transfer.
        bucket_mb: size of a bucket, in MiB of parameters; None: 8 on the CPU, 32 on GPUs.
        transport: ``"shared_memory"``: CPU ranks of one host read each other's memory. ``"collective"``:
            torch.distributed. ``"auto"``: shared memory where possible, else torch.distributed. Or a Transport that
            belongs to this optimizer alone.
        foreach: accepted for compatibility and ignored: the update is always fused.
        capturable: as ``foreach``.
        fused: as ``foreach``.
        differentiable: True is refused.

    Raises:
        ValueError, TypeError: an argument is not as described, or ranks disagree (on every rank).
        RuntimeError: another rank could not build its optimizer.

    ``skipped_steps`` counts steps not taken because a gradient was infinite or NaN on some rank, 0-dim int64 on the
    device.
    """

    _is_built = False
    _state: OptimizerState

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
        )
        if not isinstance(transport, Transport):
            exact_sums = getattr(precision, "accumulate", None) == "fp32"
            transport = connect(process_group, kind=transport, exact_sums=exact_sums)
        try:
            with agreed(transport.control) as claims:
                options.check()
                super().__init__(params, defaults)
                named = named_parameters(self.param_groups)
                arguments.check_parameters(named, options.precision)
                claims += [*options.claims(), *arguments.claims(self.param_groups, named)]
        except Exception:
            transport.close(clean=True)
            raise
        except BaseException:
            transport.abort()
            raise
        device = next((p.parameter.device for p in named if p.parameter.requires_grad), torch.device("cpu"))
        self._engine = StepEngine(transport, options, device)
        self.skipped_steps = self._engine.skipped_steps
        self._consolidated: dict[str, Any] | None = None
        self._add_params(named)
        if gradient_sync != "external":
            warn_of_torchs_clipping()
        self._is_built = True
        weakref.finalize(self, self._engine.release).atexit = False

    @property
    def grad_norm(self) -> Tensor | None:
        """2-norm of the averaged gradients before clipping at the last ``step`` that clipped, 0-dim float32 on the
        device; else None.
        """
        return self._engine.grad_norm

    @property
    def gradient_sync(self) -> str:
        """As it was built: ``"backward"``, ``"step"`` or ``"external"``."""
        return self._engine.options.gradient_sync

    @property
    def state(self) -> OptimizerState:
        """State by parameter, views of this rank's shards. Emptying or assigning it changes them; all ranks alike."""
        return self._state

    @state.setter
    def state(self, entries: Mapping[Tensor, Any]) -> None:
        if self._is_built:
            self._state.replace(entries)
        else:  # torch.optim.Optimizer.__init__
            self._state = OptimizerState()

    # The step

    @collective
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates parameters with the gradients since the last step, averaged over ranks. Collective.

        Leaves a parameter alone if it has a gradient on no rank; if it has one on some ranks, the others count as zero.
        If a gradient is infinite or NaN on any rank, no rank changes anything but ``skipped_steps``.

        Args:
            closure: reevaluates the model and returns the loss, as in torch.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            RuntimeError: a parameter was moved to another device, dtype or shape after the optimizer was built, or
                another optimizer was built over it, or an earlier call was interrupted while it wrote.
            ValueError: on every rank, if ranks make different calls or have different hyperparameters.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._add_unfrozen_params()
        if self._engine.parameters.params:
            self._refuse_torchs_grad_scaler()
            self._engine.step(self.param_groups)
            self._consolidated = None
        return loss

    @collective
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discards all gradients, also those that are reduced already, which ``model.zero_grad()`` cannot reach.

        Collective with ``gradient_sync="backward"``: it completes reductions under way. The first call after a step
        costs nothing. A further one, to skip a batch, also lets a rank whose forward or backward raised catch up.
        """
        if self._is_built:
            self._engine.zero_grad()
        super().zero_grad(set_to_none)

    def no_sync(self) -> AbstractContextManager[None]:
        """Makes backward accumulate into ``p.grad`` and reduce nothing inside the block, as in DDP.

        All ranks must use it alike. The next backward outside, or ``step``, reduces what has accumulated.
        """
        return self._engine.reducer.no_sync()

    @collective
    def clip_grad_norm_(self, max_norm: float | Tensor) -> Tensor:
        """Clips the 2-norm of all averaged gradients together to ``max_norm``. Collective.

        ``step`` applies the scale, which is computed from the gradients as they are now. If backward runs again before
        ``step``, its gradients get the same scale; with ``gradient_sync`` "step" and "external", gradients that change
        before ``step`` are not clipped.

        Returns:
            The norm before clipping, 0-dim float32, on the device.
        """
        self._add_unfrozen_params()
        if not self._engine.parameters.params:
            return torch.zeros(())
        return self._engine.clip_grad_norm_(max_norm, self.param_groups)

    def overlap_gather(self, model: torch.nn.Module) -> None:
        """Runs all-gathers under the next forward of ``model``: from now on ``step`` returns without waiting for them.

        Every module waits for its own parameters. The model's forward, ``state_dict`` and ``load_state_dict`` wait, and
        so do the optimizer's methods. Call ``synchronize`` before anything else reads or writes parameters after a
        step: copies, averages, writes by hand, parameters used without calling their module. Local, but all ranks must
        call it; call it before torch.compile.

        Raises:
            RuntimeError: ``model`` is compiled already, and would not wait.
            ValueError: ``model`` has none of the optimizer's parameters.
        """
        self._engine.overlap_gather(model)

    @collective
    def synchronize(self) -> None:
        """Waits until all parameters are gathered and no peer reads them any more. Collective.

        Costs nothing without ``overlap_gather``.
        """
        self._engine.gatherer.synchronize()

    @collective
    @torch.no_grad()
    def _unscale(self, inverse_scale: Tensor, *, in_place: bool) -> Tensor:
        """``StepEngine.unscale``, for GradScaler. Collective."""
        self._add_unfrozen_params()
        if not self._engine.parameters.params:
            return torch.zeros(())
        return self._engine.unscale(inverse_scale, self.param_groups, in_place=in_place)

    def _refuse_torchs_grad_scaler(self) -> None:
        if "grad_scale" in self.__dict__:  # set by a GradScaler of torch, around the step
            del self.__dict__["grad_scale"], self.__dict__["found_inf"]
            raise RuntimeError(
                "torch.amp.GradScaler cannot see gradients that are not averaged yet, and would let ranks skip "
                "different steps. Use shardadam.GradScaler; it takes the same arguments."
            )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True makes torch's GradScaler set ``grad_scale`` around ``step``, which then refuses it."""
        return self.gradient_sync != "external"

    # Parameters

    @collective
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as in torch. Collective: all ranks must add the same."""
        if not self._is_built:  # called by torch.optim.Optimizer.__init__
            arguments.check_group(param_group, self.defaults)
            super().add_param_group(param_group)
            return
        count = len(self.param_groups)
        engine = self._engine
        try:
            with agreed(engine.transport.control) as claims:
                arguments.check_group(param_group, self.defaults)
                super().add_param_group(param_group)
                named = named_parameters(self.param_groups, count)
                arguments.check_parameters(named, engine.options.precision, taken=engine.parameters.taken())
                claims += arguments.claims(self.param_groups[count:], named, first_group=count)
        except Exception:
            del self.param_groups[count:]
            raise
        self._add_params(named)

    def _add_params(self, named: list[NamedParameter]) -> None:
        for param in self._engine.add_params(named):
            self._state.bind(param)

    def _add_unfrozen_params(self) -> None:
        """Adds parameters that were frozen before and are trainable now. Collective if there are any."""
        for param in self._engine.add_unfrozen_params():
            self._state.bind(param)

    @collective
    def sync_module(self, module: torch.nn.Module) -> None:
        """Broadcasts rank 0's buffers, and its parameters that this optimizer was not given. Collective.

        DDP's constructor does the same.
        """
        self._engine.gatherer.synchronize()
        seen = {id(p) for group in self.param_groups for p in group["params"]}
        tensors = [*module.parameters(), *module.buffers()]
        self._engine.parameters.broadcast(tensor for tensor in tensors if id(tensor) not in seen)

    # Looking inside

    @collective
    def check_in_sync(self) -> None:
        """Checks with checksums that all ranks hold the same bits. Collective.

        Compares parameters, frozen ones too, step counters, ``skipped_steps`` and hyperparameters; with hybrid
        sharding also the state of replicas. Reads everything once, sends one number per rank, and changes nothing. A
        shard without replicas has no copy to compare with.

        Raises:
            ValueError: hyperparameters differ, or a parameter's shape, dtype, strides or ``requires_grad``.
            RuntimeError: other values differ; names the first of them, and the ranks.
        """
        engine = self._engine
        engine.step_sync.read_all()
        claims = arguments.claims(self.param_groups, named_parameters(self.param_groups))
        agreement.require(claims, engine.transport.control, remedy=f"{ALIKE} Nothing has been written.")
        self._add_unfrozen_params()
        engine.gatherer.synchronize()
        parameters = engine.parameters
        tensors = replicas.replicated_tensors(
            parameters.params, parameters.frozen, engine.skipped_steps, engine.transport
        )
        replicas.check(tensors, engine.transport.rank, engine.transport.control)

    @collective
    def full_grad(self, parameter: Tensor) -> Tensor | None:
        """The parameter's averaged gradient as ``step`` would use it. Collective.

        Returns:
            A new tensor of the parameter's shape, float32 (float64 for float64 parameters); None if no rank has one.
        """
        self._add_unfrozen_params()
        return self._engine.full_grad(parameter, self.param_groups)

    @collective
    def full_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The parameter's whole state: step, exp_avg, exp_avg_sq and, where there is one, master. Collective.

        Returns:
            New tensors of the parameter's shape, float32 (float64 for float64 parameters); ``step`` is 0-dim.
        """
        self._add_unfrozen_params()
        self._engine.gatherer.synchronize()
        return whole.of_one(self._engine.parameters.find(parameter), self._engine.transport)

    def memory(self) -> Memory:
        """Bytes that the optimizer holds on this rank now, by kind. Local."""
        return memory.held_by(self._engine.parameters.arenas, self._engine.reducer)

    # State

    def state_dict(self) -> dict[str, Any]:
        """This rank's shard of the state, in torch's form. Local.

        On several ranks, tensors are ``FlatShard``: they have the parameter's shape, hold this rank's elements only,
        and share the optimizer's memory and format. torch.distributed.checkpoint saves them, and loads them on any
        number of ranks; pickling one raises TypeError. On one rank they are ordinary tensors. After
        ``consolidate_state_dict``, and until the next step, the rank named there gets the whole state instead.
        """
        self._engine.gatherer.wait_all()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        if self._consolidated is not None:
            state_dict = shallow_copy(self._consolidated)
        else:
            world_size = self._engine.transport.world_size
            state_dict = local_state_dict(self._engine.parameters, self.param_groups, world_size=world_size)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    @collective
    def full_state_dict(self) -> dict[str, Any]:
        """The whole state on rank 0, as torch.optim.Adam/AdamW has it; an empty dict on other ranks. Collective.

        Tensors are new, on the CPU, of the parameters' shapes, and float32 (float64 for float64 parameters) whatever
        format they are stored in. Parameters with a master also have ``master``, which torch's optimizers keep and
        ignore.
        """
        return self._whole_state_dict(to=0) or {}

    @collective
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gathers the whole state on one rank, where ``state_dict()`` returns it until the next step. Collective.

        ZeroRedundancyOptimizer's spelling of ``full_state_dict``.

        Args:
            to: rank in the optimizer's process group.
        """
        self._consolidated = self._whole_state_dict(to=to)

    def _whole_state_dict(self, *, to: int) -> dict[str, Any] | None:
        self._add_unfrozen_params()
        self._engine.gatherer.synchronize()
        return whole_state_dict(self._engine.parameters, self.param_groups, self._engine.transport, to=to)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads this rank's own ``state_dict()``, or its shard of a whole one of torch.optim.Adam/AdamW. Local.

        Loads the hyperparameters of the param groups too, as torch does. If ``state_dict`` has no master weights, they
        are taken from the parameters: load the model first.

        Raises:
            ValueError: ``state_dict`` does not fit this optimizer. Nothing has been changed.
        """
        self._engine.gatherer.wait_all()
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        for group in state_dict["param_groups"]:
            arguments.check_group({key: value for key, value in group.items() if key != "params"}, self.defaults)
        local.load_local(self.param_groups, self._engine.parameters.params, state_dict)
        self._state_was_loaded(parameters=False)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _state_was_loaded(self, *, parameters: bool) -> None:
        self._consolidated = None
        self._engine.state_was_loaded(parameters=parameters)

    @property
    def _checkpoint_seam(self) -> CheckpointSeam:
        return CheckpointSeam(self._engine, self._add_unfrozen_params, self._state_was_loaded)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"A {type(self).__name__} holds buffers and process groups and cannot be copied or pickled. Build a new "
            "one and load state_dict() into it."
        )


class ShardedAdamW(ShardedAdam):
    """torch.optim.AdamW with its state split over the ranks of a process group: ``ShardedAdam`` with decoupled
    decay.
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
        )
