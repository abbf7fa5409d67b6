"""The policies' study: finished cells are not measured again, exact rows are exact, and its small parts are right."""

from __future__ import annotations

import json
import lzma
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes" / "policies"))

import cells
from bench import Bench, first_difference, generate, window_of
from cells import Group, family_of, part_of
from prompts import load_prompts
from records import Log, Settings, pack, read, unpack
from rollback import draft, parts, replay, restore

from dynamax_llm.backbones import adapt
from dynamax_llm.backbones.loading import load
from dynamax_llm.testing import tiny_model
from report import Texts, collect, interval, render
from tuning import TOLERANCE, TRIES, find_threshold

PROMPT, NEW = 8, 6
SMALL = Settings("test", prompts=2, tuning=2, checked=1, alone=1, prompt_tokens=PROMPT, new_tokens=NEW, tuning_tokens=4)
MODELS = ("transformer-ee", "mamba-ee")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paragraphs shipped with the package as prompts of both splits."""
    lines = (ROOT / "src" / "dynamax_llm" / "data" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    items = [{**json.loads(line), "split": ("eval", "tune")[place % 2]} for place, line in enumerate(lines)]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl.xz"
    path.write_bytes(lzma.compress("".join(json.dumps(item) + "\n" for item in items).encode()))
    return path


@pytest.fixture(autouse=True)
def _no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search generates up to eight times per depth; it has a test of its own."""
    monkeypatch.setattr(cells, "find_threshold", lambda *arguments: (0.8, 0.7))


@pytest.fixture(scope="module", params=MODELS)
def bench(request: pytest.FixtureRequest, prompts: Path) -> Bench:
    texts = load_prompts(prompts, load(request.param)[1], "eval", 2, PROMPT + NEW)
    return Bench(request.param, "cpu", texts, PROMPT, 2)


def test_prompts_begin_as_training_documents(bench: Bench) -> None:
    assert bench.texts.shape == (2, PROMPT + NEW)
    assert bench.texts[:, 0].tolist() == [bench.tokenizer.eos_token_id] * 2
    assert (bench.texts[:, 1:] != bench.tokenizer.eos_token_id).all()


def test_closed_exits_are_the_full_model(bench: Bench) -> None:
    for run in ("defer", "verify"):
        early = bench.early("mamba", run, "never")
        assert torch.cat([out.sequences for out in bench.run(early, 2, NEW)]).tolist() == bench.full.tolist()
    agreeing, depth = bench.agreement(bench.early("mamba", "defer", "never"), own=True)
    assert (agreeing, depth) == ([NEW - 1] * 2, 1.0)
    assert bench.choices(True).tolist() == bench.full[:, PROMPT + 1 :].tolist()


def test_a_fixed_exit_reads_no_skipped_state(bench: Bench) -> None:
    """So all policies say the same: one pass (``propagate``, ``defer``) and step by step (``copy``, ``stale``)."""
    runs = [run for run in ("propagate", "copy", "stale", "defer") if bench.defines(run)]
    assert len(runs) == 3
    found = [bench.agreement(bench.early("static", run, 0.0), own=False) for run in runs]
    assert found[0] == found[1] == found[2]
    assert found[0][1] == 0.5
    assert 0 < sum(found[0][0]) < 2 * (NEW - 1)


def test_finished_cells_are_not_measured_again(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def group() -> Group:
        return Group("transformer-ee", "softmax_margin", "batched", SMALL, prompts, tmp_path)

    measured: list[str] = []
    monkeypatch.setattr(Group, "_quality", lambda self, run, threshold: (measured.append(run), {"depth": threshold})[1])
    group().run(["propagate", "copy"], [0.7])
    assert measured == ["propagate", "copy"]
    path = tmp_path / "transformer-ee-softmax_margin-batched.jsonl"
    lines = path.read_bytes()
    group().run(["propagate", "copy"], [0.7])
    assert path.read_bytes() == lines and measured == ["propagate", "copy"]
    path.write_bytes(lines[:-20])  # a kill in the middle of the last line
    group().run(["propagate", "copy"], [0.7])
    assert measured == ["propagate", "copy", "copy"]
    assert list(read(path)) == [json.loads(line)["key"] for line in lines.splitlines()]
    with pytest.raises(SystemExit, match="other settings or prompts"):
        Log(path, Settings("other"))


def test_exact_rows_are_exact(bench: Bench, prompts: Path, tmp_path: Path) -> None:
    fast = bench.name == "transformer-ee"  # the other's approximate cells have no code of their own
    for runs in (["propagate", "defer"], ["verify-4"]) if fast else (["verify-4"],):
        Group(bench.name, "mamba", part_of(runs[0]), SMALL, prompts, tmp_path).run(runs, [0.7])
    found = collect(bench.name, tmp_path, prompts, tmp_path / "results")
    rows = {cell["policy"]: cell for cell in found["cells"]}
    assert list(rows) == (["propagate", "defer", "verify-4"] if fast else ["verify-4"])
    exact = rows["verify-4"]
    assert (exact["rouge_l"]["mean"], exact["identical"], exact["first_difference"]["mean"]) == (1.0, 1.0, NEW)
    assert exact["gaps"] == [] and exact["prompts"] == 1
    assert exact["verification"]["accepted"] > 0
    for cell in [rows[name] for name in rows if name != "verify-4"]:
        assert cell["threshold"] == exact["threshold"]
        assert 0.5 <= cell["depth"] <= 1.0
        assert 0.0 <= cell["agreement"]["low"] <= cell["agreement"]["mean"] <= cell["agreement"]["high"] <= 1.0
        assert sum(cell["layers"].values()) == 2 * NEW
    text = render(bench.name, tmp_path / "results")
    assert text.count("| exact | exact | 1.000 [1.000, 1.000] | 100% |") == 1
    assert (tmp_path / "results" / f"{bench.name}.md").read_text() == text


def test_the_search_finds_a_depth_and_shares_its_points() -> None:
    asked: list[float] = []

    def depth_at(threshold: float) -> float:
        asked.append(threshold)
        odds = math.log(threshold / (1 - threshold))
        return 0.5 + 0.5 / (1 + math.exp(4.0 - odds))

    known: dict[float, float] = {}
    for target in (0.55, 0.65, 0.8):
        threshold, depth = find_threshold(depth_at, target, 0.5, known)
        assert abs(depth - target) <= TOLERANCE and depth_at(threshold) == depth
    assert len(known) <= 2 * TRIES
    before = len(asked)
    find_threshold(depth_at, 0.65, 0.5, known)
    assert len(asked) == before


def test_small_parts() -> None:
    rows = [[1, 2, 3], [8191, 0, 65535]]
    assert unpack(pack(rows), 3) == rows
    assert [first_difference([1, 2, 3], other) for other in ([1, 2, 3], [1, 9, 3], [9, 2, 3])] == [3, 1, 0]
    assert interval([0.5] * 4) == {"mean": 0.5, "low": 0.5, "high": 0.5}
    spread = interval([0.0, 1.0] * 50)
    assert 0.35 < spread["low"] < 0.45 < 0.55 < spread["high"] < 0.65
    assert (window_of("verify-4"), window_of("defer")) == (("verify", 4), ("defer", 16))
    assert (family_of("verify-4"), family_of("copy")) == ("defer", "copy")


def test_rouge_compares_decoded_words() -> None:
    texts = Texts("transformer-ee")
    one, other = (texts.tokenizer(text).input_ids for text in ("the cat sat on the mat", "the cat lay on the mat"))
    assert texts.rouge(one, one) == 1.0
    assert texts.rouge(one, other) == pytest.approx(5 / 6)


@pytest.mark.parametrize("together", [True, False])
def test_both_ways_back_reach_the_same_state(together: bool) -> None:
    backbone = adapt(tiny_model("mamba2"))
    window, after = draft(backbone, 5)
    for kept in (1, 3):
        restore(backbone, window.cache, window.before)
        replay(backbone, window, kept, together)
        replayed = [part.clone() for part in parts(backbone, window.cache)]
        restore(backbone, window.cache, after[kept - 1])
        for one, other in zip(replayed, parts(backbone, window.cache), strict=True):
            assert torch.allclose(one, other, atol=1e-5)
        assert not torch.allclose(replayed[1], after[4][1], atol=1e-3)


def test_generation_is_exactly_as_long_as_asked(bench: Bench) -> None:
    assert generate(bench.model, bench.texts[:, :PROMPT], 3).shape == (2, PROMPT + 3)
