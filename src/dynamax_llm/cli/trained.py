"""What ``dynamax train`` says of the exits it made."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from dynamax_llm.settings import DecodeSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynamax_llm.backbones import Backbone
    from dynamax_llm.evaluation.compare.heads import Comparison
    from dynamax_llm.exits.artifact import Exits
    from dynamax_llm.text.sources import Source
    from dynamax_llm.training.settings import TrainSettings

#: Held-out tokens decoded with exits on for the report; a full evaluation is not training's business.
ON_POLICY_TOKENS = 5_000


def on_policy(
    backbone: Backbone, tokenizer: PreTrainedTokenizerBase, source: Source, settings: TrainSettings, exits: Exits
) -> Comparison:
    """The trained exits on held-out text decoded with exits on, under ``propagate``, at the settings' agreement."""
    from dynamax_llm.evaluation.compare.heads import Candidate, compare
    from dynamax_llm.text.batches import Split, first_batches

    sequence = min(settings.sequence, backbone.max_positions() or settings.sequence)
    split = Split(source, tokenizer, True, settings.held_out, sequence, settings.batch_tokens, settings.seed)
    batches = first_batches(split, min(settings.eval_tokens, ON_POLICY_TOKENS))
    return compare(backbone, [Candidate(str(exits.config.head), exits)], batches, settings.agreement)[0][0]


def report(exits: Exits, model: str, out: Path, measured: Comparison) -> None:
    """Print what the held-out text says of the trained exits, and the command that uses them."""
    from dynamax_llm.cli.tables import Terminal

    config, held = exits.config, exits.provenance["held_out"]
    terminal = Terminal()
    rows = [
        (f"{depth} of {config.n_layers}", f"{rate:.3f}", "–" if quality is None else f"{quality:.3f}")
        for depth, rate, quality in zip(config.layers, held["base_rate"], held["auroc"], strict=True)
    ]
    columns = ("exit after layer", "agreement if all leave", "AUROC of the head")
    terminal.write_table(f"{config.head} head on {held['tokens']:,} held-out tokens", columns, rows)
    target = measured.target
    terminal.write_line(
        f"If skipped layers kept their true state: mean depth {held['depth']:.3f} at {target:.0%} agreement "
        f"(oracle {held['oracle_depth']:.3f})."
    )
    reached = [point for point in measured.points if point.agreement >= target and point.threshold < 1.0]
    if reached:
        best = min(reached, key=lambda point: point.depth)
        threshold = math.ceil(1000 * best.threshold) / 1000  # rounded towards caution
        terminal.write_line(
            f"Decoding with exits on, policy propagate, threshold {best.threshold:.5f}: agreement "
            f"{best.agreement:.1%}, mean depth {best.depth:.3f} of the layers, counted reduction "
            f"{best.counted_reduction:.1%}."
        )
        if best.counted_reduction <= 0.0:
            terminal.write_line(
                "These exits cost more than they save on this model and text, so they do not pay. dynamax tune makes a "
                "copy of the model whose exits can."
            )
    else:
        threshold = float(DecodeSettings.threshold)
        terminal.write_line(
            f"No threshold tried kept {target:.0%} agreement with exits on; below, a common one to start with."
        )
    terminal.write_line(f"Saved in {out}. Next:")
    terminal.write_line(f'  dynamax generate {model} --exits {out} --prompt "…" --threshold {threshold}')
