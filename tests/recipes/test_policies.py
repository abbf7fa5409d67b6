"""The policies' study: finished cells are read back, exact rows are exact, and recorded tables are reproduced."""

from __future__ import annotations

import argparse
import json
import lzma
import math
from pathlib import Path

import pytest
import torch

from dynamax_llm.backbones import adapt
from dynamax_llm.errors import UsageError
from dynamax_llm.testing import tiny_model
from tests.recipes.scripts import ROOT, script

study, rollback, report = script("policies/study"), script("policies/rollback"), script("policies/report")
PROMPT, NEW = 8, 6
MODELS = ("transformer-ee", "mamba-ee")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paragraphs shipped with the package as prompts of both splits."""
    lines = (ROOT / "src" / "dynamax_llm" / "data" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    items = [{**json.loads(line), "split": ("eval", "tune")[place % 2]} for place, line in enumerate(lines)]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl.xz"
    path.write_bytes(lzma.compress("".join(json.dumps(item) + "\n" for item in items).encode()))
    return path


def options(prompts: Path, out: Path, **changed) -> argparse.Namespace:
    """The smallest study."""
    sizes = {"prompts": 2, "tuning": 2, "checked": 1, "alone": 1, "prompt_tokens": PROMPT, "new_tokens": NEW}
    places = {"data": prompts, "out": out, "results": out / "results", "device": "cpu", "alone_device": "cpu"}
    chosen = {"estimators": ["mamba"], "policies": ["propagate", "defer", "verify-4"], "depths": [0.7], "again": False}
    return argparse.Namespace(**{**sizes, **places, **chosen, "models": ["transformer-ee"], **changed})


@pytest.fixture(scope="module", params=MODELS)
def bench(request: pytest.FixtureRequest, prompts: Path, tmp_path_factory: pytest.TempPathFactory):
    return study.Study(request.param, options(prompts, tmp_path_factory.mktemp("out")))


def test_prompts_begin_as_training_documents(bench) -> None:
    assert bench.texts.shape == (2, PROMPT + NEW)
    assert bench.texts[:, 0].tolist() == [bench.tokenizer.eos_token_id] * 2
    assert (bench.texts[:, 1:] != bench.tokenizer.eos_token_id).all()


def test_closed_exits_are_the_full_model(bench) -> None:
    for run in ("defer", "verify"):
        out = study.generate(bench.model, bench.texts[:, :PROMPT], NEW, bench.early("mamba", run, "never"))
        assert out.sequences.tolist() == bench.full.tolist()
    found = bench.agreement(bench.early("mamba", "defer", "never"), bench.full)
    assert found.losses.tolist() == [0.0, 0.0] and found.depth.tolist() == [1.0, 1.0]


def test_a_fixed_exit_reads_no_skipped_state(bench) -> None:
    """So all policies give the same: one pass (``propagate``, ``defer``) and step by step (``copy``, ``stale``)."""
    runs = [run for run in ("propagate", "copy", "stale", "defer") if bench.defines(run)]
    assert len(runs) == 3
    found = [bench.agreement(bench.early("static", run, 0.0), bench.texts) for run in runs]
    assert found[0].losses.tolist() == found[1].losses.tolist() == found[2].losses.tolist()
    assert found[0].depth.tolist() == [0.5, 0.5]
    assert 0 < found[0].losses.sum() < 2


def test_finished_cells_are_not_measured_again(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "threshold_for_depth", lambda depth_at, aim: (0.8, 0.7))
    measured: list[str] = []
    plain = study.Study.quality
    monkeypatch.setattr(study.Study, "quality", lambda self, early: (measured.append("all"), plain(self, early))[1])
    args = options(prompts, tmp_path, estimators=["softmax_margin"], policies=["propagate"])
    study.run(args)
    path = study.cell_path(tmp_path, "transformer-ee", "softmax_margin", "propagate@0.7")
    lines = path.read_bytes()
    study.run(args)
    assert path.read_bytes() == lines and measured == ["all"]
    path.write_bytes(lines[: lines.rfind(b"{") + 9])  # a kill in the middle of the last line
    study.run(args)
    assert len(measured) == 2
    with pytest.raises(UsageError, match="records of another run"):
        study.run(options(prompts, tmp_path, estimators=["softmax_margin"], policies=["propagate"], new_tokens=5))


def test_exact_rows_are_exact(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "threshold_for_depth", lambda depth_at, aim: (0.8, 0.7))
    args = options(prompts, tmp_path)
    study.run(args)
    study.collect(args)
    cells = json.loads((tmp_path / "results" / "transformer-ee.json").read_text())["cells"]
    rows = {cell["policy"]: cell for cell in cells}
    assert list(rows) == ["propagate", "defer", "verify-4"]
    exact = rows["verify-4"]
    assert (exact["rouge_l"]["mean"], exact["identical"], exact["first_difference"]["mean"]) == (1.0, 1.0, NEW)
    assert exact["gaps"] == [] and exact["prompts"] == 1
    assert exact["verification"]["accepted"] > 0
    for name in ("propagate", "defer"):
        cell = rows[name]
        assert cell["threshold"] == exact["threshold"]
        assert 0.5 <= cell["depth"] <= 1.0
        assert 0.0 <= cell["agreement"]["low"] <= cell["agreement"]["mean"] <= cell["agreement"]["high"] <= 1.0
        assert sum(cell["layers"].values()) == 2 * NEW
    study.table(args)
    text = (tmp_path / "results" / "transformer-ee.md").read_text()
    assert text.count("| exact | exact | 1.000 [1.000, 1.000] | 100% |") == 1


@pytest.mark.parametrize("model", MODELS)
def test_recorded_tables_are_those_of_the_recorded_numbers(model: str) -> None:
    results = ROOT / "recipes" / "policies" / "results"
    assert report.render(model, results) == (results / f"{model}.md").read_text(encoding="utf-8")
    assert report.summarise(MODELS, results) == (results / "summary.md").read_text(encoding="utf-8")


def test_the_search_finds_a_depth() -> None:
    def depth_at(threshold: float) -> float:
        odds = math.log(threshold / (1 - threshold))
        return 0.5 + 0.5 / (1 + math.exp(4.0 - odds))

    for aim in (0.55, 0.65, 0.8):
        threshold, depth = study.threshold_for_depth(depth_at, aim)
        assert abs(depth - aim) <= 0.03 and depth_at(threshold) == depth
    assert (study.window_of("verify-4"), study.window_of("defer")) == (("verify", 4), ("defer", 16))


@pytest.mark.parametrize("together", [True, False])
def test_both_ways_back_reach_the_same_state(together: bool) -> None:
    backbone = adapt(tiny_model("mamba2"))
    window, after = rollback.draft(backbone, 5)
    for kept in (1, 3):
        rollback.restore(backbone, window.cache, window.before)
        rollback.replay(backbone, window, kept, together)
        replayed = [part.clone() for part in rollback.parts(backbone, window.cache)]
        rollback.restore(backbone, window.cache, after[kept - 1])
        for one, other in zip(replayed, rollback.parts(backbone, window.cache), strict=True):
            assert torch.allclose(one, other, atol=1e-5)
        assert not torch.allclose(replayed[1], after[4][1], atol=1e-3)


def test_generation_is_exactly_as_long_as_asked(bench) -> None:
    assert study.generate(bench.model, bench.texts[:, :PROMPT], 3).shape == (2, PROMPT + 3)
