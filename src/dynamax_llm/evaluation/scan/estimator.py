"""What a trained head could reach, estimated before any training: a small estimator fitted within the scan.

Logistic regression on an exit's readout statistics and those of the exits before it, fitted on four fifths of the
groups (documents) and evaluated on the last fifth, so never on text it was fitted on. Statistics carry most of what a
head uses (``recipes/heads``); a head also reads h and far more text, so it tends to reach a little more.

Shapes: E exits, N tokens, F statistics, D inputs of one exit's estimator.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Parts of the text; each is evaluated with what was fitted on the others.
FOLDS = 5
#: Weight of the squared coefficients, in tokens: enough to keep a separable exit finite.
RIDGE = 1.0
#: Newton steps at most, and the step that ends them.
STEPS, ENOUGH = 25, 1e-6


def cross_fitted(features: Tensor, labels: Tensor, group: Tensor, seed: int = 0) -> Tensor:
    """P(agree) (E, N) float64 of every token at every exit, each from text of other groups.

    ``features`` (E, N, F), ``labels`` (E, N) bool, ``group`` (N,) int64 from 0, at least two of them.
    """
    values, truth = features.double(), labels.double()
    n_groups = int(group.max()) + 1
    order = torch.randperm(n_groups, generator=torch.Generator().manual_seed(seed))
    fold = (order % min(FOLDS, n_groups))[group]
    result = torch.empty_like(truth)
    for exit in range(len(values)):
        inputs = values[: exit + 1].transpose(0, 1).flatten(1)  # (N, D)
        for part in fold.unique():
            held_out = fold == part
            x = _standardised(inputs, ~held_out)
            weight = logistic(x[~held_out], truth[exit, ~held_out])
            result[exit, held_out] = torch.sigmoid(x[held_out] @ weight)
    return result


def logistic(x: Tensor, y: Tensor) -> Tensor:
    """Coefficients (D,) of ridge-penalised logistic regression of y (n,) in [0, 1] on x (n, D), by Newton's method.

    The first column of x is the constant, which pays no penalty but for one half a token of either answer, so that an
    exit that always agrees has a finite one.
    """
    penalty = torch.full((x.shape[1],), RIDGE, dtype=x.dtype)
    penalty[0] = 0.0
    constant = torch.zeros(2, x.shape[1], dtype=x.dtype)
    constant[:, 0] = 1.0
    x, y = torch.cat((x, constant)), torch.cat((y, y.new_tensor([0.0, 1.0])))
    share = torch.cat((y.new_ones(len(y) - 2), y.new_full((2,), 0.5)))
    weight = torch.zeros_like(penalty)
    for _ in range(STEPS):
        p = torch.sigmoid(x @ weight)
        slope = x.T @ (share * (p - y)) + penalty * weight
        curvature = (x * (share * p * (1 - p)).unsqueeze(1)).T @ x + torch.diag(penalty)
        step = torch.linalg.solve(curvature, slope)
        step = step / max(1.0, float(step.norm()) / 5.0)  # a first step on nearly pure labels overshoots
        weight = weight - step
        if float(step.abs().max()) < ENOUGH:
            break
    return weight


def _standardised(x: Tensor, fitted: Tensor) -> Tensor:
    """A constant and x (N, D), scaled by the rows that are fitted; a column that does not vary there becomes 0."""
    spread = x[fitted].std(0)
    scaled = (x - x[fitted].mean(0)) * torch.where(spread > 1e-9, 1.0 / spread.clamp(min=1e-9), 0.0)
    return torch.cat((x.new_ones(len(x), 1), scaled.clamp(-8.0, 8.0)), dim=1)
