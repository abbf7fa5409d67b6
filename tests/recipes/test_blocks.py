"""The comparison of block kinds: a tiny run from text to table, its file, and its differences against their formula."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from recipes.blocks import compare, table

from tests.folders import model_folder
from tests.training.conftest import sentences, write_jsonl


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict:
    data = write_jsonl(folder / "text.jsonl", sentences(400))
    sizes = "--tokens 600 --batch 256 --sequence 64 --eval-tokens 250 --prompts 2 --prompt 12 --new 8 --exits 1/2"
    arguments = [str(model_folder()), "--data", str(data), "--out", str(folder / "blocks.json"), *sizes.split()]
    monkeypatch.setattr("sys.argv", ["compare.py", *arguments, "--draft-steps", "2", "--seeds", "0", *options])
    compare.main()
    return json.loads((folder / "blocks.json").read_text())


def test_kinds_are_trained_alike_measured_alike_and_once(tmp_path: Path, monkeypatch, capsys) -> None:
    runs = run(tmp_path, monkeypatch)["runs"]
    name = model_folder().name
    assert set(runs) == {f"{name} transformer warm 0", f"{name} transformer cold 0", f"{name} mamba cold 0"}
    one, other = runs[f"{name} transformer cold 0"], runs[f"{name} mamba cold 0"]
    documents = len(one["depths"]["head"]["tokens"])
    assert documents > 2
    for key in ("draft loss 1", "draft loss 2", "exit loss 2", "match 1"):
        assert one["sums"][key][1] == other["sums"][key][1] and len(one["sums"][key][1]) == documents
    assert sum(one["sums"]["draft loss 1"][1]) > 4
    losses = [sum(each["sums"]["draft loss 1"][0]) for each in runs.values()]
    assert min(losses) > 0 and len(set(losses)) == 3  # a copy of the last layer is another start
    for each in runs.values():
        verified, tokens = sum(each["decoded"]["verifications"]), sum(each["decoded"]["tokens"])
        assert 2 <= verified <= tokens <= 2 * 8
        assert each["parameters"]["block"] == each["parameters"]["exit block"] > 1000
    capsys.readouterr()
    before = (tmp_path / "blocks.json").read_bytes()
    run(tmp_path, monkeypatch)
    assert capsys.readouterr().out.count("already there") == 3 and (tmp_path / "blocks.json").read_bytes() == before
    with pytest.raises(SystemExit, match="holds runs with proposals 4, not 3"):
        run(tmp_path, monkeypatch, "--proposals", "3")
    monkeypatch.setattr("sys.argv", ["compare.py", "--render", str(tmp_path / "blocks.json")])
    compare.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum("difference: " in line for line in lines) == 3 and len(lines) == 2 + 3 + 3 + 2
    assert len({line.count("|") for line in lines[:-2]}) == 1


def test_kinds_must_learn_at_the_same_positions(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["compare.py", "m", "--data", "d", "--out", "o", "--every", "4"])
    with pytest.raises(SystemExit):
        compare.main()
    assert "--every 4: Mamba blocks learn at multiples of 16" in capsys.readouterr().err


def fake(kind: str, seed: int, hits: list[int]) -> dict:
    """A run of four documents of ten proposals each, with these accepted."""
    points = {"thresholds": [0.5], "n_layers": 4, "tokens": [10] * 4, "agree": [[10] * 4], "layers": [[20] * 4]}
    tens = [10.0] * 4
    sums = {f"match {step}": [hits, tens] for step in (1, 2, 3, 4)}
    return {
        "model": "m", "kind": kind, "warm": False, "seed": seed, "seconds": {"training": 1.0},
        "parameters": {"block": 5}, "macs": {"draft step": 6, "exit": 7},
        "sums": {**sums, "draft loss 1": [tens, tens], "draft loss 2": [[30.0] * 4, tens], "exit loss 2": [tens, tens]},
        "depths": {"head": points, "margin": points}, "decoded": {"tokens": [6, 6], "verifications": [2, 4]},
    }  # fmt: skip


def test_differences_are_paired_over_documents_and_seeds() -> None:
    better = {0: fake("a", 0, [6, 7, 8, 9]), 1: fake("a", 1, [7, 8, 9, 10])}
    worse = {seed: fake("b", seed, [hit - 2 for hit in one["sums"]["match 1"][0]]) for seed, one in better.items()}
    # Every document differs by two of ten, so every draw does; unpaired draws would not.
    assert table.difference(better, worse, table.named("match 1")) == "+0.200 [+0.200, +0.200]"
    loose = {0: fake("b", 0, [8, 5, 6, 9]), 1: worse[1]}
    value, low, high = (
        float(part.strip("[],")) for part in table.difference(better, loose, table.named("match 1")).split()
    )
    assert value == pytest.approx(0.025 + 0.1) and low < value < high
    whole = np.arange(4)[None]
    share = 30 / 40
    chained = 1 + share + share**2 + share**3 + share**4
    assert table.chained(4)(better[0], whole)[0] == pytest.approx(chained)
    assert table.mean_of("draft loss")(better[0], whole)[0] == pytest.approx(2.0)
    assert table.depth("head")(better[0], whole)[0] == pytest.approx(0.5)
    assert table.decoding(better[0], np.arange(2)[None])[0] == pytest.approx(2.0)
    document = {
        "settings": {"proposals": 4, "tokens": 100.0, "every": 16, "data": "t"},
        "runs": {str(number): one for number, one in enumerate([*better.values(), *worse.values()])},
    }
    text = table.table(document)
    assert (
        "| m | a, from random weights | 2 | 5 | 6 | 7 | 1 (1–1) | 2.000 (2.000–2.000) | 0.800 (0.750–0.850) |" in text
    )
    assert "difference: a, from random weights – b, from random weights | 2 |" in text
    assert "+0.200 [+0.200, +0.200]" in text
