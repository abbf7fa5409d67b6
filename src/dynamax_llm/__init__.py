"""DYNAMAX: early exits for stock Hugging Face language models, as many layers as each token needs.

The public names, nothing else; each is imported when it is first used, so that the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamax_llm.backbones import adapt
    from dynamax_llm.backbones.loading import load
    from dynamax_llm.calibration.calibrate import CalibrationSettings, calibrate
    from dynamax_llm.decoding import EarlyExit, EarlyExitOutput
    from dynamax_llm.evaluation.scan.scan import ScanSettings, scan
    from dynamax_llm.exits.artifact import Exits
    from dynamax_llm.exits.config import ExitConfig, place_exits
    from dynamax_llm.exits.promise import Promise
    from dynamax_llm.text.sources import find_source
    from dynamax_llm.training.settings import TrainSettings
    from dynamax_llm.training.trainer import train, train_many
    from dynamax_llm.training.tuning import TuneSettings, tune

_HOMES = {
    "CalibrationSettings": "calibration.calibrate",
    "EarlyExit": "decoding",
    "EarlyExitOutput": "decoding",
    "ExitConfig": "exits.config",
    "Exits": "exits.artifact",
    "Promise": "exits.promise",
    "ScanSettings": "evaluation.scan.collect",
    "TrainSettings": "training.settings",
    "TuneSettings": "training.tuning",
    "adapt": "backbones",
    "calibrate": "calibration.calibrate",
    "find_source": "text.sources",
    "load": "backbones.loading",
    "place_exits": "exits.config",
    "scan": "evaluation.scan.scan",
    "train": "training.trainer",
    "train_many": "training.trainer",
    "tune": "training.tuning",
}

__all__ = [
    "CalibrationSettings",
    "EarlyExit",
    "EarlyExitOutput",
    "ExitConfig",
    "Exits",
    "Promise",
    "ScanSettings",
    "TrainSettings",
    "TuneSettings",
    "adapt",
    "calibrate",
    "find_source",
    "load",
    "place_exits",
    "scan",
    "train",
    "train_many",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dynamax_llm' has no attribute {name!r}")
    value = getattr(import_module(f"dynamax_llm.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
