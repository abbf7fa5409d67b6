"""Bytes that a decode step has to read, counted from weight shapes and the statistics of a generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynamax_llm.backbones import Backbone
from dynamax_llm.backbones.cache import KVStack, SSMStack
from dynamax_llm.decoding import EarlyExitOutput
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.readouts.base import Readout


@dataclass(frozen=True)
class Counted:
    """Bytes of one backbone: of each layer's weights, of those a state update reads, of the LM head, of an embedding's
    row; per row and layer, K/V of one token, and recurrent state."""

    layers: tuple[int, ...]
    updates: tuple[int, ...]
    head: int
    embedded: int
    kv: int
    recurrent: int

    @classmethod
    @torch.no_grad()
    def of(cls, backbone: Backbone, ids: Tensor) -> Counted:
        """``ids`` (B, T): a short text, run once for the sizes of the layers' state."""
        size = backbone.dtype.itemsize
        layers = tuple(sum(weight.nbytes for weight in layer.parameters()) for layer in backbone.layers)
        updates = tuple(
            min((cost.state - _cells(layer)) * size, whole)
            for layer, cost, whole in zip(backbone.layers, backbone.costs().layers, layers, strict=True)
        )
        head = backbone.model.get_output_embeddings().weight
        embedding = backbone.model.get_input_embeddings().weight
        cache, h = backbone.new_cache(), backbone.embed(ids[:1])
        context = backbone.context(h)
        for index in range(backbone.n_layers):
            h = backbone.layer(index, h, cache, context)
        kv = recurrent = 0
        for stack in cache.stacks:
            if isinstance(stack, KVStack) and stack.buffer is not None:
                kv += stack.buffer[:, :, :1, :, :1].nbytes
            elif isinstance(stack, SSMStack):
                kept = [part for part in (stack.conv, stack.ssm) if part is not None]
                recurrent += sum(part[:, :1].nbytes for part in kept)
        n = backbone.n_layers
        return cls(layers, updates, head.nbytes, embedding[0].nbytes, kv // n, recurrent // n)

    def stock(self, batch: int, context: float) -> tuple[float, float]:
        """Weights and state, bytes per full-depth step of ``batch`` rows over ``context`` earlier tokens."""
        return self._step(batch, context, sum(self.layers), len(self.layers), 0.0, 1.0)

    def step(
        self,
        out: EarlyExitOutput,
        first: int,
        context: float,
        estimator: ConfidenceEstimator,
        readout: Readout,
        checked: int,
    ) -> tuple[float, float]:
        """The same for a generation: tokens left after ``first`` layers or later, ``checked`` exits were checked."""
        batch, steps = len(out.exit_layers), out.exit_layers.shape[1] - 1
        n, per_step = len(self.layers), out.trace.stats.passes / steps
        # Layers up to the first exit run at every step; the rest of the passes are the later layers' alike.
        early = min(float(first), per_step)
        later = max(per_step - early, 0.0)
        weights = sum(self.layers[:first]) * early / max(first, 1) + _mean(self.layers[first:]) * later
        updated = n - per_step if out.trace.policy == "propagate" else 0.0
        weights += _mean(self.updates[first:]) * updated
        readouts = 1.0
        if out.verification is not None and out.trace.stats.left_at is not None:
            readouts = len(out.trace.stats.left_at) / steps  # one per step, of a draft or of a whole window
        if estimator.needs_logits:  # an exit that reads everything reads the LM head once more, unless the token leaves
            leaves = float((out.exit_layers[:, 1:] < n).float().mean())
            readouts += sum(readout.reads_all(index) for index in range(checked)) * (1.0 - leaves)
        if isinstance(estimator, nn.Module) and checked:
            weights += sum(weight.nbytes for weight in estimator.parameters())
        return self._step(batch, context, weights, per_step, updated, readouts)

    def _step(
        self, batch: int, context: float, layers: float, ran: float, updated: float, readouts: float
    ) -> tuple[float, float]:
        weights = layers + readouts * self.head + batch * self.embedded
        # K/V: all of the past is read and one entry written; recurrent state is read and written.
        state = ran * self.kv * (context + 1) + updated * self.kv + (ran + updated) * 2 * self.recurrent
        return weights, batch * state


def _cells(layer: nn.Module) -> int:
    """Multiply-accumulates of a Mamba layer's state update that read the state, no weights."""
    mixer = getattr(layer, "mixer", None)
    kept = getattr(mixer, "intermediate_size", 0), getattr(mixer, "ssm_state_size", 0)
    return 2 * int(kept[0]) * int(kept[1])


def _mean(values: tuple[int, ...]) -> float:
    return sum(values) / len(values) if values else 0.0
