"""DYNAMAX: early exits for stock Hugging Face language models, as many layers as each token needs.

The public names, nothing else; each is imported when it is first used, so that the command line answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynamax_llm import errors
from dynamax_llm.lazy import lazy

if TYPE_CHECKING:
    from dynamax_llm.api import bench_exits, calibrate, calibrate_draft, scan, train, tune
    from dynamax_llm.backbones.loading import load
    from dynamax_llm.calibration.settings import CalibrationSettings
    from dynamax_llm.decoding import EarlyExit, EarlyExitOutput, Thresholds, Trace
    from dynamax_llm.evaluation.bench.exits.settings import ExitBenchSettings
    from dynamax_llm.evaluation.scan.settings import ScanSettings
    from dynamax_llm.exits.artifact import Exits
    from dynamax_llm.exits.config import ExitConfig
    from dynamax_llm.exits.promise import Promise
    from dynamax_llm.training.settings import TrainSettings
    from dynamax_llm.training.tuning import TuneSettings

__all__ = [  # noqa: RUF022  by purpose
    # generate
    "load",
    "Exits",
    "EarlyExit",
    "EarlyExitOutput",
    "Thresholds",
    "Trace",
    # before, in and after training
    "scan",
    "train",
    "tune",
    "calibrate",
    "calibrate_draft",
    "bench_exits",
    # what is configured and recorded
    "ExitConfig",
    "ScanSettings",
    "TrainSettings",
    "TuneSettings",
    "CalibrationSettings",
    "ExitBenchSettings",
    "Promise",
    "errors",
]

_lazy = lazy(
    __name__,
    {
        "load": "backbones.loading",
        "Exits": "exits.artifact",
        "EarlyExit": "decoding",
        "EarlyExitOutput": "decoding",
        "Thresholds": "decoding",
        "Trace": "decoding",
        "scan": "api",
        "train": "api",
        "tune": "api",
        "calibrate": "api",
        "calibrate_draft": "api",
        "bench_exits": "api",
        "ExitConfig": "exits.config",
        "ScanSettings": "evaluation.scan.settings",
        "TrainSettings": "training.settings",
        "TuneSettings": "training.tuning.settings",
        "CalibrationSettings": "calibration.settings",
        "ExitBenchSettings": "evaluation.bench.exits.settings",
        "Promise": "exits.promise",
        # of the rooms; not public here
        "adapt": "backbones",
        "find_source": "text.sources",
        "place_exits": "exits.config",
        "train_many": "training.trainer",
    },
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from dynamax_llm.version import installed_version

        return installed_version()
    return _lazy(name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
