# SPDX-License-Identifier: Apache-2.0
"""One step, in order: reduction, statistics, the sync of all ranks, update, gathering.

``StepEngine`` has one object for each of these, and passes gradients from one to the next. It gets torch's param groups
as arguments, and knows nothing else about torch.optim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from shardadam.checks import arguments, claims
from shardadam.checks.misuse import MisuseWarnings
from shardadam.engine import clipping, outside
from shardadam.engine.averaging import ParameterAverages
from shardadam.engine.bindings import rebind_moved
from shardadam.engine.borrowing import lent
from shardadam.engine.gathering import ParameterGatherer, mark_written
from shardadam.engine.in_backward import UpdateInBackward
from shardadam.engine.merging import adjoining
from shardadam.engine.overlap import OverlappedForward, uncovered
from shardadam.engine.parameters import ShardedParameters
from shardadam.engine.reduction import reducer_for
from shardadam.engine.reduction.base import without_experts_of_others
from shardadam.engine.step_sync import Claims, GlobalGradStats, Poison, StepSync
from shardadam.engine.storage import (
    FlatArena,
    FlatBucket,
    NamedParameter,
    ShardedParam,
    gradient_shard,
)
from shardadam.engine.updating import ParamGroups, Updater, scale_of
from shardadam.ranks import agreement
from shardadam.ranks.agreement import Claim
from shardadam.state import averages, masters, whole
from shardadam.sums.stats import clip_coefficient
from shardadam.transport import Job
from shardadam.transport.streams import is_capturing
from shardadam.update import formats


class StepEngine:
    """Everything that one optimizer needs for a step.

    Attributes:
        grad_norm, skipped_steps: of the optimizer, where they are documented.
        poison: why the optimizer must not step, if it must not.
        inverse_scale: 1 / loss scale, by which the update multiplies gradients; None for 1.

    Args:
        parameters: none yet.
        job: all ranks, with those that hold other parts of the model.
        device: of ``skipped_steps``, and of what ranks tell each other before a step.
        param_groups: returns those of the optimizer now; for updates in backward.
    """

    def __init__(
        self, parameters: ShardedParameters, job: Job, device: torch.device, param_groups: Callable[[], ParamGroups]
    ) -> None:
        transport, options = parameters.transport, parameters.options
        self.transport = transport
        self.job = job
        self.options = options
        self.parameters = parameters
        with_squares = options.max_grad_norm is not None
        self.gatherer = ParameterGatherer()
        self.poison = Poison()
        self.averages = ParameterAverages(parameters, self.gatherer, self.poison)
        self.updater = Updater(options.ema_decay, parameters.store)
        self.in_backward: UpdateInBackward | None = None
        if options.update == "backward":
            self.in_backward = UpdateInBackward(
                parameters, self.updater, self.gatherer, self.averages, param_groups=param_groups, poison=self.poison
            )
        take = None if self.in_backward is None else self.in_backward.take
        self.reducer = reducer_for(options.gradient_sync, transport, with_squares=with_squares, take=take)
        self.warnings = MisuseWarnings(self.parameters.params, self.reducer)
        self.step_sync = StepSync(
            transport, job, self.reducer, self.warnings, self.poison, writes_before=self.in_backward is not None
        )
        self.grad_norm: Tensor | None = None
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._is_joining = False
        self._overlaps: list[OverlappedForward] = []
        self._coefficient: Tensor | None = None  # clip coefficient / loss scale, by which the update multiplies, too
        self.inverse_scale: Tensor | None = None
        self._factor = 1.0  # multiplies the mean over ranks
        # At the first zero_grad after a step, all ranks have run equally many rounds. Before a second one, forward or
        # backward may have raised on a rank, which has run fewer rounds than its peers.
        self._peers_may_be_ahead = options.gradient_sync == "backward"

    # Parameters

    def add_params(self, named: Sequence[NamedParameter]) -> list[ShardedParam]:
        """Add parameters that all ranks have agreed on; return those that are trainable. Collective."""
        self.reducer.close_open_round()
        self.reducer.wait_all()
        self.gatherer.synchronize()
        self.step_sync.forget()
        params, buckets = self.parameters.add(named)
        self.reducer.add(params, buckets)
        return params

    def add_unfrozen_params(self) -> list[ShardedParam]:
        """Add parameters that were frozen before and are trainable now. Collective if there are any."""
        unfrozen = self.parameters.take_unfrozen()
        return self.add_params(unfrozen) if unfrozen else []

    # The step

    def step(self, param_groups: ParamGroups) -> None:
        """Complete the reduction, sync all ranks, update this rank's shards and gather parameters. Collective."""
        self._check_may_step()
        self.gatherer.synchronize()
        self.parameters.bindings.restore()
        max_norm = self.options.max_grad_norm
        stats = self.sync_before("step", param_groups, with_norm=max_norm is not None)
        # After the sync: if only some ranks have such a value, all raise there.
        arguments.check_before_step(param_groups)
        if max_norm is not None:
            self._clip(stats, max_norm)
        self.step_sync.step_begins()
        try:
            with lent(self.parameters.arenas, written=True):
                self._update(stats, param_groups)
            self.forget_gradients()
            self._peers_may_be_ahead = False
            self.updater.end()
        except Exception as error:
            self.poison.reason = self.updater.error or f"step() did not complete ({type(error).__name__})"
            raise

    def sync_before(self, call: str, param_groups: ParamGroups, *, with_norm: bool) -> GlobalGradStats:
        """Complete the reduction, and check with one all-reduce that all ranks may write. Collective.

        Args:
            call: the method that is being called; must be the same on all ranks.

        Raises:
            ValueError: on every rank, if ranks are in different calls, have taken different numbers of steps, or have
                different hyperparameters. Nothing has been written. On a GPU the device skips the step, and the next
                call raises.
        """
        if self._is_joining:
            self.reducer.catch_up(agreement.largest(self.reducer.rounds_after_close, self.transport.control))
        self.reducer.close()
        if self.reducer.rounds != self.step_sync.rounds and self.options.gradient_sync != "backward":
            self._coefficient = self.inverse_scale  # the gradients have changed since they were clipped
        buckets = self.parameters.buckets
        return self.step_sync.sync(
            partial(self._claims, call, param_groups),
            with_norm=with_norm,
            device=buckets[0].parameters.device if buckets else self.skipped_steps.device,
            own_groups=self.parameters.own_groups(),
            left_out=None if self.in_backward is None else self.in_backward.left_out,
        )

    def _claims(self, call: str, param_groups: ParamGroups) -> Claims:
        """Return what must be the same on all ranks at each sync."""
        of_job = [
            Claim("which call they are in:", "", call),
            Claim("how many steps they have taken:", "", str(self.step_sync.steps)),
            Claim("their gradients:", "", self.reducer.local_error or "in order"),
            Claim("their offloaded state:", "", self.updater.error or "in order"),
        ]
        return Claims([*of_job, *claims.of_groups(param_groups, may_wait=False)], of_job)

    @property
    def must_sync(self) -> bool:
        """Whether a step is more than nothing: this rank or another of the job has trainable parameters."""
        return bool(self.parameters.params) or self.job.is_parallel

    def _check_may_step(self) -> None:
        if self.reducer.is_superseded:
            raise RuntimeError(
                "Another optimizer has been built over this one's parameters since, and reduces their gradients now. "
                "Use that one, and delete this one."
            )
        if self.updater.error is None:  # else the sync of this step, or its end, raises; see "Note: lost state"
            self.poison.check("step")
        self.averages.refuse("step()")

    def _update(self, stats: GlobalGradStats, param_groups: ParamGroups) -> None:
        """Update the buckets in the order in which the next forward needs them; gather each when it is updated."""
        masters.settle_(self.parameters.params)
        parameters = self.parameters
        in_order = [parameters.buckets[index] for index in reversed(self.reducer.order)]
        if self.in_backward is not None:
            self.skipped_steps += stats.left_out.to(self.skipped_steps)
            used = self.in_backward.finish(param_groups, used=stats.used, all_used=stats.all_used)
            for bucket in in_order:
                self.gatherer.dispatch(bucket)
        else:
            self.skipped_steps += stats.found_inf.to(self.skipped_steps)
            used = self.updater.begin(
                param_groups,
                arenas=parameters.arenas,
                found_inf=stats.found_inf,
                used=stats.used,
                all_used=stats.all_used,
                coefficient_of=self._coefficient_for,
            )
            self.updater.expect(in_order)
            for buckets in adjoining(in_order):
                self.updater.update(buckets, self.reducer.gradients(buckets[0]))
                for bucket in buckets:
                    self.gatherer.dispatch(bucket)
        # A captured step is complete: replays do not run the hooks of the next forward.
        if self._overlaps and not is_capturing(self.skipped_steps.device):
            self.gatherer.wait_for(uncovered(parameters.buckets, self._overlaps))
            self.reducer.await_readers()
        else:
            self.gatherer.synchronize()
        # The update has written to flat buffers. Tell autograd that parameters have changed: backward through a graph
        # from before the step must raise instead of using the new values.
        mark_written([param for param in parameters.params if used is None or used[param.index]])
        self.reducer.learn_order()
        self.grad_norm = None if stats.norm is None else self._in_norm_dtype(stats.norm)
        if self.grad_norm is not None and self.inverse_scale is not None:
            self.grad_norm = self.grad_norm * self.inverse_scale

    def _coefficient_for(self, arena: FlatArena) -> Tensor | None:
        """Return what the update of the arena multiplies gradients by; None for 1."""
        if self._coefficient is None:
            return scale_of(arena)
        coefficient = self._coefficient.to(arena.parameters.device, arena.format.exact_dtype)
        return coefficient if arena.gradient_scale == 1 else coefficient * arena.gradient_scale

    # Before the step

    @contextmanager
    def joining(self) -> Iterator[None]:
        """Context manager for calls that ranks without batches repeat (``joining.py``): all run equally many rounds."""
        before, self._is_joining = self._is_joining, True
        try:
            yield
        finally:
            self._is_joining = before

    def rescale(self, factor: float) -> None:
        """Multiply the mean of gradients over all ranks by ``factor``, until the next step. Before any clipping."""
        self.refuse_in_backward("Join with divide_by_initial_world_size=False")
        self._factor = factor
        exact = torch.full((), factor, dtype=torch.float64, device=self.skipped_steps.device)
        self.inverse_scale = self._coefficient = self._in_norm_dtype(exact)

    def clip_grad_norm_(
        self,
        max_norm: float | Tensor,
        param_groups: ParamGroups,
        *,
        norm_type: float = 2.0,
        parameters: Tensor | Iterable[Tensor] | None = None,
    ) -> Tensor:
        """Make the next step clip; return the norm before clipping. Collective."""
        self.refuse_in_backward("clip_grad_norm_")
        arguments.check_limit("max_norm", max_norm)
        norm_type = float(norm_type)
        if not norm_type > 0:
            raise ValueError(f"norm_type: found {norm_type!r}, expected a positive number, such as 2.0, or inf")
        device = self.skipped_steps.device
        if not self.must_sync:
            return torch.zeros((), device=device)
        if parameters is None and norm_type == 2.0:
            return self._clip(self.sync_before("clip_grad_norm_", param_groups, with_norm=True), max_norm)
        params = self._sum_up_before(f"clip_grad_norm_ with norm_type={norm_type}", param_groups, parameters)
        if not params and not self.job.is_parallel:
            return torch.zeros((), device=device)
        device = params[0].local.device if params else device
        norm = self._in_norm_dtype(clipping.total_norm(params, norm_type, self.transport, self.job, device))
        if self._coefficient is not None:
            norm = norm * self._coefficient
        coefficient = clip_coefficient(norm, max_norm)
        if parameters is None:
            self._scale_by(coefficient)
        else:
            clipping.scale_(params, coefficient)
            self._gradients_have_changed(params)
        return norm

    def clip_grad_value_(
        self, clip_value: float, param_groups: ParamGroups, *, parameters: Tensor | Iterable[Tensor] | None = None
    ) -> None:
        """Clamp every element of the averaged gradients. Collective."""
        self.refuse_in_backward("clip_grad_value_")
        arguments.check_limit("clip_value", clip_value)
        if not self.must_sync:
            return
        params = self._sum_up_before("clip_grad_value_", param_groups, parameters)
        # The shards hold gradients before the coefficient: limit them so that the product is within clip_value.
        limit = clip_value if self._coefficient is None else clip_value / self._coefficient
        clipping.clamp_(params, limit)
        self._gradients_have_changed(params)

    def refuse_in_backward(self, what: str) -> None:
        """Raise ValueError if gradients are used in backward: nothing can read or change them afterwards."""
        if self.in_backward is not None:
            raise ValueError(
                f'{what}: found update="backward", which uses gradients before they can be clipped, scaled or read, '
                f'expected update="step". Build the optimizer with it, or leave out {what}.'
            )

    @property
    def _is_in_step(self) -> bool:
        """Whether backward has begun an update that ``step`` has not completed. The same on all ranks."""
        return self.in_backward is not None and (any(self.reducer.used) or self.reducer.rounds_since_reset > 0)

    def check_between_steps(self) -> None:
        """Raise RuntimeError if an update has begun in backward, that ``step`` has not completed yet, but still can."""
        if self._is_in_step and self.poison.reason is None:
            raise RuntimeError(
                'Found parameters and state half-way through a step, which update="backward" begins in backward, '
                "expected a completed one. Call step() first."
            )

    def _sum_up_before(
        self, call: str, param_groups: ParamGroups, parameters: Tensor | Iterable[Tensor] | None
    ) -> list[ShardedParam]:
        """Write the means to all gradient shards; return the params of ``parameters``, or all. Collective."""
        params = self.parameters.params if parameters is None else self.parameters.trainable(parameters)
        # Other parts of the model have other parameters.
        count = "" if self.job.is_parallel else f" of {len(params)} parameters"
        self.sync_before(f"{call}{count}", param_groups, with_norm=False)
        self.reducer.sum_up()
        self.reducer.make_exact()
        return params

    def _gradients_have_changed(self, params: Sequence[ShardedParam]) -> None:
        """Make the next sync measure the gradient shards of these params again."""
        for bucket in clipping.buckets_of(params):
            self.reducer.measure_again(bucket)
        self.step_sync.forget()

    def _clip(self, stats: GlobalGradStats, max_norm: float | Tensor) -> Tensor:
        assert stats.norm is not None
        norm = self._in_norm_dtype(stats.norm)
        norm = norm if self._coefficient is None else norm * self._coefficient
        self._scale_by(clip_coefficient(norm, max_norm))
        return norm

    def measure(self, call: str, param_groups: ParamGroups) -> tuple[Tensor, Tensor]:
        """Return the squared norm of the gradients, as the next step would use them, and whether one is not finite.

        Collective over the job.

        Returns:
            0-dim: float64, and 1 or 0 in float32.
        """
        self.refuse_in_backward("clip_grad_norm_")
        if not self.must_sync:
            nothing = torch.zeros((), dtype=torch.float64, device=self.skipped_steps.device)
            return nothing, nothing.float()
        stats = self.sync_before(call, param_groups, with_norm=True)
        assert stats.norm is not None
        norm = stats.norm if self._coefficient is None else stats.norm * self._coefficient
        return norm.square(), stats.found_inf

    def sum_parts(self, square: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """Return the sum of ``square`` over all parts of the model. Collective over the model-parallel ranks.

        Args:
            square: 0-dim, of whole gradients of ``parameters``, which this optimizer does not have.
        """
        if not self.job.is_parallel:
            return square
        parts = self.parameters.parts | arguments.parts_of(parameters, self.transport)
        block = square.reshape(1).to(self.skipped_steps.device) / max(1, len(parts))
        self.job.sum_parts_(block)
        return block[0].to(square.device)

    def scale_together(self, coefficient: Tensor, found_inf: Tensor) -> None:
        """Make the next step multiply gradients by ``coefficient``, and skip if ``found_inf``. After ``measure``."""
        device = self.skipped_steps.device
        self._scale_by(coefficient.to(device))
        self.step_sync.skip_if(found_inf.to(device))

    def _in_norm_dtype(self, norm: Tensor) -> Tensor:
        """Return ``norm`` in the dtype of torch.nn.utils.clip_grad_norm_'s: the widest of the gradients', at least
        float32.
        """
        is_wide = any(arena.format.exact_dtype == torch.float64 for arena in self.parameters.arenas)
        return norm if is_wide else norm.float()

    def _scale_by(self, coefficient: Tensor) -> None:
        self._coefficient = coefficient if self._coefficient is None else self._coefficient * coefficient

    def unscale(self, inverse_scale: Tensor, param_groups: ParamGroups, *, in_place: bool) -> Tensor:
        """Make clipping, ``full_grad`` and ``step`` use the gradients divided by the loss scale. Collective.

        Args:
            inverse_scale: 1 / loss scale, a tensor of one element.
            in_place: divide gradients in ``p.grad`` in place, unless backward has freed them.

        Returns:
            1 if a gradient is infinite or NaN on any rank, else 0; 0-dim float32.
        """
        if self._is_in_step:
            self.poison.reason = "its gradients were multiplied by a loss scale when it used them in backward"
        self.refuse_in_backward("GradScaler")
        if in_place and self.options.gradient_sync != "backward":
            clipping.unscale_(self.parameters.params, inverse_scale)
        else:
            self.inverse_scale = self._coefficient = (
                self._in_norm_dtype(inverse_scale.reshape(()).double()) * self._factor
            )
        with_norm = self.options.max_grad_norm is not None
        return self.sync_before("GradScaler.unscale_", param_groups, with_norm=with_norm).found_inf

    def full_grad(self, parameter: Tensor, param_groups: ParamGroups) -> Tensor | None:
        """Return the averaged gradient as ``step`` would use it; None if no rank has one. Collective."""
        self.refuse_in_backward("full_grad")
        param = self.parameters.find(parameter)
        with_norm = self.options.max_grad_norm is not None
        stats = self.sync_before("full_grad", param_groups, with_norm=with_norm)
        self.reducer.sum_up()  # on all ranks, although experts of other ranks may have no gradient
        if not bool(stats.used[param.index]):
            return None
        gradient = whole.gather(param, _exact_gradient)
        coefficient = self._coefficient_for(param.arena)
        return gradient if coefficient is None else gradient.mul_(coefficient)

    # After the step

    def zero_grad(self) -> None:
        """Discard the reduced gradients. Collective with ``gradient_sync="backward"``."""
        if self._is_in_step:
            raise RuntimeError(
                'zero_grad: found gradients that update="backward" has used, expected none. They cannot be discarded '
                "any more: call step() after each backward."
            )
        if self._peers_may_be_ahead:
            most = agreement.largest(self.reducer.rounds_since_reset, self.transport.control)
            self.reducer.catch_up(most)
        self._peers_may_be_ahead = self.options.gradient_sync == "backward"
        self.forget_gradients()

    def all_have_joined(self) -> None:
        """Make the next ``zero_grad`` the first one after a step on all ranks; some have called it since, some not."""
        self._peers_may_be_ahead = False

    def forget_gradients(self) -> None:
        self.reducer.reset()
        if self.in_backward is not None:
            self.in_backward.reset()
        self.step_sync.start_anew()
        self._coefficient = self.inverse_scale = None
        self._factor = 1.0

    def outside(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's parameters that this optimizer does not have, by name; warn if nobody averages them."""
        outside = without_experts_of_others(self.parameters.outside(model), self.transport)
        if self.reducer.averages:
            self.warnings.outside |= outside
        return outside

    def average_gradients(self, parameters: Tensor | Iterable[Tensor]) -> None:
        """Average ``p.grad`` of parameters that this optimizer does not train. Collective."""
        given = self.parameters.of_others(parameters, may_be_mine=not self.reducer.averages)
        self.reducer.close_open_round()
        outside.average_gradients(given, self.transport)

    def overlap_gather(self, model: nn.Module, blocks: Iterable[nn.Module] | None = None) -> None:
        """Make the forward of ``model`` wait for all-gathers, and ``step`` return without waiting for them. Local."""
        self._overlaps.append(OverlappedForward(model, self.parameters.by_id(), self.gatherer, blocks))

    def refresh_masters(self, params: Sequence[ShardedParam] | None = None) -> None:
        """Make the stored masters follow parameters that were written from outside, before they are read. Local.

        Averages follow, too, until a first one is made. ``params``: those that are read; None for all. Raises
        RuntimeError if device, dtype, shape or strides of a parameter have changed.
        """
        params = self.parameters.params if params is None else params
        params = [param for param in params if param.arena.flat_state.keys() & {*formats.MASTERS, formats.AVERAGE}]
        rebind_moved(params)
        for param in params:
            masters.refresh_(param)
        averages.refresh_(params)

    def state_was_loaded(self, *, parameters: bool = False) -> None:
        """Use the state that a load has written, and drop what was known about the state before.

        Args:
            parameters: the load has also written this rank's shards of the parameters; gathers them. Collective then.
        """
        if self._is_in_step:  # one that was refused
            self.forget_gradients()
        self.poison.reason = None
        self.updater.recover()
        self.step_sync.state_was_loaded()
        for arena in self.parameters.arenas:
            arena.update.reload()
        if parameters:
            for bucket in self.parameters.buckets:
                self.gatherer.dispatch(bucket)
            self.gatherer.synchronize()
            mark_written(self.parameters.params)
        averages.refresh_(self.parameters.params)

    def release(self) -> None:
        """Remove hooks, and free memory and the transport, once the optimizer is gone. Local."""
        try:
            self.reducer.remove_hooks()
            is_idle = self.reducer.is_idle
            for transport in self.parameters.transports:
                transport.close(clean=is_idle)
            if self.job.model_parallel is not None:
                self.job.model_parallel.close(clean=True)
        finally:
            self.parameters.release()


def _exact_gradient(bucket: FlatBucket) -> Tensor:
    return gradient_shard(bucket).to(bucket.arena.format.exact_dtype)
