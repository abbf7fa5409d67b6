"""Law 4 on random draws: whatever the shape of model, batch, exits and window, verified text is the full model's; and
drawn text is distributed as the full model's own."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.engines.plan import POLICIES, ExitPlan
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.readouts.base import build_readout
from dynamax_llm.testing import TINY, ScriptedConfidence, random_ids, tiny_model
from tests.stepping import Stepper

#: Draws per family: over 200 in all.
DRAWS = 15


@st.composite
def draws(draw) -> dict:
    """A random model, batch, prompt, exits, window and script of who leaves where."""
    layers = draw(st.integers(3, 7))
    exits = tuple(sorted(draw(st.sets(st.integers(1, layers - 1), min_size=1, max_size=3))))
    batch, new = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    moves = draw(st.lists(st.integers(0, len(exits)), min_size=batch * 60, max_size=batch * 60))
    return {
        "layers": layers,
        "exits": exits,
        "batch": batch,
        "prompt": draw(st.integers(batch, 8)),  # left padding takes up to batch - 1 of it
        "new": new,
        "window": draw(st.integers(1, 18)),
        "moves": torch.tensor(moves).view(batch, 60),
        "seed": draw(st.integers(0, 10_000)),
        "eos": draw(st.booleans()),
    }


@pytest.mark.parametrize("family", sorted(TINY))
@settings(max_examples=DRAWS, deadline=None, derandomize=True, database=None)
@given(draw=draws())
def test_verified_greedy_text_is_generates(family: str, draw: dict) -> None:
    """Bar 2 of exact output, token for token in float32."""
    model = tiny_model(family, layers=draw["layers"], seed=draw["seed"])
    ids = random_ids(draw["batch"], draw["prompt"], seed=draw["seed"])
    mask = (torch.arange(draw["prompt"]) >= torch.arange(draw["batch"]).unsqueeze(1)).long()
    request = {"attention_mask": mask, "do_sample": False, "max_new_tokens": draw["new"], "eos_token_id": None}
    if draw["eos"]:
        free = model.generate(ids, **request)
        request["eos_token_id"] = int(free[0, draw["prompt"] + draw["new"] // 2])
    expected = model.generate(ids, **request)
    exits = Exits.untrained(adapt(model), draw["exits"])
    early = EarlyExit(exits, measure="softmax_max", threshold=0.5, policy="verify", window=draw["window"])
    early.estimator = ScriptedConfidence(draw["moves"])
    out = model.generate(ids, custom_generate=early, **request)
    assert out.sequences.tolist() == expected.tolist()
    found = out.verification
    assert found.drafted == found.accepted + found.corrected + found.rolled_back


@pytest.mark.parametrize("family", sorted(TINY))
@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@given(draw=draws())
def test_deferred_state_is_that_of_never_leaving(family: str, draw: dict) -> None:
    """Exact state on random draws: logits of a deep token after any history, and the caches, are full depth's."""
    backbone = adapt(tiny_model(family, layers=draw["layers"], seed=draw["seed"]))
    count = draw["prompt"] + draw["new"] + 1
    ids = random_ids(draw["batch"], count, seed=draw["seed"])
    mask = (torch.arange(draw["prompt"]) >= torch.arange(draw["batch"]).unsqueeze(1)).long()
    config = ExitConfig(draw["exits"], backbone.n_layers, head=None)
    full, half = len(draw["exits"]), [0.5] * len(draw["exits"])
    found = []
    for moves in (draw["moves"], torch.full_like(draw["moves"], full)):
        moves = moves.clone()
        moves[:, draw["new"]] = full  # the last token goes deep
        plan = ExitPlan(
            draw["exits"], ScriptedConfidence(moves), build_readout(backbone, config), POLICIES["defer"], draw["window"]
        )
        decoder = Stepper(backbone, plan, mask, batch=len(ids))
        with torch.no_grad():
            decoder.prefill(ids[:, : draw["prompt"]])
            for place in range(draw["prompt"], count):
                step = decoder.step(ids[:, [place]], half)
        assert decoder.engine.pending() == 0
        found.append((step.logits, decoder.engine.cache.snapshot()))
    (logits, state), (expected, intact) = found
    assert (logits - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))
    assert state.lengths == intact.lengths
    for tensor, other in zip(state.tensors, intact.tensors, strict=True):
        assert (tensor - other).abs().max() < 1e-4 * max(1.0, float(other.abs().max()))


VOCABULARY, SAMPLES = 6, 12_000


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_sampled_text_is_distributed_as_the_full_models(family: str) -> None:
    """Chi-square over all triples of tokens, 12,000 draws: what every exit proposes, and how often, must not show."""
    model = tiny_model(family, layers=3, vocab=VOCABULARY, seed=5)
    prompt = random_ids(1, 4, vocab=VOCABULARY, seed=1)
    warpers = {"do_sample": True, "temperature": 0.9, "top_k": 0, "top_p": 1.0, "eos_token_id": None}
    expected = triple_probabilities(model, prompt, temperature=0.9)
    exits = Exits.untrained(adapt(model), (1, 2))
    early = EarlyExit(exits, measure="softmax_max", threshold=0.5, policy="verify", window=3, adaptive=False)
    counts, torch_seed = torch.zeros(VOCABULARY**3), 11
    checked = accepted = 0
    torch.manual_seed(torch_seed)
    batch = 1000
    for turn in range(SAMPLES // batch):
        # Rows leave by different exits; at every third step some go deep, and then all rows are checked.
        moves = torch.randint(0, 2, (batch, 40), generator=torch.Generator().manual_seed(turn))
        moves[: batch // 2, turn % 3 :: 3] = 2
        early.estimator = ScriptedConfidence(moves)
        out = model.generate(prompt.expand(batch, -1), custom_generate=early, max_new_tokens=3, **warpers)
        new = out.sequences[:, -3:]
        place = new[:, 0] * VOCABULARY**2 + new[:, 1] * VOCABULARY + new[:, 2]
        counts += torch.bincount(place, minlength=VOCABULARY**3).float()
        checked += out.verification.accepted + out.verification.corrected
        accepted += out.verification.accepted
    assert checked > SAMPLES / 4 and 0.05 < accepted / checked < 0.95
    assert p_value(counts, expected) > 0.001
    # The test has teeth: the same counts are impossible under a distribution that is off by a little.
    assert p_value(counts, (expected**0.9) / (expected**0.9).sum()) < 1e-6


def triple_probabilities(model, prompt: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probability of each triple of tokens after the prompt, from plain forwards: (V**3,)."""
    triples = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=3)))
    with torch.no_grad():
        logits = model(torch.cat((prompt.expand(len(triples), -1), triples), dim=1)).logits
    log_p = torch.log_softmax(logits[:, prompt.shape[1] - 1 : -1].double() / temperature, dim=-1)
    return log_p.gather(-1, triples.unsqueeze(-1)).squeeze(-1).sum(1).exp()


def p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's chi-square; cells that expect fewer than five are taken together."""
    wanted = expected.double() * counts.sum()
    small = wanted < 5
    observed = torch.cat((counts.double()[~small], counts.double()[small].sum().view(1)))
    wanted = torch.cat((wanted[~small], wanted[small].sum().view(1)))
    keep = wanted > 0
    statistic = ((observed - wanted).square() / wanted)[keep].sum()
    freedom = torch.tensor(float(keep.sum() - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))
