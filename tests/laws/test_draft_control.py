"""The controller of drafting: what a bad draft costs at most, what a good one gets, and that no text changes."""

from __future__ import annotations

import pytest
import torch

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.decoding.draft_choice import ChainCosts
from dynamax_llm.decoding.draft_control import LONGEST_REST, CountedCosts, DraftControl, MeasuredCosts
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.testing import ScriptedConfidence, random_ids, tiny_model

#: As measured on a CPU: a draft step, and passes over 1 to 9 tokens.
COSTS = ChainCosts(draft=0.12, passes=(1.0, 1.06, 1.25, 1.9, 2.3, 2.45, 2.6, 2.85, 3.1))


def scripted(accepts, tokens: int, proposals: int = 8, costs: ChainCosts = COSTS) -> tuple[float, list[int]]:
    """Steps spent on ``tokens`` tokens, and the proposals of every window; ``accepts(place)``: whether a proposal for
    the token at that place is right."""
    control, place, spent, made = DraftControl(MeasuredCosts(costs)), 0, 0.0, []
    while place < tokens:
        count = proposals if control.most is None else min(control.most, proposals)
        right = next((step for step in range(count) if not accepts(place + step)), count)
        place += right + 1
        spent += costs.window(count)
        made.append(count)
        control.note(right + 1, [[0]] * count)
    return spent / place * tokens, made


def test_a_draft_that_is_always_wrong_costs_little() -> None:
    spent, made = scripted(lambda place: False, 200)
    assert 200 < spent <= 1.1 * 200
    assert sum(count > 0 for count in made) >= 4  # it was tried again
    without = 200 * COSTS.window(8)
    assert without > 3.5 * spent


def test_a_cheap_wrong_draft_costs_little_too() -> None:
    spent, _ = scripted(lambda place: False, 200, proposals=1)
    assert spent <= 1.1 * 200


def test_a_draft_that_turns_good_is_picked_up() -> None:
    spent, made = scripted(lambda place: place >= 60, 300)
    always, _ = scripted(lambda place: True, 300)
    assert always < 0.5 * 300
    assert spent < 60 * 1.15 + 0.75 * 240  # most of the rest is drafted
    assert made[-1] == 8  # full chains again


def test_a_good_draft_never_rests() -> None:
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(2000, generator=generator) < 0.85
    spent, made = scripted(lambda place: bool(right[min(place, 1999)]), 500, proposals=4)
    assert spent < 0.8 * 500  # 0.75 without a controller
    assert made.count(0) <= 0.1 * len(made)


def test_rests_double_up_to_a_bound() -> None:
    _, made = scripted(lambda place: False, 2000)
    rests, length = [], 0
    for count in [*made, 1]:
        if count == 0:
            length += 1
        elif length:
            rests.append(length)
            length = 0
    assert rests[:4] == [16, 32, 64, 128] and max(rests) == LONGEST_REST


def test_counted_costs_are_shares_of_weights() -> None:
    costs = CountedCosts((0.25, 0.5, 1.1))
    assert costs.cost([]) == pytest.approx(1.1)
    assert costs.cost([[0, 1], [0, 2], [-1, 0]]) == pytest.approx(1.1 + 0.5 + 0.25 + 0.25)


@pytest.mark.parametrize("sample", [False, True])
def test_text_is_the_same_with_and_without(sample: bool) -> None:
    """Exits that always leave, and are nearly always wrong: the controller rests, greedy text stays generate's own."""
    model = tiny_model("mistral")
    ids = random_ids(2, 6)
    exits = Exits.untrained(adapt(model), (2,))
    request = {"max_new_tokens": 60, "eos_token_id": None, "do_sample": sample}
    outs = []
    for adaptive in (True, False):
        early = EarlyExit(exits, measure="softmax_max", threshold=0.0, policy="verify", adaptive=adaptive)
        torch.manual_seed(0)
        outs.append(model.generate(ids, custom_generate=early, attention_mask=torch.ones_like(ids), **request))
    with_control, without = outs
    assert with_control.verification.rested > 20 and without.verification.rested == 0
    assert with_control.trace.stats.passes < 0.5 * without.trace.stats.passes
    if not sample:
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **request)
        assert with_control.sequences.tolist() == without.sequences.tolist() == expected.tolist()


def test_resting_evaluates_no_exit() -> None:
    model = tiny_model("mistral")
    ids = random_ids(1, 6)
    early = EarlyExit(Exits.untrained(adapt(model), (2,)), measure="softmax_max", threshold=0.5, policy="verify")
    early.estimator = ScriptedConfidence(torch.zeros(1, 200, dtype=torch.long))  # always leaves
    out = model.generate(ids, custom_generate=early, max_new_tokens=60, eos_token_id=None, do_sample=False)
    found = out.verification
    assert found.rested > 20
    assert early.estimator.step == sum(window.steps for window in found.rounds)
    assert sum(map(sum, (window.proposed for window in found.rounds))) == found.drafted
    assert sum(map(sum, (window.accepted for window in found.rounds))) == found.accepted
