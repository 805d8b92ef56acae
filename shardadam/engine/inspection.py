# SPDX-License-Identifier: Apache-2.0
"""The part of an optimizer that only looks: at gradients, updates and memory, and at whether ranks hold the same."""

from __future__ import annotations

import torch
from torch import Tensor

from shardadam.checks import replicas
from shardadam.engine import norms
from shardadam.engine.collective_method import collective
from shardadam.engine.joining import JoinableOptimizer, repeated_by_joined_ranks
from shardadam.engine.norms import GradientNorms
from shardadam.engine.parameters import ShardedParameters, named_parameters
from shardadam.engine.step_sync import ALIKE
from shardadam.ranks import agreement
from shardadam.state import memory
from shardadam.state.memory import Memory
from shardadam.state.stateful_optimizer import StatefulOptimizer


class InspectableOptimizer(StatefulOptimizer, JoinableOptimizer):
    """Norms, ratios, whole gradients, memory and ``check_in_sync``, over the engine of an optimizer."""

    _parameters: ShardedParameters

    @property
    def grad_norm(self) -> Tensor | None:
        """2-norm of the averaged gradients before clipping at the last ``step``; None if that step did not clip.

        0-dim on the device, float32 (float64 if any parameter of this rank is).
        """
        return self._engine.grad_norm

    @collective
    def check_in_sync(self, model: torch.nn.Module | None = None) -> None:
        """Check by checksums that all ranks hold equal bits. Collective.

        Compares trainable and frozen parameters, also between model-parallel ranks that hold copies, step counters,
        ``skipped_steps`` and hyperparameters; with hybrid sharding, also the state over each replica group. Without
        it, each shard of the state exists once and is not compared. Reads everything once, sends a few bytes per rank,
        and changes nothing.

        Args:
            model: also compare its parameters that this optimizer does not have.

        Raises:
            ValueError: hyperparameters differ, or a parameter's shape, dtype, strides or ``requires_grad``.
            RuntimeError: other values differ. Names the first tensor that differs, and the ranks.
        """
        engine = self._engine
        engine.step_sync.read_all()
        claims = self._parameters.claims(self.param_groups, named_parameters(self.param_groups))
        with replicas.told_to_all(engine.job):
            agreement.require(claims, engine.transport.control, remedy=f"{ALIKE} Nothing has been written.")
            self._add_unfrozen_params()
            engine.gatherer.synchronize()
            for transport in engine.parameters.transports:
                tensors = replicas.replicated_tensors(
                    *engine.parameters.of_transport(transport), engine.skipped_steps, transport
                )
                if model is not None and transport is engine.transport:
                    tensors += replicas.outside_tensors(engine.outside(model))
                replicas.check(tensors, transport.rank, transport.control)
        replicas.check_copies(engine.parameters.params, engine.parameters.parts, engine.job)

    @collective
    def full_grad(self, parameter: Tensor) -> Tensor | None:
        """Return the parameter's averaged gradient as ``step`` would use it. Collective.

        Returns:
            A new tensor of the parameter's shape, float32 (float64 for float64 parameters). None if no rank has one.

        Raises:
            ValueError: ``parameter`` is frozen since the build, or not a parameter of this optimizer.
        """
        self._add_unfrozen_params(between_steps=False)
        return self._engine.full_grad(parameter, self.param_groups)

    @collective
    @repeated_by_joined_ranks
    def gradient_norms(self) -> GradientNorms:
        """Return the 2-norms of the averaged gradients by parameter, by param group and in total, to log. Collective.

        Call it after backward and before ``step``, with a GradScaler after its ``unscale_``. They are norms before
        ``max_grad_norm`` and ``clip_grad_norm_`` of all parameters clip, but after anything else that has clipped
        gradients: by value, of some parameters, or in ``p.grad``. Costs a pass over this rank's shards, one small
        all-reduce, and a wait for the device; changes nothing.

        Raises:
            ValueError: ``update="backward"`` has used the gradients already.
        """
        self._add_unfrozen_params(between_steps=False)
        return norms.gradient_norms(self._engine, self.param_groups)

    @collective
    @repeated_by_joined_ranks  # so that they raise, too
    def update_ratios(self) -> dict[str, float]:
        """Return, by parameter name, how much the last ``step`` has changed the weights, to log. Collective.

        The ratio is ``norm(update) / norm(weights)``, both 2-norms, with the weights after the step: the "ratio of
        weights:updates" of Stanford's CS231n (Karpathy), who looks for about 1e-3. It is 0 if the last step skipped or
        left out the parameter, and for all before the first step since the optimizer was built or a state was loaded.

        Call it between a step and the next change of the weights. It computes the update from the moments and the
        hyperparameters of that step: exactly, but for rounding in float32, if moments are stored so. For moments in
        bfloat16 and int8, it is what the stored ones say, which were rounded after the update. Weights are the exact
        ones behind low-precision parameters, where the optimizer keeps them; without a master, stochastic rounding of
        the new weights does not count as part of the update.

        Costs nothing unless it is called; then a pass over this rank's shards, one small all-reduce, and a wait for the
        device.

        Raises:
            RuntimeError: parameters have the values of their averages, or are half-way through a step that
                ``update="backward"`` has begun; or within ``Join``, on all ranks. On every rank, if one has lost its
                offloaded state, or cannot read it (an OSError on that rank).
        """
        self._refuse_in_join("update_ratios")
        self._add_unfrozen_params()
        return norms.update_ratios(self._engine, self.param_groups)

    def memory(self) -> Memory:
        """Return the bytes that the optimizer holds on this rank now, by kind. Local."""
        return memory.held_by(self._engine.parameters.arenas, self._engine.reducer)
