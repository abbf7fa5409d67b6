"""What a confidence estimator reads at an exit: statistics of its logits and hidden state, as pure functions.

Shapes: B batch, T tokens, d width, V vocabulary, E exits, F statistics (``len(STATISTICS)``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax_llm.exits.config import LEAST_CANDIDATES
from dynamax_llm.shapes import Choices, Flags, Hidden, Ids, Logits, Statistics

#: How many of the readout's log-probabilities are kept.
TOP = LEAST_CANDIDATES
#: Log-probabilities are clamped here and divided by LOG_SCALE, so that every column is of order one.
LOG_FLOOR = -20.0
LOG_SCALE = 4.0
#: The columns of ``ExitFeatures.values``.
STATISTICS = (
    *(f"log_p{rank}" for rank in range(1, TOP + 1)),  # top log-probabilities, clamped and scaled
    "margin",  # p1 - p2
    "entropy",  # H / log V, in [0, 1]
    "same_token",  # 1 if the readout's argmax is the previous exit's
    "previous_probability",  # probability here of the previous exit's argmax
    "similarity",  # cos(h, h before the last layer run)
)


@dataclass(frozen=True)
class ExitFeatures:
    """Statistics of one exit's readout: ``values`` (B, T, F) float32; ``token`` (B, T) its argmax, if it was read.

    ``candidates`` (B, T, K) are the first exit's likeliest tokens, if later exits look at those alone. ``rival``
    (B, T) is the runner-up of ``token``, ``rows`` (B, T, 2 d) the LM head's rows of both, where an estimator reads
    them.
    """

    values: Statistics
    token: Ids | None
    candidates: Choices | None = None
    rival: Ids | None = None
    rows: Hidden | None = None


def select(mask: Flags, a: ExitFeatures, b: ExitFeatures) -> ExitFeatures:
    """``a`` where ``mask`` (B, T) is True, else ``b``: tokens that left keep the features with which they left."""
    values = torch.where(mask.unsqueeze(-1), a.values, b.values)
    token = None if a.token is None or b.token is None else torch.where(mask, a.token, b.token)
    rows = None if a.rows is None or b.rows is None else torch.where(mask.unsqueeze(-1), a.rows, b.rows)
    return ExitFeatures(values, token, b.candidates, rows=rows)


def shortlist(logits: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The two likeliest tokens of each of ceil(keep / 2) groups, logits and ids (B, T, K), K = 2 ceil(keep / 2).

    Token v belongs to group v modulo their number. The leading token and its runner-up are always there; of the
    likeliest, one is missed only where two likelier ones share its group. One pass finds it, and nothing is sorted:
    the partial reduction of approximate top-k (arXiv 2206.14286), with pairs. All tokens where they are at most K.
    """
    groups, size = -(-keep // 2), logits.shape[-1]
    if size <= 2 * groups:
        return logits, torch.arange(size, device=logits.device).expand(logits.shape)
    table = F.pad(logits, (0, -size % groups), value=-torch.inf).unflatten(-1, (-1, groups))  # (B, T, rows, groups)
    first, place = table.max(-2, keepdim=True)
    second, next_place = table.scatter(-2, place, -torch.inf).max(-2, keepdim=True)
    ids = torch.cat((place, next_place), dim=-2) * groups + torch.arange(groups, device=logits.device)
    return torch.cat((first, second), dim=-2).flatten(-2), ids.flatten(-2)


def exit_features(
    h: Hidden,
    h_before: Hidden,
    logits: Logits | None,
    previous: ExitFeatures | None,
    keep: int = 0,
    pairs: bool = False,
    vocabulary: Tensor | None = None,
) -> ExitFeatures:
    """ExitFeatures at an exit with hidden state h (B, T, d), read out as logits (B, T, V), or unread (None).

    Where only the tokens of ``vocabulary`` (K,), ascending, were read, logits are theirs alone, (B, T, K).

    At the first exit ``keep`` likely tokens become the candidates (0: none): the likeliest, or with ``pairs`` those of
    ``shortlist``. Where ``previous`` has candidates, logits are theirs alone, (B, T, K) in their order, and
    probabilities are shares among them.

    ``h_before`` is h before the last layer run, ``previous`` the features of the exit before this one (None at the
    first). Columns that need logits are 0 without them; columns that need a previous exit are 0 at the first.
    """
    similarity = F.cosine_similarity(h.float(), h_before.float(), dim=-1).unsqueeze(-1)  # (B, T, 1)
    if logits is None:
        return ExitFeatures(F.pad(similarity, (len(STATISTICS) - 1, 0)), None)
    keep = keep if previous is None else 0
    named = None if previous is None else previous.candidates  # the tokens of the columns; None: all, in their order
    whole = named is None
    log_p = torch.log_softmax(logits.float(), dim=-1)
    among = log_p
    if keep and pairs:
        among, named = shortlist(log_p, keep)
        named = named if vocabulary is None else vocabulary[named]
    best, at = among.topk(min(max(TOP, 0 if pairs else keep), among.shape[-1]), dim=-1)
    if named is not None:
        ids = named.gather(-1, at)
    else:
        ids = at if vocabulary is None else vocabulary[at]
    token, rival = ids[..., :2].unbind(-1)
    top = best[..., :TOP]  # (B, T, TOP)
    p1, p2, *_ = top.exp().unbind(-1)
    entropy = torch.linalg.vecdot(log_p.exp(), log_p) / -math.log(log_p.shape[-1])
    if previous is None or previous.token is None:
        history = torch.zeros_like(top[..., :2])
        candidates = (named if pairs else ids) if keep else None
    else:
        candidates = named
        if whole:
            column = (
                previous.token if vocabulary is None else torch.searchsorted(vocabulary, previous.token.contiguous())
            )
            there = log_p.gather(-1, column.unsqueeze(-1)).exp().squeeze(-1)
        else:
            assert named is not None
            there = (log_p.exp() * (named == previous.token.unsqueeze(-1))).sum(-1)
        history = torch.stack(((token == previous.token).float(), there), dim=-1)
    columns = torch.stack((p1 - p2, entropy), dim=-1)
    values = torch.cat((top.clamp(min=LOG_FLOOR) / LOG_SCALE, columns, history, similarity), dim=-1)
    return ExitFeatures(values, token, candidates, rival)


def concatenate(parts: Sequence[ExitFeatures]) -> ExitFeatures:
    """ExitFeatures of consecutive runs of tokens, joined along T."""

    def joined(name: str) -> Tensor | None:
        kept = [value for part in parts if (value := getattr(part, name)) is not None]
        return torch.cat(kept, dim=1) if len(kept) == len(parts) else None

    values = torch.cat([part.values for part in parts], dim=1)
    return ExitFeatures(values, *(joined(name) for name in ("token", "candidates", "rival", "rows")))


def slice_features(features: ExitFeatures, run: slice) -> ExitFeatures:
    """The tokens ``run`` of ``features``."""
    token, candidates = (None if part is None else part[:, run] for part in (features.token, features.candidates))
    return ExitFeatures(features.values[:, run], token, candidates)
