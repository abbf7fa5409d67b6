"""Whether engines give the same tokens: given the same text so far, and in free generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.decoding.decoder import Decoder
from dynamax_llm.engines.choose import open_session
from dynamax_llm.evaluation.bench.document import Parity
from dynamax_llm.evaluation.common import FREE_MEASURE
from dynamax_llm.evaluation.common.random_models import random_model
from dynamax_llm.exits.artifact import Exits

#: The shape that stands for a family where exact equality is tested in float32.
TWINS = {**dict.fromkeys(("llama", "mistral", "qwen2"), "tiny-transformer"), "mamba2": "tiny-mamba"}
#: Prompt tokens, new tokens and rows of that test.
TWIN_LOAD = (24, 48, 2)


@torch.no_grad()
def forced(early: EarlyExit, model: PreTrainedModel, ids: Tensor, prompt: int) -> Tensor:
    """Full depth's likeliest tokens (B, T - prompt - 1) after each of ids (B, T) from the ``prompt``-th on, but the
    last, one step at a time in ``early``'s engine. ``early`` checks no exit."""
    backbone, plan, _ = early.attach(model)
    session, _ = open_session(backbone, plan, len(ids), early.engine)
    decoder, never, tokens = Decoder(session), [(None,) * plan.full] * len(ids), []
    session.prefill(ids[:, :prompt])
    for at in range(prompt, ids.shape[1] - 1):
        decoder.step(ids[:, at], never)
        tokens.append(session.logits().argmax(-1))
    session.close()
    return torch.stack(tokens, dim=1)


@torch.no_grad()
def one_pass(model: PreTrainedModel, ids: Tensor, prompt: int) -> Tensor:
    """The same by the stock model, in one pass over all tokens."""
    return model(ids[:, :-1], logits_to_keep=ids.shape[1] - 1 - prompt).logits.argmax(-1)


def compared(one: Tensor, other: Tensor) -> tuple[float, int | None]:
    """Of new tokens (B, T): the share that is equal, and the first place at which any row differs."""
    length = min(one.shape[1], other.shape[1])
    same = one[:, :length].cpu() == other[:, :length].cpu()
    places = (~same.all(0)).nonzero()
    return float(same.double().mean()), int(places[0]) if len(places) else None


def free(one: Tensor, other: Tensor, facts: dict[str, Any]) -> Parity:
    """Of free generations (B, T), new tokens only; ``facts`` are the document's of, reference, model and dtype."""
    equal, first = compared(one, other)
    positions = len(one) * min(one.shape[1], other.shape[1])
    return Parity(**facts, batch=len(one), positions=positions, differing=None, equal=equal, first_difference=first)


def given_text(one: Tensor, other: Tensor, facts: dict[str, Any]) -> Parity:
    """Of likeliest tokens (B, T) after the same text."""
    share = float((one != other).double().mean())
    return Parity(**facts, batch=len(one), positions=one.numel(), differing=share)


def twins(device: torch.device, model_type: str, engine: str) -> list[Parity]:
    """A tiny float32 model of the family on ``engine`` against the eager engine: full depth, and ``verify`` whose
    drafts are mostly wrong. Empty for a family without a stand-in."""
    shape = TWINS.get(model_type)
    if shape is None:
        return []
    prompt, new, batch = TWIN_LOAD
    model = random_model(shape, device, torch.float32)
    exits = Exits.untrained(adapt(model), "1/2")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, model.config.vocab_size, (batch, prompt), generator=generator).to(device)

    def generated(engine: str, policy: str, threshold: float | str) -> Tensor:
        early = EarlyExit(exits, measure=FREE_MEASURE, threshold=threshold, policy=policy, engine=engine)
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, custom_generate=early)
        return out.sequences[:, prompt:]

    expected = generated("eager", "propagate", "never")
    facts = {"reference": "eager, full depth", "model": shape, "dtype": "float32"}
    runs = (("full depth", "propagate", "never"), ("verify", "verify", 0.0))
    return [
        free(generated(engine, policy, threshold), expected, {**facts, "of": f"{engine}, {name}"})
        for name, policy, threshold in runs
    ]
