"""The evaluation document survives a save, and a damaged one is refused by the name of its field."""

from __future__ import annotations

import json

import pytest

from dynamax_llm.errors import DataError
from dynamax_llm.evaluation.harness.results import Evaluation, Run


def document() -> Evaluation:
    run = Run(command="dynamax eval m", created="2026-01-01T00:00:00+00:00", seconds=1.0, hardware="cpu", versions={})
    return Evaluation(title="t", runs=(run,), backbones=(), settings={}, tasks=(), cells=())


def test_saved_is_loaded(tmp_path):
    document().save(tmp_path / "new")
    assert Evaluation.read(tmp_path / "new") == document()
    assert Evaluation.read(tmp_path / "new" / Evaluation.FILE) == document()
    assert [item.name for item in (tmp_path / "new").iterdir()] == [Evaluation.FILE]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cells": 3}, "cells"),
        ({"speed": 3}, "speed"),
        ({"version": 99}, "version 99"),
        ({"format": "other"}, "'other'"),
    ],
)
def test_damage_is_named(tmp_path, change, said):
    document().save(tmp_path)
    path = tmp_path / Evaluation.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=said):
        Evaluation.read(path)


def test_no_document(tmp_path):
    with pytest.raises(DataError, match="dynamax eval"):
        Evaluation.read(tmp_path)
