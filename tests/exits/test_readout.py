"""Readouts: what an exit says, and what its decision is taken from."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dynamax_llm.backbones import adapt
from dynamax_llm.exits.config import SHORTLISTS, ExitConfig
from dynamax_llm.exits.features import LOG_SCALE, exit_features, shortlist
from dynamax_llm.exits.readouts import base
from dynamax_llm.exits.readouts.base import build_readout
from dynamax_llm.exits.readouts.lens import Lens
from dynamax_llm.testing import tiny_model


@pytest.fixture(params=["mistral", "mamba2"])
def backbone(request):
    return adapt(tiny_model(request.param))


def config(readout: str) -> ExitConfig:
    return ExitConfig.from_options(layers=(2, 3), n_layers=5, head=None, readout=readout, lens_rank=4, tail_layers=2)


def logits(readout, exit: int, h: torch.Tensor) -> torch.Tensor:
    return readout.logits(exit, readout.transform(exit, h)[0])


@pytest.mark.parametrize("kind", ["head", "tail"])
def test_head_and_tail_decide_on_the_plain_head(backbone, kind: str) -> None:
    readout = build_readout(backbone, config(kind))
    h = torch.randn(2, 3, backbone.width)
    expected = backbone.model.get_output_embeddings()(backbone.final_norm(h))
    assert torch.equal(readout.logits(0, readout.transform(0, h)[0]), expected)
    assert torch.equal(readout.logits(1, h), expected)
    assert readout.tail_layers == (2 if kind == "tail" else 0)
    assert readout.decision_is_output == (kind == "head")
    assert readout.macs(0) == backbone.vocab_size * backbone.width


def test_a_fresh_lens_changes_nothing_and_each_exit_has_its_own(backbone) -> None:
    lens = Lens(2, backbone.width, 4)
    readout = build_readout(backbone, config("lens"), lens)
    h = torch.randn(2, 3, backbone.width)
    assert torch.equal(logits(readout, 0, h), backbone.readout(h))
    with torch.no_grad():
        lens.up[1].normal_()
    moved = h + h @ lens.down[1].T @ lens.up[1].T
    torch.testing.assert_close(logits(readout, 1, h), backbone.readout(moved), atol=1e-5, rtol=1e-5)
    features, output = readout.read(1, h[:, :1], h[:, 1:2], None)
    torch.testing.assert_close(output, logits(readout, 1, h[:, :1]))
    assert torch.equal(features.token, output.argmax(-1))
    given, again = readout.read(1, h[:, :1], h[:, 1:2], None, moved[:, :1])
    torch.testing.assert_close((given.values, again), (features.values, output), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(readout, 0, h), backbone.readout(h))
    assert readout.macs(1) == backbone.vocab_size * backbone.width + 2 * 4 * backbone.width


def test_lens_keeps_dtype_and_scale() -> None:
    lens = Lens(1, 8, 2)
    with torch.no_grad():
        lens.up[0].normal_()
        h = torch.randn(1, 2, 8)
        assert lens(0, h.to(torch.bfloat16)).dtype == torch.bfloat16
        torch.testing.assert_close(lens(0, 100 * h), 100 * lens(0, h))


def test_slices_of_a_sequence_see_what_the_whole_does(backbone, monkeypatch) -> None:
    readout = build_readout(backbone, config("head"))
    h, before = torch.randn(2, 2, 7, backbone.width).unbind(0)
    previous = exit_features(before, h, readout.logits(0, before), None)
    whole = exit_features(h, before, readout.logits(1, h), previous)
    calls = []
    monkeypatch.setattr(base, "LOGITS_AT_ONCE", 2 * 2 * backbone.vocab_size)
    monkeypatch.setattr(readout, "scores", lambda exit, h: calls.append(h.shape) or backbone.readout(h))
    sliced, tokens = readout.features(1, h, before, previous)
    assert [shape[1] for shape in calls] == [2, 2, 2, 1]
    torch.testing.assert_close(sliced.values, whole.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(sliced.token, whole.token)
    assert torch.equal(tokens, whole.token)


@pytest.mark.parametrize("kind", SHORTLISTS)
def test_later_exits_look_only_at_the_first_ones_candidates(backbone, kind) -> None:
    """One token at a time, rows of the LM head are gathered; over a sequence the full readout is: same numbers."""
    readout = build_readout(backbone, dataclasses.replace(config("head"), candidates=6, shortlist=kind))
    h, later = torch.randn(2, 2, 30, backbone.width).unbind(0)
    first, _ = readout.features(0, h, later, None)
    seen, tokens = readout.features(1, later, h, first)
    full = backbone.readout(h).topk(6).indices if kind == "top" else shortlist(backbone.readout(h), 6)[1]
    assert torch.equal(first.candidates, full)
    assert torch.equal(tokens, backbone.readout(later).argmax(-1))
    assert (seen.token.unsqueeze(-1) == full).any(-1).all()
    shares = torch.log_softmax(backbone.readout(later).gather(-1, full), dim=-1)
    torch.testing.assert_close(seen.values[..., 0] * LOG_SCALE, shares.amax(-1), atol=1e-5, rtol=1e-5)
    for place in range(30):
        one = slice(place, place + 1)
        start, logits = readout.read(0, h[:, one], later[:, one], None)
        assert torch.allclose(logits, backbone.readout(h[:, one]), atol=1e-5)
        step, nothing = readout.read(1, later[:, one], h[:, one], start)
        assert nothing is None
        torch.testing.assert_close(step.values, seen.values[:, one], atol=1e-5, rtol=1e-5)
        assert torch.equal(step.token, seen.token[:, one])
    assert readout.read_macs(0) == backbone.vocab_size * backbone.width
    assert readout.read_macs(1) == 6 * backbone.width


def test_a_lens_readout_needs_its_lens(backbone) -> None:
    with pytest.raises(AssertionError):
        build_readout(backbone, config("lens"))
