"""Schedule-free AdamW step by step, through a kill, and the paper's preset that asks for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dynamax_llm.errors import UsageError
from dynamax_llm.text.batches import Position, Split, find_source
from dynamax_llm.training.optimiser import averaged, build, set_rate
from dynamax_llm.training.presets import PRESETS
from dynamax_llm.training.settings import SCHEDULE_FREE, TrainSettings
from dynamax_llm.training.trainer import train
from tests.training.test_trainer import CONFIG, SETTINGS, run_until

FREE = dataclasses.replace(
    SETTINGS,
    optimiser=SCHEDULE_FREE,
    documents=8,
    lr=3e-3,
    weight_decay=0.0,
    balanced=False,
    no_exit_share=1.0,
    eval_every=150,
)


def test_schedule_free_steps_are_those_of_its_paper() -> None:
    """Defazio et al., arXiv 2405.15682: z moves, x is the mean of all z so far, gradients are taken at y between."""
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    settings = TrainSettings(optimiser=SCHEDULE_FREE, lr=0.1, weight_decay=0.0, warmup=0.0)
    optimiser = build(settings, [parameter])
    x = z = 1.0
    second = 0.0
    for step, gradient in enumerate((0.5, -2.0, 0.25), start=1):
        parameter.grad = torch.tensor([gradient])
        set_rate(optimiser, step / 3, settings.lr, settings.warmup)
        assert optimiser.param_groups[0]["lr"] == pytest.approx(0.1)  # no schedule
        optimiser.step()
        second = 0.999 * second + 0.001 * gradient**2
        z -= 0.1 * gradient / ((second / (1 - 0.999**step)) ** 0.5 + 1e-8)
        x += (z - x) / step
        assert parameter.item() == pytest.approx(0.1 * z + 0.9 * x, abs=1e-5)
        with averaged(optimiser):
            assert parameter.item() == pytest.approx(x, abs=1e-5)
        assert parameter.item() == pytest.approx(0.1 * z + 0.9 * x, abs=1e-5)


def test_a_killed_schedule_free_run_ends_like_an_unbroken_one(
    backbone, corpus: Path, tokenizer, tmp_path: Path, monkeypatch
) -> None:
    common = (backbone("mistral"), tokenizer, find_source(corpus), CONFIG, FREE)
    unbroken = train(*common, tmp_path / "a")
    for steps in (1, 5):
        run_until(monkeypatch, steps, *common, tmp_path / "b")
    resumed = train(*common, tmp_path / "b")
    assert unbroken.provenance["steps"] == resumed.provenance["steps"] == 8  # documents
    assert unbroken.provenance["tokens"] <= 8 * FREE.sequence
    for key in ("train_loss", "history", "held_out"):
        assert resumed.provenance[key] == unbroken.provenance[key], key
    for name, value in unbroken.heads.state_dict().items():
        assert torch.equal(resumed.heads.state_dict()[name], value), name
    assert unbroken.heads.prior.count_nonzero() == 0  # classes are not balanced, so nothing is to be put right
    history = unbroken.provenance["history"]
    assert history[-1]["loss"] < history[0]["loss"]


def test_documents_stand_alone(corpus: Path, tokenizer) -> None:
    source = find_source(corpus)
    split = Split(source, tokenizer, False, 0.2, 64, 512, alone=True)
    found = list(split.batches(Position(), epochs=1))
    assert len(found) == len(list(split.documents(0)))
    assert {len(batch.ids) for batch, _ in found} == {1}
    assert max(batch.tokens for batch, _ in found) == 64


def test_the_papers_preset() -> None:
    preset = PRESETS.lookup("dynamax-paper")
    config, settings = preset.exit_config(32), preset.train_settings()
    assert config.layers == (16, 20, 24, 28)
    assert (config.readout, config.tail_layers, settings.label, settings.label_k) == ("tail", 1, "topk", 15)
    assert config.inputs == ("hidden",)
    assert (settings.lr, settings.documents, settings.sequence) == (2.5e-4, 1000, 4096)
    assert (settings.optimiser, settings.no_exit_share, settings.preset) == (SCHEDULE_FREE, 1.0, "dynamax-paper")
    assert preset.exit_config(64, head="linear").head == "linear"
    assert preset.train_settings(lr=1e-3).lr == 1e-3
    with pytest.raises(UsageError, match=r"unknown preset 'paper'.*dynamax-paper"):
        PRESETS.lookup("paper")


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(UsageError, match=r"optimiser = 'sgd': give one of adamw, schedule-free"):
        TrainSettings(optimiser="sgd")
    with pytest.raises(UsageError, match="documents = 0: give at least 1"):
        TrainSettings(documents=0)
