"""Calibrations that take no longer than what they show needs."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    """Paths of a few points: whatever is shown of them does not need fifty."""
    monkeypatch.setattr("dynamax_llm.calibration.calibrate.PARAMETERS", (0.25, 0.5, 0.75, 1.0))
    monkeypatch.setattr("dynamax_llm.calibration.path.LEVELS", 24)
