"""The paper's report gets the promises of calibrated exits, and what was measured on other text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.calibration.promised import record
from tests.folders import exits_folder
from tests.report.synthetic import single

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes" / "paper"))

from finish import joined, named

from dynamax_llm.exits.artifact import Exits


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
