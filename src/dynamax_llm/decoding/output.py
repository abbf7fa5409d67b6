"""What a generation with early exits returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from dynamax_llm.decoding.rows import Row
from dynamax_llm.decoding.sampler import by_step
from dynamax_llm.decoding.trace import Trace
from dynamax_llm.decoding.verification import Verification


@dataclass
class EarlyExitOutput(GenerateDecoderOnlyOutput):
    """Hugging Face's output of ``generate``, and where every token left.

    ``sequences`` (B, prompt + new); ``exit_layers`` (B, new) layers run until a token was decided, 0 after a row's
    end and for a draft's own tokens; the ``trace``; under ``verify`` what became of the proposals; the ``engine`` that
    ran and its own ``kernels``; ``drafting``: with a draft, what decided its threshold and window, and whether it
    rested.
    ``scores`` (processed) and ``logits`` (raw) per step, each (B, V), where they were asked for; under ``verify`` they
    are 0 after a row's end. ``past_key_values``, ``attentions`` and ``hidden_states`` are always None.
    """

    exit_layers: Tensor = None
    trace: Trace = None  # type: ignore[assignment]
    verification: Verification | None = None
    engine: str = None  # type: ignore[assignment]
    kernels: list[str] = None  # type: ignore[assignment]
    drafting: str | None = None


def columns(rows: Sequence[Row], pad: int) -> tuple[Tensor, Tensor]:
    """Sequences (B, prompt + new) and exit indices (B, new) of rows; ``pad`` and -1 after a row's end."""
    new = max(row.ended_at or len(row.tokens) for row in rows)
    device = rows[0].prompt.device
    tokens = [row.tokens[:new] + [pad] * (new - len(row.tokens)) for row in rows]
    exits = [row.exits[:new] + [-1] * (new - len(row.exits)) for row in rows]
    prompts = torch.cat([row.prompt for row in rows])
    return torch.cat((prompts, torch.tensor(tokens, device=device)), dim=1), torch.tensor(exits, device=device)


def kept_scores(rows: Sequence[Row], wants_scores: bool, wants_logits: bool) -> dict[str, tuple[Tensor, ...] | None]:
    """``scores`` and ``logits`` per step, as far as they were asked for."""
    return {
        "scores": by_step([row.scores for row in rows]) if wants_scores else None,
        "logits": by_step([row.logits for row in rows]) if wants_logits else None,
    }
