"""What ``dynamax train`` says of the exits it made."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynamax_llm.backbones import Backbone
    from dynamax_llm.evaluation.common.points import Points
    from dynamax_llm.exits.artifact import Exits
    from dynamax_llm.text.sources import Source
    from dynamax_llm.training.settings import TrainSettings

#: Held-out tokens decoded with exits on for the report; a full evaluation is not training's business.
ON_POLICY_TOKENS = 5_000


def on_policy(
    backbone: Backbone, tokenizer: PreTrainedTokenizerBase, source: Source, settings: TrainSettings, exits: Exits
) -> Points:
    """The trained exits on held-out text decoded with exits on, under ``propagate``, at the settings' agreement."""
    from dynamax_llm.evaluation import HeadComparison, HeadSetting
    from dynamax_llm.text.batches import Split, first_batches

    sequence = min(settings.sequence, backbone.max_positions() or settings.sequence)
    split = Split(source, tokenizer, True, settings.held_out, sequence, settings.batch_tokens, settings.seed)
    batches = first_batches(split, min(settings.eval_tokens, ON_POLICY_TOKENS))
    comparison, setting = HeadComparison(backbone, batches, prompt_length=1), HeadSetting("trained", exits)
    return comparison.evaluate(setting, target=settings.agreement, intact=False).propagate


def report(exits: Exits, model: str, out: Path, measured: Points) -> None:
    """Print what the held-out text says of the trained exits, and the command that uses them."""
    from rich.console import Console
    from rich.table import Table

    config, held = exits.config, exits.provenance["held_out"]
    console = Console(highlight=False, markup=False)
    table = Table(title=f"{config.head} head on {held['tokens']:,} held-out tokens", title_justify="left")
    for column in ("exit", "depth", "agreement if all leave", "AUROC of the head"):
        table.add_column(column, justify="right")
    rows = zip(config.layers, held["base_rate"], held["auroc"], strict=True)
    for index, (depth, rate, quality) in enumerate(rows, start=1):
        table.add_row(
            str(index), f"{depth} of {config.n_layers}", f"{rate:.3f}", "–" if quality is None else f"{quality:.3f}"
        )
    console.print(table)
    target = held["agreement"]
    console.print(
        f"If skipped layers kept their true state: mean depth {held['depth']:.3f} at {target:.0%} agreement "
        f"(oracle {held['oracle_depth']:.3f})."
    )
    points = zip(measured.mean_depth, measured.agreement, measured.thresholds, measured.saved, strict=True)
    reached = [point for point in points if point[1] >= target and point[2] < 1.0]
    if reached:
        depth, agreement, best, saved = min(reached)
        threshold = math.ceil(1000 * best) / 1000  # rounded towards caution
        console.print(
            f"Decoding with exits on, policy propagate, threshold {best:.5f}: agreement {agreement:.1%}, mean depth "
            f"{depth:.3f} of the layers, counted reduction {saved:.1%}."
        )
    else:
        threshold = 0.9
        console.print(
            f"No threshold tried kept {target:.0%} agreement with exits on; below, a common one to start with."
        )
    console.print(f"Saved in {out}. Next:", soft_wrap=True)
    console.print(f'  dynamax generate {model} --exits {out} --prompt "…" --threshold {threshold}', soft_wrap=True)
