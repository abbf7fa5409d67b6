"""Exit heads: parallel and recurrent forms agree, pads leave no trace, each exit has its own head."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamax_llm.errors import UsageError
from dynamax_llm.exits.blocks import scan, windowed_attention
from dynamax_llm.exits.confidence.bank import auto_width
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.features import STATISTICS, ExitFeatures
from dynamax_llm.exits.registries import HEADS
from dynamax_llm.exits.state import ExitState

D = 24
RECURRENT = ("transformer", "mamba")
CONFIG = ExitConfig(layers=(2, 3, 5), n_layers=7, inputs=("hidden", "statistics"), width=None)


def make(kind: str, **changes) -> ExitHeads:
    """Heads with every parameter moved off its initial value, so that nothing can hide behind a zero."""
    heads = ExitHeads(dataclasses.replace(CONFIG, head=kind, **changes), D)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        heads.prior.copy_(torch.tensor([0.1, 0.7, -0.4]))
    return heads.requires_grad_(False)


def text(batch: int, count: int) -> tuple[torch.Tensor, ExitFeatures]:
    return 5 * torch.randn(batch, count, D), ExitFeatures(torch.randn(batch, count, len(STATISTICS)), None)


def part(h: torch.Tensor, features: ExitFeatures, run: slice) -> tuple[torch.Tensor, ExitFeatures]:
    return h[:, run], ExitFeatures(features.values[:, run], None)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("inputs", [("hidden",), ("statistics",), ("hidden", "statistics")])
def test_confidence_is_a_calibrated_probability(kind: str, inputs: tuple[str, ...]) -> None:
    heads = make(kind, inputs=inputs)
    h, features = text(2, 5)
    logit, _ = heads.logits(1, h, features)
    confidence, _ = heads.confidence(1, h, features, None)
    torch.testing.assert_close(confidence, torch.sigmoid(logit + heads.prior[1]))
    assert heads.needs_logits == ("statistics" in inputs)
    other = ExitFeatures(features.values + 1, None)
    assert torch.equal(heads.logits(1, h, other)[0], logit) == ("statistics" not in inputs)
    assert torch.equal(heads.logits(1, h + 1, features)[0], logit) == ("hidden" not in inputs)


@pytest.mark.parametrize("kind", RECURRENT)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(1, 149), max_size=4, unique=True))
def test_a_sequence_cut_anywhere_gives_the_same_result(kind: str, cuts: list[int]) -> None:
    torch.manual_seed(3)
    heads, count = make(kind), 150  # more than two chunks, and more than the attention window
    h, features = text(2, count)
    whole, end = heads.logits(1, h, features)
    state, states, pieces = heads.initial_state(2)[1], heads.initial_state(2), []
    edges = [0, *sorted(cuts), count]
    for start, stop in itertools.pairwise(edges):
        piece = part(h, features, slice(start, stop))
        logit, state = heads.logits(1, *piece, state)
        states = heads.advance(0, *piece, states)
        pieces.append(logit)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-5, rtol=1e-5)
    for reference, stepped, advanced in zip(end, state, states[1], strict=True):
        torch.testing.assert_close(stepped, reference, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(advanced, reference, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", RECURRENT)
def test_one_token_at_a_time_equals_the_sequence(kind: str) -> None:
    heads = make(kind)
    h, features = text(3, 70)
    whole, _ = heads.confidence(2, h, features, None)
    state = heads.initial_state(3)[2]
    steps = []
    for index in range(70):
        confidence, state = heads.confidence(2, *part(h, features, slice(index, index + 1)), state)
        steps.append(confidence)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", RECURRENT)
def test_advance_leaves_the_states_confidence_leaves(kind: str) -> None:
    heads = make(kind)
    states = heads.initial_state(2)
    for _ in range(5):
        h, features = text(2, 1)
        advanced = heads.advance(1, h, features, states)
        asked = [heads.confidence(exit, h, features, states[exit])[1] for exit in (1, 2)]
        assert advanced[0] is states[0]
        for one, other in zip(advanced[1:], asked, strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
        states = advanced
    assert heads.advance(3, h, features, states) is states  # left at the last exit: nobody later


@pytest.mark.parametrize("kind", RECURRENT)
def test_left_pads_leave_no_trace(kind: str) -> None:
    heads = make(kind)
    h, features = text(3, 90)
    padding = torch.ones(3, 90, dtype=torch.int64)
    padding[1, :17], padding[2, :89] = 0, 0
    padded, state = heads.confidence(0, h, features, None, padding)
    assert bool(torch.isfinite(padded).all())
    for row, pads in ((0, 0), (1, 17), (2, 89)):
        alone, own = heads.confidence(
            0, *part(h[[row]], ExitFeatures(features.values[[row]], None), slice(pads, None)), None
        )
        torch.testing.assert_close(padded[row, pads:], alone[0], atol=1e-5, rtol=0)
        following = text(1, 1)
        after, _ = heads.confidence(0, *following, tuple(item[[row]] for item in state))
        torch.testing.assert_close(after, heads.confidence(0, *following, own)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", RECURRENT)
def test_states_are_never_changed_in_place_and_rows_reorder(kind: str) -> None:
    heads = make(kind)
    h, features = text(3, 4)
    state = heads.confidence(0, h, features, None)[1]
    before = [item.clone() for item in state]
    h, features = text(3, 1)
    confidence, after = heads.confidence(0, h, features, state)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    index = torch.tensor([2, 0, 0, 1])
    moved = ExitState([state] * 3).select(index).of(0)[0]
    again, _ = heads.confidence(0, h[index], ExitFeatures(features.values[index], None), moved)
    torch.testing.assert_close(again, confidence[index], atol=1e-6, rtol=0)
    assert not torch.equal(after[-1], state[-1])


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_heads_remember(kind: str) -> None:
    heads = make(kind)
    h, features = text(1, 6)
    changed = h.clone()
    changed[:, 1] += 1
    difference = (heads.logits(0, changed, features)[0] - heads.logits(0, h, features)[0])[0].abs()
    assert float(difference[0]) == 0  # causal
    assert float(difference[2:].min()) > 1e-6  # and it still matters later


def test_attention_forgets_what_left_its_window() -> None:
    window, heads, channels = 5, 2, 3
    q, k, v = (torch.randn(1, 1, 12, heads, channels) for _ in range(3))
    bias, valid = torch.randn(1, heads, window), torch.ones(1, 1, 12)
    empty = (torch.zeros(1, 1, 4, heads, channels),) * 2 + (torch.zeros(1, 1, 4),)
    y, _ = windowed_attention(q, k, v, valid, bias, empty)
    for t in range(12):
        seen = range(max(0, t - window + 1), t + 1)
        for head in range(heads):
            scores = torch.stack([q[0, 0, t, head] @ k[0, 0, s, head] / 3**0.5 + bias[0, head, t - s] for s in seen])
            mixed = (torch.softmax(scores, 0)[:, None] * torch.stack([v[0, 0, s, head] for s in seen])).sum(0)
            torch.testing.assert_close(y[0, 0, t, head], mixed, atol=1e-5, rtol=1e-5)


def test_scan_is_the_recurrence() -> None:
    b, t, h, p, n = 2, 131, 3, 4, 5
    x, dt = torch.randn(1, b, t, h, p), torch.rand(1, b, t, h)
    decay, state = -torch.rand(1, 1, 1, h) * 4, torch.randn(1, b, h, p, n)
    bs, cs = torch.randn(1, b, t, n), torch.randn(1, b, t, n)
    y, end = scan(x, dt, decay, bs, cs, state)
    for i in range(t):
        keep = torch.exp(dt[:, :, i] * decay[:, :, 0])
        state = state * keep[..., None, None] + torch.einsum(
            "sbhp,sbh,sbn->sbhpn", x[:, :, i], dt[:, :, i], bs[:, :, i]
        )
        torch.testing.assert_close(
            y[:, :, i], torch.einsum("sbhpn,sbn->sbhp", state, cs[:, :, i]), atol=1e-4, rtol=1e-4
        )
    torch.testing.assert_close(end, state, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", HEADS)
def test_exits_have_independent_heads(kind: str) -> None:
    heads = ExitHeads(dataclasses.replace(CONFIG, head=kind), D)
    drawn = [value for name, value in heads.bank.named_parameters() if value.unique().numel() > 1]
    assert all(len(value) == 3 for value in heads.bank.parameters())
    for value in drawn:
        assert not torch.equal(value[0], value[1])
        assert not torch.equal(value[1], value[2])
    h, features = text(1, 3)
    heads.logits(1, h, features)[0].sum().backward()
    touched = [value.grad for value in heads.parameters() if value.grad is not None]
    assert touched
    for gradient in touched:
        assert gradient[0].count_nonzero() == 0
        assert gradient[2].count_nonzero() == 0


@pytest.mark.parametrize("kind", HEADS)
def test_costs_count_the_products(kind: str) -> None:
    width = 4096
    heads = ExitHeads(ExitConfig(layers=(2, 3, 5), n_layers=7, head=kind), width)
    assert heads.macs(0) < 0.02 * 218_103_808  # one Mistral 7B layer
    assert heads.update_macs(0) <= heads.macs(0)
    assert (heads.update_macs(0) > 0) == heads.recurrent
    if kind == "linear":
        assert heads.macs(0) == 3 * width + len(STATISTICS)


def test_mamba_heads_are_small_on_small_backbones() -> None:
    heads = ExitHeads(ExitConfig(layers=(8, 10, 12, 14), n_layers=16), 192)
    assert sum(parameter.numel() for parameter in heads.parameters()) < 4 * 0.01 * 7_900_000
    assert (auto_width(36), auto_width(192), auto_width(4096)) == (16, 32, 64)


@pytest.mark.parametrize("kind", HEADS)
def test_hidden_states_of_any_scale_and_dtype(kind: str) -> None:
    heads = make(kind)
    h, features = text(2, 3)
    logit, _ = heads.logits(0, h, features)
    assert logit.dtype == torch.float32
    torch.testing.assert_close(heads.logits(0, 1000 * h, features)[0], logit, atol=1e-4, rtol=1e-4)
    half, _ = heads.logits(0, h.to(torch.bfloat16), features)
    torch.testing.assert_close(half, logit, atol=0.2, rtol=0.1)
    assert bool(torch.isfinite(heads.logits(0, 0 * h, features)[0]).all())


def test_kinds_are_those_of_the_configuration() -> None:
    assert tuple(HEADS) == ("linear", "mlp", "transformer", "mamba")
    with pytest.raises(UsageError, match=r"unknown head 'none'.*linear, mlp, transformer, mamba"):
        ExitHeads(dataclasses.replace(CONFIG, head=None), D)
