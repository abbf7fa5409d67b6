"""Exits of a tiny backbone with a promise on record, as calibration would have left them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.promise import Promise, digest
from tests.folders import exits_folder


def record(exits: Exits, **changes: Any) -> Promise:
    """A promise that leaves by the first of two exits only."""
    values: dict[str, Any] = {
        "text": "agreement>=0.9",
        "measure": "agreement",
        "bound": 0.9,
        "confidence": 0.95,
        "method": "ltt",
        "n": 40,
        "n_path": 10,
        "unit": "sequences",
        "parameter": 0.5,
        "thresholds": (0.0, None),
        "estimate": 0.99,
        "p_value": 0.01,
        "mean_depth": 0.6,
        "policy": "propagate",
        "window": 16,
        "readout": "head",
        "estimator": "mamba",
        "data": {"source": "corpus", "sha256": "0" * 64, "tokens": 640},
        "fingerprint": digest(exits.fingerprint),
        "dynamax": "0.1.0",
        "date": "2026-01-01T00:00:00+00:00",
        "evidence": (),
    }
    return Promise(**{**values, **changes})


def promised_folder(folder: Path, *changes: dict[str, Any], model_type: str = "llama") -> Path:
    """Exits with one promise per set of changes; with the plain one if there are none."""
    exits = Exits.from_pretrained(exits_folder(model_type))
    for change in changes or ({},):
        exits = exits.keep(record(exits, **change))
    exits.save(folder)
    return folder
