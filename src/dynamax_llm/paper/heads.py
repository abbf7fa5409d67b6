"""The exits that the grid compares: shipped with a backbone, trained into the folder before, or trained now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynamax_llm.backbones import Backbone
from dynamax_llm.backbones.loading import shipped_exits
from dynamax_llm.errors import UsageError
from dynamax_llm.exits.artifact import MANIFEST, Exits
from dynamax_llm.exits.config import PAPER_EXITS, ExitConfig, place_exits
from dynamax_llm.text.sources import find_source
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.trainer import train_many


def exits_of(
    model: str,
    backbone: Backbone,
    tokenizer: Any,
    heads: Sequence[str],
    data: str | None,
    settings: TrainSettings,
    folder: Path,
) -> dict[str, Exits]:
    """Exits by head, for one backbone, at the paper's four depths.

    What is missing is trained on ``data`` in one pass, into ``folder``/HEAD. A killed training
    continues; finished exits are read again. Raises UsageError if exits are missing and there is no ``data`` to train
    them on, and whatever ``train_many`` and ``Exits.from_pretrained`` raise.
    """
    shipped = {head: place for head in heads if (place := shipped_exits(model, f"four/{head}")) is not None}
    own = [head for head in heads if head not in shipped]
    places = shipped | {head: folder / head for head in own}
    # All or none: they were trained together, and a run that a kill cut between two saves resumes at its end.
    if not all((folder / head / MANIFEST).is_file() for head in own):
        if data is None:
            raise UsageError(
                f"no trained exits for {model!r} with head {', '.join(own)}. Give `train_data`, a path or a dataset "
                "id, and they are trained first."
            )
        layers = place_exits(PAPER_EXITS, backbone.n_layers)
        configs = {head: ExitConfig(layers, backbone.n_layers, head=head) for head in own}
        train_many(backbone, tokenizer, find_source(data), configs, settings, folder)
    return {head: Exits.from_pretrained(places[head]) for head in heads}
