"""Promises: the recorded tables come from the recorded pools, and a tiny pool can be measured."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.recipes.scripts import ROOT, script

study = script("promises/study")
RESULTS = ROOT / "recipes" / "promises" / "results"


def test_the_recorded_shift_is_that_of_the_recorded_pools(tmp_path: Path) -> None:
    for path in RESULTS.glob("pool-*.json"):
        shutil.copy(path, tmp_path)
    study.shift(argparse.Namespace(results=tmp_path))
    assert json.loads((tmp_path / "shift.json").read_text()) == json.loads((RESULTS / "shift.json").read_text())


def test_a_recorded_simulation_is_reproduced() -> None:
    rows = json.loads((RESULTS / "simulate.json").read_text())
    row = next(row for row in rows if (row["promise"], row["n"], row["method"]) == ("agreement>=0.95", 100, "crc"))
    losses, depth = study.losses_of(study.pools(RESULTS)[row["backbone"]], "agreement")
    found = study.simulate(losses, depth, 100, study.test_by("crc", 0.05))
    assert float(found.depth.mean()) == pytest.approx(row["depth"])
    assert float((found.loss > 0.05).mean()) == pytest.approx(row["broken"])


def test_losses_at_the_bound_are_promised_rarely() -> None:
    losses = np.random.default_rng(1).binomial(1, [0.0, 0.2], (4000, 2)).astype(float)
    found = study.simulate(losses, np.array([0.9, 0.5]), 50, study.test_by("ltt", 0.1), draws=200)
    assert (found.loss > 0.1).mean() <= 0.05
    assert set(found.depth.tolist()) <= {1.0, 0.9, 0.5}


def test_a_small_pool_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (ROOT / "src" / "dynamax_llm" / "data" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{"kind": study.KINDS[i % 3], "held_out": True, "text": json.loads(x)["text"]} for i, x in enumerate(lines)]
    rows.sort(key=lambda row: row["kind"] != "wikipedia")
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(study, "PARAMETERS", {"agreement": [0.5], "consistency": [0.5]})
    sizes = {"rows": 2, "limit": 2, "device": "cpu", "models": ["transformer-ee"]}
    study.pool(argparse.Namespace(data=data, out=tmp_path, **sizes))
    document = json.loads((tmp_path / "pool-transformer-ee.json").read_text())
    for measure, kinds in (("agreement", study.KINDS), ("consistency", ("wikipedia",))):
        assert set(document[measure]["kinds"]) == set(kinds)
        points = len(document[measure]["points"])
        losses, depth = study.losses_of(document, measure)
        assert losses.shape == (2, points) and depth.shape == (points,)
        assert ((losses >= 0) & (losses <= 1)).all() and ((depth > 0) & (depth <= 1)).all()
