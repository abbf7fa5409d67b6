"""Statistics of a readout, the fixed measures, and what tokens that left keep."""

from __future__ import annotations

import math

import pytest
import torch

from dynamax_llm.errors import UsageError
from dynamax_llm.exits.confidence.measures import measure
from dynamax_llm.exits.features import LOG_FLOOR, LOG_SCALE, STATISTICS, ExitFeatures, exit_features, select, shortlist
from dynamax_llm.exits.registries import MEASURES
from dynamax_llm.exits.state import ExitState

B, T, D, V = 2, 3, 8, 11


@pytest.fixture
def seen() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h, h before, logits."""
    return torch.randn(B, T, D), torch.randn(B, T, D), 3 * torch.randn(B, T, V)


def column(features: ExitFeatures, name: str) -> torch.Tensor:
    return features.values[..., STATISTICS.index(name)]


def test_columns_are_what_their_names_say(seen) -> None:
    h, before, logits = seen
    features = exit_features(h, before, logits, None)
    p = torch.softmax(logits.double(), -1)
    ranked = p.sort(-1, descending=True).values
    assert features.values.shape == (B, T, len(STATISTICS))
    assert features.values.dtype == torch.float32
    for rank in range(1, 6):
        expected = ranked[..., rank - 1].log().clamp(min=LOG_FLOOR) / LOG_SCALE
        torch.testing.assert_close(column(features, f"log_p{rank}").double(), expected, atol=1e-5, rtol=0)
    entropy = -(p * p.log()).sum(-1) / math.log(V)
    similarity = torch.nn.functional.cosine_similarity(h, before, dim=-1)
    torch.testing.assert_close(column(features, "margin").double(), ranked[..., 0] - ranked[..., 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(column(features, "entropy").double(), entropy, atol=1e-5, rtol=0)
    torch.testing.assert_close(column(features, "similarity"), similarity)
    assert torch.equal(features.token, logits.argmax(-1))
    assert column(features, "same_token").count_nonzero() == 0
    assert column(features, "previous_probability").count_nonzero() == 0


def test_history_compares_with_the_previous_exit(seen) -> None:
    h, before, logits = seen
    earlier = logits.clone()
    earlier[0] = torch.randn(T, V) + 20 * torch.nn.functional.one_hot((logits[0].argmax(-1) + 1) % V, V)
    previous = exit_features(h, before, earlier, None)
    features = exit_features(h, before, logits, previous)
    assert column(features, "same_token").tolist() == [[0.0] * T, [1.0] * T]
    there = torch.softmax(logits, -1).gather(-1, earlier.argmax(-1, keepdim=True)).squeeze(-1)
    torch.testing.assert_close(column(features, "previous_probability"), there)


def test_unread_exits_know_only_similarity(seen) -> None:
    h, before, logits = seen
    features = exit_features(h, before, None, exit_features(h, before, logits, None))
    assert features.token is None
    assert features.values[..., :-1].count_nonzero() == 0
    torch.testing.assert_close(column(features, "similarity"), torch.nn.functional.cosine_similarity(h, before, dim=-1))
    after = exit_features(h, before, logits, features)
    assert column(after, "previous_probability").count_nonzero() == 0


def test_certain_readouts_stay_finite(seen) -> None:
    h, before, _ = seen
    logits = torch.zeros(B, T, V)
    logits[..., 3] = 500.0
    features = exit_features(h, before, logits, None)
    assert bool(torch.isfinite(features.values).all())
    assert column(features, "log_p2").unique().tolist() == [LOG_FLOOR / LOG_SCALE]


def test_tokens_that_left_keep_their_signals(seen) -> None:
    h, before, logits = seen
    a, b = exit_features(h, before, logits, None), exit_features(before, h, -logits, None)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    kept = select(mask, a, b)
    assert torch.equal(kept.values[mask], a.values[mask])
    assert torch.equal(kept.values[~mask], b.values[~mask])
    assert torch.equal(kept.token, torch.where(mask, a.token, b.token))
    assert select(mask, a, ExitFeatures(b.values, None)).token is None


def test_measures_are_their_formulas(seen) -> None:
    h, before, logits = seen
    features = exit_features(h, before, logits, None)
    p = torch.softmax(logits, -1)
    top = p.topk(2, -1).values
    expected = {
        "softmax_max": top[..., 0],
        "softmax_margin": top[..., 0] - top[..., 1],
        "entropy": 1 + (p * p.log()).sum(-1) / math.log(V),
        "state_similarity": (1 + torch.nn.functional.cosine_similarity(h, before, dim=-1)) / 2,
    }
    assert set(MEASURES) == set(expected)
    for name, values in expected.items():
        found, state = measure(name).confidence(0, h, features, None)
        torch.testing.assert_close(found, values, atol=1e-5, rtol=0)
        assert state is None
        assert float(found.min()) >= 0
        assert float(found.max()) <= 1
    assert [name for name in MEASURES if not measure(name).needs_logits] == ["state_similarity"]


def test_measures_remember_nothing() -> None:
    estimator = measure("entropy")
    assert estimator.initial_state(2) is None
    assert ExitState.initial(estimator, estimator, 2) == ExitState().select(torch.tensor([1, 0])) == ExitState()
    features = ExitFeatures(torch.zeros(1, 1, len(STATISTICS)), None)
    assert estimator.advance(1, torch.zeros(1, 1, D), features, None) is None
    assert (estimator.macs(0), estimator.update_macs(0)) == (0, 0)


def test_unknown_measure_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'softmax_magrin'.*Did you mean 'softmax_margin'\?.*state_similarity"):
        measure("softmax_magrin")


def test_a_shortlist_is_the_two_likeliest_of_every_group() -> None:
    logits = torch.randn(2, 3, 59)
    values, ids = shortlist(logits, 15)  # 8 groups
    assert values.shape == ids.shape == (2, 3, 16)
    assert torch.equal(values, logits.gather(-1, ids))
    for group in range(8):
        members = logits[..., group::8]
        expected = members.topk(2, dim=-1).values
        mine = values[..., [group, 8 + group]]
        assert torch.equal(mine, expected), group
        assert (ids[..., [group, 8 + group]] % 8 == group).all()
    assert torch.equal(values.topk(2, dim=-1).values, logits.topk(2, dim=-1).values)  # never missed


def test_a_shortlist_of_a_small_vocabulary_is_all_of_it() -> None:
    logits = torch.randn(1, 1, 12)
    values, ids = shortlist(logits, 11)
    assert torch.equal(values, logits)
    assert torch.equal(ids[0, 0], torch.arange(12))


def test_statistics_of_a_shortlist_are_shares_of_the_whole_vocabulary() -> None:
    h, logits = torch.randn(2, 3, 8), 2 * torch.randn(2, 3, 96)
    seen = exit_features(h, h, logits, None, 16, pairs=True)
    whole = exit_features(h, h, logits, None, 16)
    for name in ("log_p1", "log_p2", "margin", "entropy"):
        torch.testing.assert_close(column(seen, name), column(whole, name))
    assert torch.equal(seen.token, whole.token)
    assert torch.equal(seen.rival, whole.rival)
    assert seen.candidates.shape == (2, 3, 16)
    assert torch.equal(seen.candidates, shortlist(logits, 16)[1])
