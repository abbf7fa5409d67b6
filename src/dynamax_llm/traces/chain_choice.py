"""The record of a draft's chains in its exits' provenance, and the choice of threshold and window on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.chain_costs import REPEATS, measure_costs
from dynamax_llm.decoding.draft_choice import DraftChoice, drafts, keep_choice
from dynamax_llm.errors import UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.progress import Advance, unwatched
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.chain_trace import CHAINS, ChainTrace, best_threshold, record_chains

#: Prompts that are decoded for a record, and tokens of a plain text that serve as one.
PROMPTS, TEXT_PROMPT = 64, 32


def prompts_of(batches: Sequence[Batch], most: int = PROMPTS) -> list[list[int]]:
    """Prompts of held-out batches, at most ``most``, evenly from all: up to the answer's first token, of plain text the
    first tokens."""
    prompts = []
    for batch in batches:
        for row, ids in enumerate(batch.ids):
            if batch.answers is None:
                length = min(TEXT_PROMPT, int(batch.mask[row].sum()))
            elif bool(batch.answers[row].any()):
                length = int(batch.answers[row].int().argmax()) + 1
            else:
                continue
            prompts.append(ids[:length].tolist())
    count = min(most, len(prompts))
    return [prompts[place * len(prompts) // count] for place in range(count)]


def record(backbone: Backbone, exits: Exits, prompts: Sequence[Sequence[int]], advance: Advance = unwatched) -> bool:
    """Decode prompts of token ids and keep their chains with the exits; choices made by other chains are dropped.

    Returns whether there was a chain: without any, nothing changes.
    """
    trace = record_chains(backbone, exits, prompts, chains=CHAINS, advance=advance)
    if trace is None:
        return False
    chains = {"match": trace.match, "tokens": trace.outcome(0.0, trace.confidence.shape[1])[0], "windows": len(trace)}
    exits.provenance = {**exits.provenance, "chains": {**chains, "trace": trace.to_json(), "choices": []}}
    return True


def recorded(exits: Exits) -> ChainTrace:
    """The chains kept with the exits. Raises UsageError where there are none, ArtifactCorruptError."""
    if not drafts(exits):
        raise UsageError(f"exits with the readout {exits.config.readout!r} are no draft: they have no chains.")
    chains = exits.provenance.get("chains")
    if not isinstance(chains, dict) or "trace" not in chains:
        raise UsageError(
            "no chains are recorded with these exits: give `data`, prompts like those to come, to record them."
        )
    return ChainTrace.from_json(chains["trace"])


@torch.no_grad()
def choose(backbone: Backbone, exits: Exits, batch_size: int = 1, engine: str | None = None) -> DraftChoice:
    """Measure what chains cost here, choose threshold and window by the recorded chains, and keep the choice.

    Raises what ``recorded`` and ``measure_costs`` raise.
    """
    trace = recorded(exits)
    costs, where = measure_costs(backbone, exits, batch_size, engine=engine, repeats=REPEATS)
    choice = best_threshold(trace, costs).kept(where, costs)
    keep_choice(exits, choice)
    return choice


def chain_facts(exits: Exits) -> dict[str, Any]:
    """Match rates by step, tokens a verification and the number of windows, as recorded; empty without a record."""
    chains = exits.provenance.get("chains")
    return {key: chains[key] for key in ("match", "tokens", "windows") if key in chains} if chains else {}
