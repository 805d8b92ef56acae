# SPDX-License-Identifier: Apache-2.0
"""ShardedAdam and ShardedAdamW: torch.optim's surface over the rooms below. Wires them; does no arithmetic of its
own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import partial, wraps
from operator import attrgetter
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import Optimizer, ParamsT

from shardadam.checks import arguments, replicas
from shardadam.checks.misuse import MisuseWarnings, warn_of_torchs_clipping, watch_other_optimizers
from shardadam.engine.clipping import GlobalGradStats, clip_coefficient
from shardadam.engine.gathering import ParameterGatherer
from shardadam.engine.overlap import OverlappedForward, uncovered
from shardadam.engine.profiling import record
from shardadam.engine.reduction import ExternalGradients, GradientReducer, Reducer
from shardadam.engine.step_sync import ALIKE, StepSync
from shardadam.engine.storage import (
    FlatArena,
    FlatBucket,
    NamedParameter,
    ShardedParam,
    allocate,
    is_dense,
    rebind_moved,
    unrepeated,
)
from shardadam.precision import Precision
from shardadam.ranks import agreement, desync
from shardadam.ranks.signals import interrupts_held
from shardadam.state import local, memory, whole
from shardadam.state.memory import Memory
from shardadam.transport import Transport, connect

GradientSync = Literal["backward", "step", "external"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _collective(
    method: Callable[Concatenate[ShardedAdam, _P], _R],
) -> Callable[Concatenate[ShardedAdam, _P], _R]:
    """Of a method that all ranks must call: makes known that this rank is in it, and does not let a signal break it
    off. What is broken off all the same (by a second one) cannot be gone on from.
    """

    @wraps(method)
    def call(self: ShardedAdam, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with desync.in_call(method.__name__), interrupts_held():
            try:
                return method(self, *args, **kwargs)
            except Exception:
                raise
            except BaseException as error:
                self._poison(f"{method.__name__}() was broken off ({type(error).__name__})")
                self._transport.abort()
                raise

    return call


class ShardedAdam(Optimizer):
    """torch.optim.Adam with its state split over the ranks of a process group (ZeRO stages 1 and 2).

    Collective: all ranks must build the same optimizer over the same model. Rank 0's parameter values are broadcast,
    and trainable parameters become views of flat buffers; shape, strides, ties and identity stay.

    Args:
        params: what torch.optim.Adam takes: tensors, (name, tensor) pairs, or param groups of either.
        lr: learning rate, a float or a tensor of one element.
        betas: decay rates of exp_avg and exp_avg_sq, floats.
        eps: added to the denominator.
        weight_decay: coefficient of the L2 penalty, or of decoupled decay.
        amsgrad: True is refused.
        maximize: maximise the objective instead of minimising it.
        decoupled_weight_decay: decay as in AdamW.
        process_group: a ProcessGroup or a 1-D DeviceMesh to shard over; None: the default group, or this process alone
            where none is initialised. A 2-D DeviceMesh (replicas, shards): state is split over its last dimension, and
            the shards are the same along its first; gradients are averaged over both (hybrid sharding).
        gradient_sync: who averages gradients over ranks, and when. ``"backward"``: reduce-scatter while backward runs,
            full gradients freed (ZeRO-2); ``step`` consumes them. ``"step"``: they stay in ``p.grad`` and are reduced
            inside ``step`` (ZeRO-1). ``"external"``: ``p.grad`` is already averaged (DDP, Trainer), only state is
            sharded.
        max_grad_norm: clip the global 2-norm of the averaged gradients inside ``step``.
        precision: number formats of state and wire.
        bucket_mb: size of a bucket, in MiB of parameters; None: 8 on the CPU, 32 on GPUs.
        transport: ``"shared_memory"``: ranks of one host read each other's memory, for what is on the CPU;
            ``"collective"``: torch.distributed; ``"auto"``: the first where it is possible, else the second; or a
            Transport, for this optimizer alone.
        foreach: accepted, so that this is a drop-in, and ignored: the update is always a fused one.
        capturable: as ``foreach``.
        fused: as ``foreach``.
        differentiable: True is refused.

    Raises:
        ValueError, TypeError: an argument is not as described, or ranks disagree (on every rank).
        RuntimeError: another rank has failed to build its optimizer.

    ``grad_norm`` is the 2-norm of the averaged gradients before clipping at the last ``step`` that clipped, a 0-dim
    float32 tensor on the device, else None. ``skipped_steps`` counts the steps not taken because a gradient was
    infinite or NaN on some rank, a 0-dim int64 tensor on the device.
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
        self._is_built = False
        self._options = options
        self._transport = (
            transport
            if isinstance(transport, Transport)
            else connect(process_group, kind=transport, exact_sums=getattr(precision, "accumulate", None) == "fp32")
        )
        with self._agreement() as claims:
            options.check()
            super().__init__(params, defaults)
            named = [named for index in range(len(self.param_groups)) for named in self._named(index)]
            arguments.check_parameters(named, options.precision)
            claims += [*options.claims(), *arguments.claims(self.param_groups, named)]

        self._params: list[ShardedParam] = []
        self._arenas: list[FlatArena] = []
        self._buckets: list[FlatBucket] = []
        self._frozen: list[NamedParameter] = []
        self._reducer: Reducer
        if gradient_sync == "external":
            self._reducer = ExternalGradients()
        else:
            hooked = gradient_sync == "backward"
            self._reducer = GradientReducer(self._transport, hooked=hooked, with_squares=max_grad_norm is not None)
        self._gatherer = ParameterGatherer(self._transport)
        self._overlaps: list[OverlappedForward] = []
        self._watch = MisuseWarnings()
        self._step_sync = StepSync(self._transport, self._reducer, self._watch)
        # At the first zero_grad after a step all ranks are level, as it is called right after the step or right before
        # the next backward. At another, one whose forward or backward has raised may have missed a round of its peers.
        self._peers_may_be_ahead = gradient_sync == "backward"
        # What gradients are multiplied by: what clipping asks for, and 1 / the loss scale.
        self._coefficient: Tensor | None = None
        self._inverse_scale: Tensor | None = None
        self.grad_norm: Tensor | None = None
        device = next((p.parameter.device for p in named if p.parameter.requires_grad), torch.device("cpu"))
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._add_params(named)
        self._consolidated: dict[str, Any] | None = None
        self._poisoned_by: str | None = None
        self._steps = 0  # since the optimizer was built
        if gradient_sync != "external":
            warn_of_torchs_clipping()
        watch_other_optimizers(self)
        self._is_built = True
        weakref.finalize(self, _release, self._reducer, self._watch, self._transport).atexit = False

    # The step

    @_collective
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step with the averages over ranks of all gradients since the last. Collective.

        A parameter that has a gradient on no rank is left alone; one that has a gradient on some counts as zero on the
        others. If a gradient is infinite or NaN on any rank, nothing changes on any but ``skipped_steps``.

        Args:
            closure: reevaluates the model and returns the loss, as in torch.

        Raises:
            RuntimeError: a parameter was moved to another device, dtype or shape after the optimizer was built, or
                another optimizer has been built over it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._add_unfrozen_params()
        if not self._params:
            return loss
        if self._reducer.is_superseded:
            raise RuntimeError(
                "Another optimizer has been built over this one's parameters since, and reduces their gradients now. "
                "Use that one, and drop this one."
            )
        self._check_not_poisoned("step")
        self._refuse_torchs_grad_scaler()
        self._gatherer.synchronize()
        rebind_moved(self._params)
        max_norm = self._options.max_grad_norm
        seen = self._look("step", with_norm=max_norm is not None)
        if max_norm is not None:
            self._clip(seen, max_norm)
        self._watch.before_update()
        self._step_sync.step_begins()
        try:
            self._update(seen)
        except Exception as error:
            self._poison(f"step() was broken off while it wrote ({type(error).__name__})")
            raise
        self._watch.after_update(self._params)
        return loss

    def _update(self, seen: GlobalGradStats) -> None:
        """What ``step`` writes. Collective."""
        used = self._begin_update(seen)
        for index in reversed(self._reducer.order):
            bucket = self._buckets[index]
            with record("update"):
                bucket.arena.update.step_(bucket.shard, bucket.plan, self._reducer.sources(bucket))
            self._gatherer.dispatch(bucket)
        if self._overlaps:
            self._gatherer.wait_for(uncovered(self._buckets, self._overlaps))
            self._reducer.await_readers()
        else:
            self._gatherer.synchronize()
        # The writes went past autograd, by way of the flat buffers: without this, a graph built before the step would
        # be differentiated with the new values and nobody would notice.
        torch.autograd.graph.increment_version(
            [param.parameter for param in self._params if used is None or used[param.index]]
        )
        self._reducer.learn_order()
        if seen.norm is None or self._inverse_scale is None:
            self.grad_norm = seen.norm
        else:
            self.grad_norm = seen.norm * self._inverse_scale
        self._forget_gradients()
        self._peers_may_be_ahead = False
        self._consolidated = None
        self._steps += 1

    @_collective
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discards all gradients, reduced or not; ``model.zero_grad()`` cannot reach those that are reduced.

        Collective with ``gradient_sync`` "backward": it completes what is under way. Called once after (or before) each
        step, as usual, it costs nothing; called again, because a batch is skipped, it also lets a rank whose forward
        or backward has raised catch up with the others.
        """
        if self._is_built:
            if self._peers_may_be_ahead:
                most = agreement.largest(self._reducer.rounds_since_reset, self._transport.control)
                self._reducer.catch_up(most)
            self._peers_may_be_ahead = self._options.gradient_sync == "backward"
            self._forget_gradients()
        super().zero_grad(set_to_none)

    def no_sync(self) -> AbstractContextManager[None]:
        """Inside, backward accumulates into ``p.grad`` on this rank and reduces nothing, as in DDP.

        All ranks must use it alike. Gradients go into the next backward outside, or into ``step``.
        """
        return self._reducer.no_sync()

    @_collective
    def clip_grad_norm_(self, max_norm: float | Tensor) -> Tensor:
        """Clips the 2-norm of all averaged gradients together to ``max_norm``; ``step`` applies the scale. Collective.

        The scale is that of the gradients as they are now. Further gradients, if backward runs before ``step``, get it
        too; with ``gradient_sync`` "step" and "external" gradients that have changed since are taken unclipped.

        Returns:
            The norm before clipping, 0-dim float32, on the device.
        """
        self._add_unfrozen_params()
        if not self._params:
            return torch.zeros(())
        return self._clip(self._look("clip_grad_norm_", with_norm=True), max_norm)

    def overlap_gather(self, model: torch.nn.Module) -> None:
        """From now on ``step`` does not wait for its all-gathers; they run under the next forward of ``model``, each of
        whose modules waits for its own parameters. Local; all ranks must call it.

        Call it before torch.compile. The model's forward, ``state_dict`` and ``load_state_dict`` wait, and so do the
        optimizer's methods. Before anything else reads or writes parameters after a step (copies, averages, writes by
        hand, a submodule's parameters used without a forward), call ``synchronize``.

        Raises:
            RuntimeError: ``model`` has been compiled, and would not wait.
            ValueError: it has none of the optimizer's parameters.
        """
        params = {id(param.parameter): param for param in self._params}
        self._overlaps.append(OverlappedForward(model, params, self._gatherer))

    @_collective
    def synchronize(self) -> None:
        """Waits until all parameters are what the last step has made of them, and no other rank reads them any more.
        Collective: all ranks must call it. Costs nothing without ``overlap_gather``.
        """
        self._gatherer.synchronize()

    def _look(self, call: str, *, with_norm: bool) -> GlobalGradStats:
        """Closes the round, completes the reduction and finds out what all ranks must know. Collective, once a step.

        Raises:
            ValueError: on every rank, where ranks are in different calls, have taken different numbers of steps, or
                have different hyperparameters. Nothing has been written then; on a GPU it is raised at the next call,
                and the step was not taken.
        """
        self._reducer.close()
        if self._reducer.rounds != self._step_sync.rounds and self._options.gradient_sync != "backward":
            self._coefficient = self._inverse_scale  # these are other gradients than those that were clipped
        device = self._buckets[0].parameters.device
        return self._step_sync.look(partial(self._intentions, call), with_norm=with_norm, device=device)

    def _intentions(self, call: str) -> list[agreement.Claim]:
        """What ranks must be alike in when they meet in the middle of training."""
        return [
            agreement.Claim("which call they are in:", "", call),
            agreement.Claim("how many steps they have taken:", "", str(self._steps)),
            agreement.Claim("their gradients:", "", self._reducer.local_error or "in order"),
            *arguments.claims(self.param_groups, [], may_wait=False),
        ]

    def _clip(self, seen: GlobalGradStats, max_norm: float | Tensor) -> Tensor:
        assert seen.norm is not None
        norm = seen.norm if self._coefficient is None else seen.norm * self._coefficient
        coefficient = clip_coefficient(norm, max_norm)
        self._coefficient = coefficient if self._coefficient is None else self._coefficient * coefficient
        return norm

    @_collective
    @torch.no_grad()
    def _unscale(self, inverse_scale: Tensor, *, in_place: bool) -> Tensor:
        """Takes a loss scale out of the gradients that are there; ``clip_grad_norm_``, ``full_grad`` and ``step`` see
        them without it. Collective.

        Args:
            inverse_scale: 1 / the loss scale, a tensor of one element.
            in_place: what stays in ``p.grad`` is unscaled there, too.

        Returns:
            1 if a gradient is infinite or NaN on any rank, else 0; 0-dim float32.
        """
        self._add_unfrozen_params()
        if not self._params:
            return torch.zeros(())
        if in_place and self._options.gradient_sync != "backward":
            for param in self._params:
                if param.parameter.grad is not None and param.parameter.grad.dtype == torch.float16:
                    raise ValueError(
                        f"unscale_: the gradient of {param.name!r} is float16 and would underflow in p.grad. Build "
                        'the optimizer with gradient_sync="backward", or leave unscaling to GradScaler.step.'
                    )
            for param in self._params:
                if param.parameter.grad is not None:
                    param.parameter.grad.mul_(inverse_scale.to(param.parameter.grad.device))
        else:
            self._inverse_scale = self._coefficient = inverse_scale.reshape(()).float()
        return self._look("GradScaler.unscale_", with_norm=self._options.max_grad_norm is not None).found_inf

    def _refuse_torchs_grad_scaler(self) -> None:
        if "grad_scale" in self.__dict__:  # set by a GradScaler of torch, around the step
            del self.__dict__["grad_scale"], self.__dict__["found_inf"]
            raise RuntimeError(
                "torch.amp.GradScaler cannot see gradients that are not averaged yet, and would let ranks skip "
                "different steps. Use shardadam.GradScaler; it takes the same arguments."
            )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Makes torch's GradScaler announce itself; averaged gradients in ``p.grad`` it may treat as any others."""
        return self._options.gradient_sync != "external"

    def _begin_update(self, seen: GlobalGradStats) -> list[bool] | None:
        """Counts a step on every arena.

        Returns:
            Which parameters take part, as far as the host knows: None for all.
        """
        self.skipped_steps += seen.found_inf.to(self.skipped_steps)
        # Only a rank that lacks a gradient itself has to look which parameters take part.
        must_look = not seen.all_used and any(arena.update.needs_host_used for arena in self._arenas)
        used = seen.used.tolist() if must_look else None
        for arena in self._arenas:
            device = arena.parameters.device
            arena.update.begin(
                found_inf=seen.found_inf.to(device),
                used=seen.used[arena.indices].to(device),
                host_used=None if used is None else used[arena.indices],
                coefficient=None if self._coefficient is None else self._coefficient.to(device),
                hyperparameters=self.param_groups[arena.group_index],
            )
        return used

    def _forget_gradients(self) -> None:
        self._reducer.reset()
        self._step_sync.forget()
        self._coefficient = self._inverse_scale = None

    # Parameters

    @_collective
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as in torch. Collective: all ranks must add the same."""
        if not self._is_built:  # called by torch.optim.Optimizer.__init__
            arguments.check_group(param_group, self.defaults)
            super().add_param_group(param_group)
            return
        count = len(self.param_groups)
        try:
            with self._agreement() as claims:
                arguments.check_group(param_group, self.defaults)
                super().add_param_group(param_group)
                named = self._named(count)
                arguments.check_parameters(
                    named, self._options.precision, taken=[param.parameter for param in self._params]
                )
                claims += arguments.claims(self.param_groups[count:], named, first_group=count)
        except Exception:
            del self.param_groups[count:]
            raise
        self._add_params(named)

    @contextmanager
    def _agreement(self) -> Iterator[list[agreement.Claim]]:
        """Collective: raises on all ranks if what is inside raises on any, or adds unequal claims to the list."""
        claims: list[agreement.Claim] = []
        try:
            yield claims
        except Exception as error:
            agreement.announce_failure(error, self._transport.control)
            self._close_unless_built()
            raise
        try:
            agreement.require(claims, self._transport.control)
        except Exception:
            self._close_unless_built()
            raise

    def _close_unless_built(self) -> None:
        if not self._is_built:
            self._transport.close(clean=True)

    def _named(self, group_index: int) -> list[NamedParameter]:
        group = self.param_groups[group_index]
        names = group.get("param_names") or [
            f"param_groups[{group_index}]['params'][{index}]" for index in range(len(group["params"]))
        ]
        first = sum(len(earlier["params"]) for earlier in self.param_groups[:group_index])
        return [
            NamedParameter(parameter, name, group_index, param_id)
            for param_id, (parameter, name) in enumerate(zip(group["params"], names, strict=True), first)
        ]

    def _add_params(self, named: Sequence[NamedParameter]) -> None:
        """Makes the trainable ones params, and gives all of them rank 0's values. Collective; ranks have agreed."""
        self._reducer.close_open_round()
        self._reducer.wait_all()
        self._gatherer.synchronize()
        self._step_sync.forget()
        trainable = [p for p in named if p.parameter.requires_grad]
        frozen = [p for p in named if not p.parameter.requires_grad]
        arenas = allocate(
            trainable,
            transport=self._transport,
            precision=self._options.precision,
            bucket_bytes=self._options.bucket_bytes(p.parameter.device for p in trainable),
            first_index=len(self._params),
        )
        params = [param for arena in arenas for param in arena.params]
        buckets = [bucket for arena in arenas for bucket in arena.buckets]
        self._broadcast([*(bucket.parameters for bucket in buckets), *(p.parameter for p in frozen)])
        for bucket in buckets:
            if bucket.shard.master is not None:
                bucket.shard.master.copy_(bucket.shard.parameter)
        self._arenas += arenas
        self._params += params
        self._buckets += buckets
        self._frozen += frozen
        self._reducer.add(params, buckets)
        for param in params:
            self.state[param.parameter] = local.torch_state(param)

    def _add_unfrozen_params(self) -> None:
        """Makes params of parameters that were frozen when they came and are not any more. Collective if there are
        any.
        """
        unfrozen = [p for p in self._frozen if p.parameter.requires_grad]
        if not unfrozen:
            return
        with self._agreement() as claims:
            arguments.check_parameters(
                unfrozen, self._options.precision, taken=[param.parameter for param in self._params]
            )
            claims += arguments.claims([], unfrozen)
        self._frozen = [p for p in self._frozen if not p.parameter.requires_grad]
        self._add_params(unfrozen)

    @_collective
    def sync_module(self, module: torch.nn.Module) -> None:
        """Broadcasts rank 0's values of what the optimizer does not see: buffers, and parameters it was not given.

        Collective. DDP's constructor does the same.
        """
        self._gatherer.synchronize()
        seen = {id(p) for group in self.param_groups for p in group["params"]}
        tensors = [*module.parameters(), *module.buffers()]
        self._broadcast([tensor for tensor in tensors if id(tensor) not in seen])

    @torch.no_grad()
    def _broadcast(self, tensors: Sequence[Tensor]) -> None:
        transfers = []
        for tensor in tensors:
            if tensor.numel() == 0:
                continue
            whole = unrepeated(tensor.detach())
            dense = whole if is_dense(whole) else whole.contiguous()
            transfers.append((self._transport.broadcast(dense), whole, dense))
        for pending, whole, dense in transfers:
            pending.wait()
            if dense is not whole:
                whole.copy_(dense)
        for pending, _, _ in transfers:
            pending.await_release()

    # Looking inside

    @_collective
    def check_in_sync(self) -> None:
        """Proves with checksums that all ranks hold the same: parameters, frozen ones too, step counters,
        ``skipped_steps`` and hyperparameters; with hybrid sharding also the state of ranks with equal shards.
        Collective.

        Reads all of it once, in stretches of 1 MiB, and exchanges one number a rank; changes nothing. What one rank
        alone holds (its shard of the moments, without replicas) has no copy to compare with.

        Raises:
            ValueError: hyperparameters, or a parameter's shape, dtype, strides or ``requires_grad``, differ.
            RuntimeError: something else does; names the first that does, on which ranks, and the element.
        """
        named = [named for index in range(len(self.param_groups)) for named in self._named(index)]
        self._step_sync.read()
        remedy = f"{ALIKE} Nothing has been written."
        agreement.require(arguments.claims(self.param_groups, named), self._transport.control, remedy=remedy)
        self._add_unfrozen_params()
        self._gatherer.synchronize()
        subjects = replicas.copies(self._params, self._frozen, self.skipped_steps, self._transport)
        replicas.check(subjects, self._transport.rank, self._transport.control)

    @_collective
    def full_grad(self, parameter: Tensor) -> Tensor | None:
        """The parameter's averaged gradient as ``step`` would use it, or None if it has one on no rank. Collective.

        Returns:
            A new tensor of the parameter's shape, float32 (float64 for float64 parameters).
        """
        self._add_unfrozen_params()
        param = self._param(parameter)
        seen = self._look("full_grad", with_norm=self._options.max_grad_norm is not None)
        if not bool(seen.used[param.index]):
            return None
        self._reducer.sum_up()
        gradient = whole.gather(param, attrgetter("shard.gradient"), self._transport)
        return gradient if self._coefficient is None else gradient.mul_(self._coefficient)

    @_collective
    def full_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The parameter's whole state: step, exp_avg, exp_avg_sq and, for low precision with one, master. Collective.

        Returns:
            New tensors of the parameter's shape, float32 (float64 for float64 parameters); ``step`` is 0-dim.
        """
        self._add_unfrozen_params()
        self._gatherer.synchronize()
        param = self._param(parameter)
        return whole.of_one(param, self._transport)

    def _param(self, parameter: Tensor) -> ShardedParam:
        for param in self._params:
            if param.parameter is parameter:
                return param
        raise ValueError(
            "This tensor is not a trainable parameter of the optimizer. Pass one of its param_groups' params."
        )

    def memory(self) -> Memory:
        """Bytes that the optimizer holds on this rank now, by kind. Local."""
        return memory.held_by(self._arenas, self._reducer)

    # State

    def state_dict(self) -> dict[str, Any]:
        """The state in torch's form, with this rank's shard of every tensor. Local.

        On several ranks, tensors are ``FlatShard``: of the parameter's shape, with this rank's elements alone, in the
        format they are stored in and in the optimizer's own memory. torch.distributed.checkpoint saves them, and loads
        them on any number of ranks; pickling one is refused. On one rank they are ordinary tensors. After
        ``consolidate_state_dict``, and until the next step, it is the whole one on the rank that was named there.
        """
        self._gatherer.wait_all()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        if self._consolidated is not None:
            state_dict = {  # callers may rename the keys of what they are given, as get_optimizer_state_dict does
                "state": {index: {**entry} for index, entry in self._consolidated["state"].items()},
                "param_groups": [{**group} for group in self._consolidated["param_groups"]],
            }
        else:
            params = {id(param.parameter): param for param in self._params}
            entries = {
                index: local.saved_state(params[id(parameter)], world_size=self._transport.world_size)
                for index, parameter in enumerate(p for group in self.param_groups for p in group["params"])
                if id(parameter) in params
            }
            state_dict = {"state": entries, "param_groups": self._packed_groups()}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def _packed_groups(self) -> list[dict[str, Any]]:
        """The param groups, with positions in place of parameters."""
        groups, count = [], 0
        for group in self.param_groups:
            positions = list(range(count, count + len(group["params"])))
            groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": positions})
            count += len(positions)
        return groups

    @_collective
    def full_state_dict(self) -> dict[str, Any]:
        """The whole state as a plain torch.optim.Adam/AdamW has it, on rank 0; an empty dict elsewhere. Collective.

        Tensors are new, on the CPU, of the parameters' shapes, and float32 (float64 for float64 parameters) whatever
        they are stored in. Parameters below float32 with a master also have ``master``, which torch's optimizers keep
        and do not use.
        """
        return self._full_state_dict(to=0) or {}

    @_collective
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gathers the whole state on one rank, where ``state_dict()`` returns it until the next step. Collective.

        ZeroRedundancyOptimizer's spelling of ``full_state_dict``.

        Args:
            to: rank in the optimizer's process group.
        """
        self._consolidated = self._full_state_dict(to=to)

    def _full_state_dict(self, *, to: int) -> dict[str, Any] | None:
        store_barrier = self._transport.store_barrier
        if not 0 <= to < len(store_barrier.ranks):
            raise ValueError(f"to: found {to!r}, expected a rank from 0 to {len(store_barrier.ranks) - 1}")
        is_here = store_barrier.rank == to
        self._add_unfrozen_params()
        self._gatherer.synchronize()
        positions = {
            id(parameter): index
            for index, parameter in enumerate(p for group in self.param_groups for p in group["params"])
        }
        found = whole.of_all(self._arenas, self._transport, keep=is_here)
        if not is_here:
            return None
        entries = {positions[id(param.parameter)]: entry for param, entry in found}
        return {"state": dict(sorted(entries.items())), "param_groups": deepcopy(self._packed_groups())}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a ``state_dict()`` of this rank's, or a whole one of a torch.optim.Adam/AdamW, of which it keeps its
        shard.

        Local. Hyperparameters of the param groups are loaded too, as in torch. Master weights that ``state_dict`` does
        not hold are taken from the parameters: load the model first.

        Raises:
            ValueError: it does not fit this optimizer. Nothing has been changed then.
        """
        self._gatherer.wait_all()
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        for group in state_dict["param_groups"]:
            arguments.check_group({key: value for key, value in group.items() if key != "params"}, self.defaults)
        local.load_local(self.param_groups, self._params, state_dict)
        self._state_was_loaded()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _state_was_loaded(self, *, parameters: bool = False) -> None:
        """Takes notice of what was written into the state, and with ``parameters`` into this rank's shards of the
        parameters; those are gathered then, which is collective.
        """
        self._consolidated = None
        self._poisoned_by = None
        self._step_sync.state_was_loaded()
        for arena in self._arenas:
            arena.update.reload()
        if parameters:
            for bucket in self._buckets:
                self._gatherer.dispatch(bucket)
            self._gatherer.synchronize()
            torch.autograd.graph.increment_version([param.parameter for param in self._params])

    def _poison(self, reason: str) -> None:
        """Until state is loaded, ``step`` and ``shardadam.save`` raise."""
        self._poisoned_by = reason

    def _check_not_poisoned(self, call: str) -> None:
        poisoned_by = self._poisoned_by or self._step_sync.poisoned_by
        if poisoned_by is not None:
            raise RuntimeError(
                f"The optimizer cannot {call}: {poisoned_by}. Load a whole checkpoint into it, on all ranks."
            )

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


def _release(reducer: Reducer, watch: MisuseWarnings, transport: Transport) -> None:
    reducer.remove_hooks()
    watch.remove_hook()
    transport.close(clean=reducer.is_idle)
