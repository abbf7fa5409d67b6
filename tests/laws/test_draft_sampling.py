"""Sampled text is distributed as the full model's own, whatever a draft proposes and whatever tokens it cannot say."""

from __future__ import annotations

import pytest
import torch

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.testing import random_ids, tiny_model
from tests.drafting import draft_exits
from tests.laws.test_exact_random import p_value

V, BATCH, TURNS = 9, 1000, 5


def pair_probabilities(model, prompt: torch.Tensor, warpers: dict) -> torch.Tensor:
    """Probability of each pair of tokens that follow the first new one (V**3,), from plain forwards, warped."""
    first = _next(model, prompt, warpers)
    whole = torch.zeros(V, V, V, dtype=torch.float64)
    for token in range(V):
        one = torch.cat((prompt, torch.tensor([[token]])), dim=1)
        second = _next(model, one, warpers)
        pairs = torch.cat((one.expand(V, -1), torch.arange(V).unsqueeze(1)), dim=1)
        whole[token] = first[0, token] * second[0].unsqueeze(1) * _next(model, pairs, warpers)
    return whole.flatten()


def _next(model, ids: torch.Tensor, warpers: dict) -> torch.Tensor:
    """The warped distribution (B, V) of the next token, as temperature and top-p define it."""
    with torch.no_grad():
        logits = model(ids).logits[:, -1].double() / warpers["temperature"]
    p, order = logits.softmax(-1).sort(descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= warpers["top_p"], 0.0)  # the likeliest until their sum reaches top_p
    return torch.zeros_like(p).scatter(-1, order, p / p.sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("family", "block", "temperature", "top_p"), [("llama", "mamba", 0.7, 1.0), ("mamba2", "transformer", 1.0, 0.9)]
)
def test_drafted_samples_are_distributed_as_the_full_models(
    family: str, block: str, temperature: float, top_p: float
) -> None:
    """Chi-square over all triples, 5,000 draws; the draft speaks six of nine tokens, the text needs all."""
    model = tiny_model(family, layers=3, vocab=V, seed=5)
    backbone, prompt = adapt(model), random_ids(1, 4, vocab=V, seed=1)
    warpers = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p, "eos_token_id": None}
    expected = pair_probabilities(model, prompt, warpers)
    exits = draft_exits(backbone, block, 6, seed=2)
    silent = sorted(set(range(V)) - set(exits.readout_weights.tokens.tolist()))
    early = EarlyExit(exits, measure="softmax_max", threshold=0.2, policy="verify", window=3)
    counts, checked, accepted = torch.zeros(V**3), 0, 0
    for _ in range(TURNS):
        out = model.generate(prompt.expand(BATCH, -1), custom_generate=early, max_new_tokens=3, **warpers)
        new = out.sequences[:, -3:]
        counts += torch.bincount((new * torch.tensor([V * V, V, 1])).sum(1), minlength=V**3).float()
        checked += out.verification.accepted + out.verification.corrected
        accepted += out.verification.accepted
    assert checked > BATCH * TURNS and 0.05 < accepted / checked < 0.95
    of_third = counts.view(V, V, V).sum((0, 1))
    assert float(of_third[silent].sum()) > 0.01 * BATCH * TURNS  # tokens that no draft proposes
    assert float(counts[expected == 0].sum()) == 0
    assert p_value(counts, expected) > 0.001
    # The test has teeth: the same counts are impossible under a distribution that is off by a little.
    assert p_value(counts, (expected**0.8) / (expected**0.8).sum()) < 1e-4
