"""The stages as functions of a model and plain strings; each is its room's function with the arguments made for it.

``model`` is a loaded stock model (or its adapter), ``data`` a path or dataset id (or a source), ``exits`` layers or
shares of the depth as on the command line: "8,12", "1/4,1/2".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.errors import UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import DEFAULT_EXITS, ExitConfig, place_exits
from dynamax_llm.exits.promise import Promise
from dynamax_llm.text.answer_source import AnySource
from dynamax_llm.text.sources import Source, find_source
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.tuning.settings import TuneSettings

if TYPE_CHECKING:
    import torch

    from dynamax_llm.decoding.draft_choice import DraftChoice
    from dynamax_llm.evaluation.bench.exits.document import ExitBench
    from dynamax_llm.evaluation.bench.exits.settings import ExitBenchSettings
    from dynamax_llm.evaluation.scan.document import Scan
    from dynamax_llm.evaluation.scan.settings import ScanSettings
    from dynamax_llm.text.prompts import Prompt
    from dynamax_llm.training.tuning.run import Tuned

Layers = str | tuple[str | int | float, ...]


def train(
    model: nn.Module | Backbone,
    tokenizer: Any,
    data: str | Path | AnySource,
    *,
    out: str | Path,
    exits: Layers = DEFAULT_EXITS,
    settings: TrainSettings | None = None,
    **config: Any,
) -> Exits:
    """Train exits on a frozen model and save them in ``out``; ``config`` are fields of ExitConfig (head="mamba").

    Raises what ``training.trainer.train`` raises, ExitPlacementError and UsageError.
    """
    from dynamax_llm.training.trainer import train as run

    backbone = _backbone(model)
    chosen = ExitConfig(place_exits(exits, backbone.n_layers), backbone.n_layers, **config)
    source = find_source(data) if isinstance(data, str | Path) else data
    return run(backbone, tokenizer, source, chosen, settings or TrainSettings(), out)


def scan(
    model: nn.Module | Backbone,
    tokenizer: Any,
    data: str | Path | Source,
    exits: Layers = DEFAULT_EXITS,
    settings: ScanSettings | None = None,
    **names: Any,
) -> Scan:
    """Whether exits are worth training on this model and text. Raises what ``evaluation.scan.scan.scan`` raises."""
    from dynamax_llm.evaluation.scan.scan import scan as run

    return run(_backbone(model), tokenizer, _source(data), exits, settings, **names)


def calibrate(
    model: nn.Module | Backbone,
    tokenizer: Any,
    exits: Exits | str | Path,
    data: str | Path | Source,
    promise: str,
    **how: Any,
) -> Promise:
    """The record of a promise that holds; ``exits`` may be their folder. Keep it: ``exits.keep(promise).save(folder)``.

    ``how`` are arguments of ``calibration.calibrate.calibrate``, which also says what is raised.
    """
    from dynamax_llm.calibration.calibrate import calibrate as run

    chosen = exits if isinstance(exits, Exits) else Exits.from_pretrained(str(exits))
    return run(_backbone(model), tokenizer, chosen, _source(data), promise, **how)


def calibrate_draft(
    model: nn.Module | Backbone,
    exits: Exits | str | Path,
    *,
    tokenizer: Any = None,
    prompts: str | Path | Sequence[str | Prompt] | None = None,
    chat: bool = False,
    system: str | None = None,
    batch_size: int = 1,
    engine: str | None = None,
) -> DraftChoice:
    """Threshold and window of a draft, by what its chains cost on this machine with ``batch_size`` rows.

    The choice is kept with ``exits``; where they are given as their folder, also there. ``prompts``: decoded, with
    ``tokenizer``, in place of the recorded chains; ``chat``: through its chat template.
    Raises UsageError for exits that are no draft or have no chains, and what ``traces.chain_choice`` raises.
    """
    from dynamax_llm.decoding.draft_choice import drafts
    from dynamax_llm.text.prompts import chat_ids
    from dynamax_llm.traces.chain_choice import choose, record, recorded

    backbone = _backbone(model)
    chosen = exits if isinstance(exits, Exits) else Exits.from_pretrained(str(exits))
    if chosen.heads is not None:
        chosen.heads.to(backbone.device)
    if prompts is None:
        recorded(chosen)
    else:
        ids = [chat_ids(tokenizer, prompt, system, chat) for prompt in _prompts(prompts)]
        if not drafts(chosen) or not record(backbone, chosen, ids):
            raise UsageError(
                "these exits are no draft, or the model ends every text with its first token: there are no chains."
            )
    choice = choose(backbone, chosen, batch_size, engine)
    if not isinstance(exits, Exits):
        chosen.save(exits)
    return choice


def bench_exits(
    model: nn.Module,
    tokenizer: Any,
    exits: Exits | str | Path,
    prompts: str | Path | Sequence[str | Prompt],
    settings: ExitBenchSettings | None = None,
    **how: Any,
) -> ExitBench:
    """Wall clock of exits on prompts, every mode beside plain ``model.generate``; print its ``verdict``.

    ``exits`` may be their folder, ``prompts`` a file. ``how`` are arguments of ``evaluation.bench.exits.run``'s
    ``bench_exits`` (``name``, ``on_part`` …), which also says what is raised.
    """
    from dynamax_llm.evaluation.bench.exits.run import bench_exits as run

    chosen = exits if isinstance(exits, Exits) else Exits.from_pretrained(str(exits))
    return run(model, tokenizer, chosen, _prompts(prompts), settings, **how)


def tune(
    model: nn.Module | Backbone,
    tokenizer: Any,
    data: str | Path | Source,
    *,
    out: str | Path,
    exits: Layers = DEFAULT_EXITS,
    settings: TuneSettings | None = None,
    dtype: torch.dtype | None = None,
) -> Tuned:
    """Tune a copy of a model so that its ``exits`` ("all": every layer) pay, and save it in ``out``.

    Raises what ``training.tuning.tune`` raises, and ExitPlacementError.
    """
    from dynamax_llm.training.tuning.run import tune as run

    backbone = _backbone(model)
    layers = tuple(range(1, backbone.n_layers)) if exits == "all" else place_exits(exits, backbone.n_layers)
    return run(backbone, tokenizer, _source(data), layers, settings or TuneSettings(), out, dtype)


def _backbone(model: nn.Module | Backbone) -> Backbone:
    return model if isinstance(model, Backbone) else adapt(model)


def _prompts(prompts: str | Path | Sequence[str | Prompt]) -> list[Prompt]:
    """The prompts of a file, or those given."""
    from dynamax_llm.text.prompts import Prompt, read_prompts

    if isinstance(prompts, str | Path):
        return read_prompts(prompts)
    return [Prompt.of(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def _source(data: str | Path | Source) -> Source:
    return data if isinstance(data, Source) else find_source(str(data))
