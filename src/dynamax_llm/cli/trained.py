"""The report of ``dynamax train``, from the exits' own record."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from dynamax_llm.settings import DecodeSettings

if TYPE_CHECKING:
    from dynamax_llm.exits.artifact import Exits


def report(exits: Exits, model: str, out: Path) -> None:
    """Print what training measured on held-out text, and the command that uses the exits."""
    from dynamax_llm.cli.drafted import report_draft
    from dynamax_llm.cli.tables import Terminal
    from dynamax_llm.decoding.draft_choice import drafts

    if drafts(exits):
        report_draft(exits, model, out)
        return
    config, held = exits.config, exits.provenance["held_out"]
    terminal = Terminal()
    terminal.write_line(_verdict(exits))
    rows = [
        (f"{depth} of {config.n_layers}", f"{rate:.3f}", "–" if quality is None else f"{quality:.3f}")
        for depth, rate, quality in zip(config.layers, held["base_rate"], held["auroc"], strict=True)
    ]
    columns = ("exit after layer", "agreement if all leave", "AUROC of the head")
    terminal.write_table(f"{config.head} head on {held['tokens']:,} held-out tokens", columns, rows)
    decoded = exits.provenance["decoded"]
    target, best = decoded["target"], decoded["best"]
    terminal.write_line(
        f"If skipped layers kept their true state: mean depth {held['depth']:.3f} at {target:.0%} agreement "
        f"(oracle {held['oracle_depth']:.3f})."
    )
    threshold = float(DecodeSettings.threshold)
    if best is None:
        terminal.write_line(
            f"No threshold tried kept {target:.0%} agreement with exits on; below, a common one to start with."
        )
    else:
        threshold = math.ceil(1000 * best["threshold"]) / 1000  # rounded towards caution
        terminal.write_line(
            f"Decoding with exits on, policy propagate, threshold {best['threshold']:.5f}: agreement "
            f"{best['agreement']:.1%}, mean depth {best['depth']:.3f} of the layers, counted reduction "
            f"{best['counted_reduction']:.1%}."
        )
    terminal.write_line(f"Saved in {out}. Next:")
    terminal.write_line(f'  dynamax generate {model} --exits {out} --prompt "…" --threshold {threshold}')


def _verdict(exits: Exits) -> str:
    """Whether these exits pay, by what was counted on decoded text, and what would where they do not."""
    best = exits.provenance["decoded"]["best"]
    if best is not None and best["counted_reduction"] > 0.0:
        saved = f"{best['counted_reduction']:.1%}"
        return (
            f"These exits pay: they save {saved} of the arithmetic, counted; dynamax bench says how much of the time."
        )
    why = "no threshold keeps the agreement" if best is None else "they cost more than they save on this model and text"
    return (
        f"These exits do not pay: {why}. --readout draft runs ahead of the model, whose own text stays exact, and is "
        "judged by time; dynamax tune makes a copy of the model whose exits can pay."
    )
