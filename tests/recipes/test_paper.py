"""The paper's report gets the promises of calibrated exits, and what was measured on other text."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamax_llm.evaluation.harness.results import Evaluation
from dynamax_llm.exits.artifact import Exits
from tests.calibration.promised import record
from tests.folders import exits_folder
from tests.recipes.scripts import ROOT, script
from tests.report.synthetic import single

joined, named, summary = (getattr(script("paper/finish"), name) for name in ("joined", "named", "summary"))


def test_promises_and_shifts_join_the_document(tmp_path):
    exits = Exits.from_pretrained(exits_folder())
    exits.keep(record(exits)).save(tmp_path)
    document = single()
    name = document.backbones[0].name
    found = joined(document, dict([named(f"{name}={tmp_path}")]), ROOT / "recipes/promises/results/shift.json")
    assert [promise["text"] for promise in found.promises[name]] == ["agreement>=0.9"]
    assert {(row.backbone, row.measured_on) for row in found.shifts} >= {
        ("mamba-ee", "dialogues"),
        ("mamba-ee", "novels"),
    }
    assert all(row.kept == (row.value.value >= 0.98) for row in found.shifts)
    assert found.cells == document.cells


def test_exits_of_another_backbone_are_refused():
    with pytest.raises(SystemExit, match="no backbone other"):
        joined(single(), {"other": Path("x")}, None)


def test_the_recorded_summary_is_that_of_the_recorded_evaluation():
    folder = ROOT / "recipes" / "paper" / "results"
    recorded = (folder / "summary.md").read_text(encoding="utf-8").splitlines()
    made = summary(Evaluation.read(folder)).splitlines()
    assert (made[0], made[2:]) == (recorded[0], recorded[2:])
