"""How good are exits on text they were not trained on: loss, AUROC, and depth at a given agreement.

Shapes: E exits, N held-out tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.collect import ExitBatch
from dynamax_llm.traces.curves import auroc, oracle_depth, sweep
from dynamax_llm.traces.simulate import NEVER, ThresholdSample, depths, simulate_exits, simulate_no_exit
from dynamax_llm.training.objective import loss
from dynamax_llm.training.parallel import ALONE, Group

#: A held-out split whose hidden states fit into this is harvested once; a larger one again at every evaluation.
KEPT_BYTES = 256 * 2**20
#: Steps of the bisection for the threshold of a recurrent head, whose confidences depend on the threshold.
BISECTIONS = 12
#: Where the labels stand among the judges' traces.
_LABELS = "\0labels"


class HeldOut:
    """The held-out batches, harvested on demand: iterate to get every ExitBatch of this process's share."""

    def __init__(
        self, batches: Sequence[Batch], exit_batch: Callable[[Batch], ExitBatch], group: Group = ALONE
    ) -> None:
        self.batches, self._harvest, self.group = batches, exit_batch, group
        self.own = range(group.rank, len(batches), group.size)
        self._kept: list[ExitBatch] | None = None

    @property
    def tokens(self) -> int:
        return sum(batch.tokens for batch in self.batches)

    def __iter__(self) -> Iterator[ExitBatch]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[ExitBatch] = []
        size = 0
        for index in self.own:
            made = self._harvest(self.batches[index])
            size += made.nbytes
            if size <= KEPT_BYTES:
                kept.append(made)
            yield made
        if size <= KEPT_BYTES:
            self._kept = kept


@torch.no_grad()
def evaluate(
    estimators: dict[str, ExitHeads],
    weights: dict[str, Tensor],
    held: HeldOut,
    config: ExitConfig,
    never: float,
    agreement: float,
    again: Callable[[ConfidenceEstimator, Batch, ThresholdSample], ExitBatch] | None = None,
) -> dict[str, dict[str, Any]]:
    """Per judge: loss on a fixed draw, and on the trace in which no token leaves: AUROC per exit and depth.

    ``weights`` are each estimator's class weights. With ``again`` the loss is on what that harvests, on policy. Depth
    at an agreement is exact for a head without memory; for a recurrent one the trace is what it says of undisturbed
    tokens (``on_policy`` is exact, and costs more).
    """
    tokens = [batch.tokens for batch in held.batches]
    ends = list(accumulate(tokens))
    device = next(iter(estimators.values())).prior.device
    losses = {name: [0.0] * len(tokens) for name in estimators}
    # Zeros where another process will fill in what it found: a sum then puts the trace together.
    traces = {name: torch.zeros(len(config.layers), held.tokens, device=device) for name in (*estimators, _LABELS)}
    generator = torch.Generator().manual_seed(0)
    draws = [ThresholdSample.sample(batch.mask, never, generator) for batch in held.batches]
    for index, exit_batch in zip(held.own, held, strict=True):
        here = slice(ends[index] - tokens[index], ends[index])
        traces[_LABELS][:, here] = exit_batch.labels[:, exit_batch.mask].float()
        for name, estimator in estimators.items():
            met = exit_batch if again is None else again(estimator, held.batches[index], draws[index])
            losses[name][index] = float(loss(simulate_exits(estimator, met, draws[index]), met.targets, weights[name]))
            traces[name][:, here] = simulate_no_exit(estimator, exit_batch).confidence[:, exit_batch.mask]
    whole = {name: held.group.sum(trace) for name, trace in traces.items()}
    truth = whole.pop(_LABELS).bool()
    found = {name: held.group.totals(*losses[name]) for name in estimators}
    return {
        name: {
            "loss": math.fsum(value * count for value, count in zip(found[name], tokens, strict=True)) / sum(tokens),
            **_trace_report(trace, truth, config, agreement),
        }
        for name, trace in whole.items()
    }


def _trace_report(trace: Tensor, labels: Tensor, config: ExitConfig, agreement: float) -> dict[str, Any]:
    depth, threshold = sweep(trace, labels, depths(config), config.n_layers).depth_at(agreement)
    return {
        "depth": depth / config.n_layers,
        "threshold": threshold,
        "agreement": agreement,
        "auroc": [auroc(scores, label) for scores, label in zip(trace, labels, strict=True)],  # None: one class only
        "base_rate": [float(label.double().mean()) for label in labels],
        "oracle_depth": oracle_depth(labels, depths(config), config.n_layers) / config.n_layers,
        "tokens": labels.shape[1],
    }


@torch.no_grad()
def apply_threshold(
    estimator: ConfidenceEstimator, held: HeldOut, config: ExitConfig, threshold: float
) -> tuple[float, float]:
    """(mean depth as a share, agreement) when every exit asks ``estimator`` with this threshold."""
    shares = torch.tensor([*depths(config), config.n_layers], dtype=torch.float64) / config.n_layers
    depth, agree, tokens = 0.0, 0, 0
    for exit_batch in held:
        where = (
            simulate_exits(estimator, exit_batch, ThresholdSample.fixed(len(exit_batch.mask), threshold))
            .exit_index[exit_batch.mask]
            .cpu()
        )
        truth = torch.cat((exit_batch.labels[:, exit_batch.mask].cpu(), torch.ones(1, len(where), dtype=torch.bool)))
        depth += float(shares[where].sum())
        agree += int(truth.gather(0, where[None]).sum())
        tokens += len(where)
    depth, agreed, count = held.group.totals(depth, agree, tokens)
    return depth / count, agreed / count


def on_policy(estimator: ConfidenceEstimator, held: HeldOut, config: ExitConfig, agreement: float) -> dict[str, float]:
    """Lowest depth found, with its threshold, at no less than this agreement, by bisection; tokens that leave are
    seen by later exits, and remembered by recurrent heads, as they were when they left."""
    low, high = 0.0, 1.0
    best = {"depth": 1.0, "agreement": 1.0, "threshold": NEVER}
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        depth, reached = apply_threshold(estimator, held, config, middle)
        if reached >= agreement:
            high = middle
            best = {"depth": depth, "agreement": reached, "threshold": middle}
        else:
            low = middle
    return best
