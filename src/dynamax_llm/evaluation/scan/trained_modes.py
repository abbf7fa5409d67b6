"""What trained blocks and a trained draft will reach, estimated without training them.

Whether a block on h agrees with the full model depends on how sure the full model is of its token, how common the token
is, whether the text has shown it after the same token before, and how much of it can be read off h. The last is a ridge
regression from h to the final h, in closed form, judged on rows that it was not fitted on: a block without attention
and without a nonlinearity, trained on a few thousand tokens. A *law*, a logistic regression over these four, gives the
probability that a block trained on millions of tokens agrees. Its coefficients come from exits that were trained
(``law.py`` says which, and how far it was off on texts that it was not fitted on).

Shapes: n tokens, d width, K distinct tokens, E exits, D inputs of the law, J steps of a draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.draft_choice import ChainCosts
from dynamax_llm.evaluation.scan.collect import Kept
from dynamax_llm.traces.chain_trace import ChainChoice, ChainTrace, best_threshold
from dynamax_llm.traces.curves import sweep

#: Parts of the rows; each is judged with what was fitted on the others.
FOLDS = 5
#: Weight of the ridge, as a share of the mean square of an input: of h, and of a draft's several times wider input.
RIDGE, DRAFT_RIDGE = 0.03, 0.1
#: Probabilities are kept this far from 0 and 1 before their logit is taken.
CLAMP = 1e-4
#: Steps of a draft that are estimated, and draws of what is accepted for each chain.
STEPS, DRAWS = 8, 8


@dataclass(frozen=True)
class Law:
    """Coefficients over ``inputs`` of (constant, logit of the full model's probability, logit of the ridge's, seen
    before, log frequency), then the same times the place, then the place squared.

    ``place`` is an exit's share of the depth, or a draft's step over STEPS. ``sharpness`` multiplies the logits that
    leaving is decided by: a block knows more of whether it is right than these inputs do. ``error`` is the half-width
    of the 95 % interval, from texts that the law was not fitted on.
    """

    weights: tuple[float, ...]
    sharpness: float
    error: float

    def probability(self, inputs: Tensor, place: float) -> Tensor:
        """P(agree) (n,) at a place, of inputs (n, 5)."""
        return torch.sigmoid(expanded(inputs, place) @ torch.tensor(self.weights, dtype=torch.float64))


def expanded(inputs: Tensor, place: float) -> Tensor:
    """What the law weighs (n, D) of inputs (n, 5)."""
    return torch.cat((inputs, inputs * place, inputs[:, :1] * place**2), dim=1)


@torch.no_grad()
def law_inputs(backbone: Backbone, kept: Kept, states: Tensor, ridge: float) -> Tensor:
    """Inputs (n, 5) of the law for what is known of each token from ``states`` (n, inputs of the ridge)."""
    own = _logit(kept.top)
    readable = _logit(ridge_probability(backbone, kept, states, ridge))
    counts = torch.bincount(kept.target).double()
    frequency = (counts[kept.target] / len(kept.target)).log()
    return torch.stack((torch.ones_like(own), own, readable, seen_before(kept.target, kept.row), frequency), dim=1)


def _logit(probability: Tensor) -> Tensor:
    return torch.logit(probability.double().clamp(CLAMP, 1 - CLAMP))


def ridge_probability(backbone: Backbone, kept: Kept, states: Tensor, ridge: float) -> Tensor:
    """The probability (n,) of the full model's token among tokens seen, by ridge regression from states to final h."""
    x = torch.cat((states, states.new_ones(len(states), 1)), dim=1)
    fold = kept.row % FOLDS
    found = torch.zeros(len(x))
    for part in range(FOLDS):
        fitted, judged = fold != part, fold == part
        if not bool(judged.any()) or not bool(fitted.any()):
            continue
        gram = x[fitted].T @ x[fitted]
        gram += ridge * float(gram.diag().mean()) * torch.eye(len(gram))
        weights = torch.linalg.solve(gram, x[fitted].T @ kept.final[fitted])
        tokens = kept.target[fitted].unique()
        rows = backbone.output_rows(tokens.to(backbone.device)).float().cpu()  # (K, d)
        scores = (x[judged] @ weights) @ rows.T
        place = torch.searchsorted(tokens, kept.target[judged]).clamp(max=len(tokens) - 1)
        known = tokens[place] == kept.target[judged]
        found[judged] = scores.softmax(-1).gather(1, place[:, None])[:, 0] * known
    return found


def seen_before(target: Tensor, row: Tensor) -> Tensor:
    """1 where the row's latest occurrence of the token before was followed by this token too (n,), else 0."""
    found = torch.zeros(len(target), dtype=torch.float64)
    follower: dict[int, int] = {}
    rows, tokens = row.tolist(), target.tolist()
    for place in range(1, len(tokens)):
        if rows[place] != rows[place - 1]:
            follower.clear()
            continue
        before, own = tokens[place - 1], tokens[place]
        found[place] = float(follower.get(before) == own)
        follower[before] = own
    return found


@dataclass(frozen=True)
class EstimatedBlocks:
    """Agreement of each exit if all left there, and the mean depth, a share, at each target agreement."""

    agreement: tuple[float, ...]
    depth: tuple[float, ...]


def estimate_blocks(
    law: Law, inputs: Sequence[Tensor], layers: tuple[int, ...], n_layers: int, targets: Sequence[float]
) -> EstimatedBlocks:
    """From the inputs (n, 5) of the law at each exit."""
    chances = torch.stack([law.probability(own, at / n_layers) for own, at in zip(inputs, layers, strict=True)])
    sharp = torch.sigmoid(law.sharpness * torch.logit(chances.clamp(1e-9, 1 - 1e-9)))
    curve = sweep(sharp, sharp, layers, n_layers)
    depth = tuple(curve.depth_at(target)[0] / n_layers for target in targets)
    return EstimatedBlocks(tuple(chances.mean(1).tolist()), depth)


@dataclass(frozen=True)
class EstimatedDraft:
    """The share of proposals that match by step, where all before did, and what the best threshold gives."""

    match: tuple[float, ...]
    choice: ChainChoice


def chances_of_chains(law: Law, inputs: Tensor, row: Tensor, steps: int = STEPS) -> Tensor:
    """P(match) (N, J) of the steps of chains from every token whose next ``steps`` tokens are of the same row."""
    count = len(row) - steps + 1
    starts = (row[:count] == row[steps - 1 :]).nonzero()[:, 0] if count > 0 else torch.zeros(0, dtype=torch.int64)
    by_step = [law.probability(inputs, step / STEPS)[starts + step] for step in range(steps)]
    return torch.stack(by_step, dim=1)


def estimate_draft(
    law: Law, inputs: Tensor, row: Tensor, costs: ChainCosts, most: int = STEPS
) -> EstimatedDraft | None:
    """From the inputs (n, 5) of the law for a draft; None where no chunk is long enough. Each chain stands for many:
    what is accepted is drawn, with a fixed seed, DRAWS times."""
    chances = chances_of_chains(law, inputs, row)
    if not len(chances):
        return None
    generator = torch.Generator().manual_seed(0)
    many = chances.repeat(DRAWS, 1)
    sharp = torch.sigmoid(law.sharpness * torch.logit(many.clamp(1e-9, 1 - 1e-9)))
    accepted = (torch.rand(many.shape, generator=generator, dtype=many.dtype) < many).long().cumprod(1).sum(1)
    trace = ChainTrace(sharp.double(), accepted, torch.full_like(accepted, chances.shape[1]))
    return EstimatedDraft(tuple(trace.match), best_threshold(trace, costs, most))
