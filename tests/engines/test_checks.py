"""Checks that are one kernel against their plain twin: the same heads asked through PyTorch, float32.

Without a GPU the kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.engines.cuda import check, fused
from dynamax_llm.engines.cuda.check import Check
from dynamax_llm.evaluation.bench.estimators import DrawnConfidence, draw
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.readouts.base import build_readout
from dynamax_llm.testing import random_ids
from tests.engines.test_cuda_engine import DEVICE, small

EXITS = (1, 2)
ALL = ("hidden", "signals", "tokens")


def drawn_heads(config: ExitConfig, backbone: Backbone) -> ExitHeads:
    """Heads whose every parameter and buffer matters."""
    heads = ExitHeads(config, backbone.width).to(DEVICE)
    with torch.no_grad():
        for name, part in (*heads.bank.named_parameters(), ("prior", heads.prior), ("shift", heads.shift)):
            if name not in ("embed", "up"):
                part.normal_(std=2.0 if name == "out" else 0.5)
        heads.scale.uniform_(0.5, 1.5)
    return heads


def pair(backbone: Backbone, config: ExitConfig, heads: ExitHeads, batch: int) -> list[Check]:
    """The same heads, in one kernel and through PyTorch."""
    device, count = torch.device(DEVICE), len(config.layers)
    ticket = torch.tensor([5], dtype=torch.int32, device=device)
    readout = build_readout(backbone, config)
    checks = [Check(heads, readout, count, batch, device, ticket, fuse=fuse) for fuse in (True, False)]
    assert checks[0].kernels == ("check_kernel",) and checks[1].kernels == ("decide_kernel",)
    return checks


def asked_through_pytorch(plain: Check, heads: ExitHeads, index: int, h: torch.Tensor) -> torch.Tensor:
    """Confidence (B,) of what ``plain`` saw last at exit ``index``."""
    seen = plain.features[index]
    assert seen is not None
    return heads.confidence(index, h.unsqueeze(1), seen, None)[0][:, 0]


@pytest.mark.parametrize(
    ("family", "batch", "inputs", "candidates", "head", "bars"),
    [
        ("mistral", 1, ALL, 8, "mlp", (2.0, 2.0, 2.0)),
        ("mistral", 3, ALL, 7, "mlp", (0.5, 0.5, 2.0)),
        ("mamba2", 3, ("hidden", "signals"), 8, "mlp", (2.0, 0.5, 0.5)),
        ("mamba2", 3, ALL, 256, "linear", (0.5, 2.0, 2.0)),
        ("mistral", 1, ("signals",), 6, "linear", (2.0, 0.0, 2.0)),
        ("mistral", 3, ("hidden",), 8, "mlp", (0.5, 0.5, 0.5)),
    ],
)
def test_one_kernel_sees_and_decides_what_pytorch_does(
    family: str,
    batch: int,
    inputs: tuple[str, ...],
    candidates: int,
    head: str,
    bars: tuple[float, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """19 tokens in groups of 4 or 3 that do not divide them, or all of them; more programs than one of each kind."""
    monkeypatch.setattr(fused, "SHARE", 8)
    monkeypatch.setattr(fused, "GROUPS", 2)
    monkeypatch.setattr(fused, "DEPTH", 2)
    monkeypatch.setattr(fused.HeadCheck, "_at_once", lambda self, device: 4)
    backbone = adapt(small(family, layers=4))
    config = ExitConfig((1, 2, 3), 4, head, inputs, width=10, candidates=candidates)
    heads = drawn_heads(config, backbone)
    checks = pair(backbone, config, heads, batch)
    own, plain = checks
    assert own.fused is not None and own.sees_before == ("signals" in inputs)
    with torch.no_grad():
        for _ in range(2):  # a second token begins anew
            for check in checks:
                check.set_thresholds(bars)
                check.left.zero_()
            lives = [torch.ones(batch, dtype=torch.int32, device=DEVICE) for _ in checks]
            for index in range(3):
                h, before = torch.randn(2, batch, backbone.width, device=DEVICE) * 3.0
                gone = plain.left.bool().clone()
                for each, live in zip(checks, lives, strict=True):
                    each.ask(index, h, before, live)
                    assert torch.equal(live, 1 - each.left)
                seen, there = plain.features[index], ~gone
                assert seen is not None
                sure = asked_through_pytorch(plain, heads, index, h)
                assert torch.allclose(own.fused.confidence[index][there], sure[there], atol=1e-5)
                assert torch.equal(own.left, plain.left) and torch.equal(own.exit_index, plain.exit_index)
                assert own.running(index, 5) == plain.running(index, 5) == int((plain.left == 0).sum())
                if inputs == ("hidden",):
                    continue
                assert seen.token is not None and seen.candidates is not None
                assert torch.equal(own.fused.token[there], seen.token[:, 0][there])
                assert torch.equal(own.fused.named[there], seen.candidates[:, 0][there])
                assert torch.allclose(own.fused.values[index][there], seen.values[:, 0][there], atol=1e-5)
                if index == 0:
                    assert own.logits is not None and plain.logits is not None
                    assert torch.allclose(own.logits, plain.logits, atol=1e-5)
    assert int(own.fused._counter.sum()) == 0  # the last programs leave the counters as they found them
    assert bool((own.left == 1).any()) == (min(bars) < 1.0)


def test_of_equal_logits_the_earlier_token_leads() -> None:
    """As in PyTorch: within a group, and where groups are looked through in several goes."""
    backbone = adapt(small("mistral"))
    config = ExitConfig(EXITS, 3, "mlp", ALL, width=8, candidates=5)
    checks = pair(backbone, config, drawn_heads(config, backbone), 1)
    with torch.no_grad():
        backbone.model.get_output_embeddings().weight[[1, 4, 7, 10, 13]] = 0.0
        h, before = torch.randn(2, 1, backbone.width, device=DEVICE)
        for each in checks:
            each.ask(0, h, before, None)
    own, seen = checks[0].fused, checks[1].features[0]
    assert own is not None and seen is not None and seen.candidates is not None
    assert own.named.tolist() == seen.candidates[:, 0].tolist()


@pytest.mark.parametrize(
    ("family", "batch", "policy", "inputs", "bars"),
    [
        ("mistral", 3, "propagate", ALL, (0.3, 0.4)),
        ("mistral", 1, "verify", ALL, (0.3, 0.4)),
        ("mamba2", 1, "propagate", ALL, (0.5, 0.3)),
        ("mamba2", 2, "defer", ("hidden", "signals"), (0.55, 0.4)),
        ("mamba2", 1, "verify", ALL, (0.5, 0.3)),
    ],
)
def test_tokens_and_depths_are_those_of_eager(
    family: str, batch: int, policy: str, inputs: tuple[str, ...], bars: tuple[float, ...]
) -> None:
    """In batches that do not verify, some tokens leave at the first exit, some at the second, some at none."""
    model = small(family)
    backbone = adapt(model)
    config = ExitConfig(EXITS, 3, "mlp", inputs, width=8, candidates=8)
    exits = Exits.of(backbone, config, drawn_heads(config, backbone))
    ids = random_ids(batch, 5, vocab=19).to(DEVICE)
    common: dict[str, Any] = {"threshold": list(bars), "policy": policy, "window": 3}
    outs = [
        model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, custom_generate=early)
        for early in (EarlyExit(exits, engine=engine, **common) for engine in ("eager", "cuda"))
    ]
    assert outs[1].engine == "cuda" and "check_kernel" in outs[1].kernels
    if policy == "verify":
        assert outs[0].verification == outs[1].verification and outs[1].verification.drafted > 0
    else:
        assert len(outs[0].exit_layers.unique()) == (3 if batch > 1 else 2)
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert torch.equal(outs[0].exit_layers, outs[1].exit_layers)


def test_a_judge_that_reads_no_signals_is_given_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves, on this engine too, where it was drawn."""

    def unwanted(*arguments: object) -> None:
        raise AssertionError("signals were made")

    monkeypatch.setattr(check, "exit_features", unwanted)
    model, pattern = small("mistral"), draw(2, 2, 0.9, 0.0, seed=1, period=8)
    early = EarlyExit(Exits.untrained(adapt(model), EXITS), threshold=0.5, measure="state_similarity", engine="cuda")
    early.estimator = DrawnConfidence(pattern.to(DEVICE), 2)
    ids = random_ids(2, 5, vocab=19).to(DEVICE)
    out = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, custom_generate=early)
    # It has counted the prompt's five tokens when the first is decoded.
    expected = torch.tensor([1, 2, 3])[pattern[torch.arange(5, 9) % 8]].t()
    assert out.exit_layers[:, 1:].tolist() == expected.tolist() and len(expected.unique()) == 3


def test_what_does_not_fit_is_asked_through_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = adapt(small("mistral"))
    config = ExitConfig(EXITS, 3, "mlp", ALL, width=8, candidates=8)

    def said(**changes: object) -> str | None:
        changed = dataclasses.replace(config, **changes)
        return fused.HeadCheck.obstacle(ExitHeads(changed, backbone.width), build_readout(backbone, changed), 2)

    assert said() is None
    assert said(head="mamba", width=16) == "only linear and MLP heads are"
    assert said(width=256) == "a width of 256 does not fit one program"
    for changes in ({"candidates": 0}, {"shortlist": "top"}, {"candidates": 4096}):
        assert said(**changes) == "its exits do not look at a shortlist of pairs"
    monkeypatch.setattr(fused, "LEAST_TABLES", 1000)
    tables = 2 * 2 * 19 * 8 * 4
    assert said() is not None and f"tables of {tables} bytes are too much" in str(said())
    assert said(inputs=("hidden", "signals")) is None
