"""The smallest form, or the pure parts, of the recipes that have no test file of their own."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from tests.recipes.scripts import ROOT, script

common, texts = script("common"), script("texts")


def test_every_script_says_what_it_does_and_parses() -> None:
    scripts = sorted((ROOT / "recipes").rglob("*.py"))
    assert len(scripts) > 20
    for path in scripts:
        source = path.read_text(encoding="utf-8")
        assert source.startswith('"""'), path
        compile(source, str(path), "exec")


def test_tables_and_intervals() -> None:
    assert common.markdown(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert common.bootstrap([0.5] * 4) == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_texts_are_cut_at_paragraphs_and_sampled_by_their_text() -> None:
    assert texts.cut("one two\nthree four", 13) == "one two"
    assert texts.cut("First sentence. Second one", 20) == "First sentence."
    share = sum(texts.sampled("novels", str(i), 0.2) for i in range(2000)) / 2000
    assert 0.17 < share < 0.23


def test_texts_of_heads_are_disjoint(tmp_path: Path) -> None:
    rows = [{"title": str(i), "part": i, "text": f"chapter {i} " + "word " * 400} for i in range(300)]
    packed = lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    (tmp_path / "novels.jsonl.xz").write_bytes(packed)
    found = texts.heads(tmp_path, megabytes=64.0)
    train, unseen = ({one["title"] for one in found[name]} for name in ("train.jsonl.xz", "eval.jsonl.xz"))
    assert train and unseen and not train & unseen
    assert {one["title"] for one in found["held_out.jsonl"]} <= unseen


def test_runs_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    script("cpu/overhead").measure("transformer-ee", repeats=1, tokens=3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("transformer-ee" in line for line in lines)


def test_exact_output_on_a_cpu_is_the_full_models(capsys: pytest.CaptureFixture[str]) -> None:
    exact = script("cpu/exact")
    exact.RUNS = (("verify", 4),)
    exact.measure("transformer-ee", repeats=1, tokens=4)
    out = capsys.readouterr().out
    assert out.count("same text, 100% accepted") == 2 and "OTHER TEXT" not in out


@pytest.mark.parametrize("shape", ["mistral-7b", "codestral-mamba-7b"])
def test_the_recorded_aims_are_those_of_the_recorded_documents(shape: str) -> None:
    bars, results = script("speed/bars"), ROOT / "recipes" / "speed" / "results"
    rows = list(bars.lines(bars.parts(results, shape), shape))
    recorded = (results / f"{shape}.md").read_text(encoding="utf-8")
    assert len(rows) > 10
    for what, aim, measured, _ in rows:
        assert f"| {what} | {aim} | {measured} |" in recorded


def test_the_table_of_tunings(tmp_path: Path) -> None:
    study = script("tuning/study")
    figures = dict.fromkeys(study.COLUMNS.values(), 0.5) | {"tokens": 10, "loss_per_layer": [1.0] * 4}
    record = {"tokens": 20, "layers": [1, 2], "before": figures, "after": figures, "tokens_kept": 0.25}
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "tuning.json").write_text(json.dumps(record))
    assert study.table(tmp_path).endswith("| lora | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 | 0.250 |")


def test_steps_of_training_are_measured() -> None:
    bench = script("scale/bench")
    backbone = bench.adapt(bench.random_model("tiny-transformer", "cpu", bench.torch.float32).requires_grad_(False))
    kinds = bench.steps(backbone, "mlp", 16, "1/2,3/4")
    assert list(kinds) == ["forward", "exits", "train"]
    assert all(bench.repeated(step, 1, bench.torch.device("cpu")) > 0 for step in kinds.values())


def test_settings_of_the_head_comparison() -> None:
    compare = script("heads/compare")
    found = compare.settings_of(16, compare.SIX, ["mlp", "mamba-hidden"])
    assert [config.inputs for config in found.values()] == [("hidden", "statistics", "tokens"), ("hidden",)]
    assert found["mlp"].layers == (4, 6, 8, 10, 12, 14)


def test_both_trees_of_a_before_and_after_run(monkeypatch: pytest.MonkeyPatch) -> None:
    house = script("house/before_after")
    times = {Path("old"): 2.0, Path("new"): 1.0}
    order: list[Path] = []
    monkeypatch.setattr(house, "measure", lambda tree, *rest: (order.append(tree), {"full": times[tree]})[1])
    found = house.compare((Path("old"), Path("new")), "transformer-ee", 2, 4, False)
    assert found["full"] == {"median": 0.5, "least": 0.5, "greatest": 0.5}
    assert order == [Path("new"), Path("old"), Path("old"), Path("new")]
