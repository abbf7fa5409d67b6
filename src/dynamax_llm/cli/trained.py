"""The report of ``dynamax train``, from the exits' own record."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamax_llm.exits.artifact import Exits


def report(exits: Exits, model: str, out: Path) -> None:
    """Print what training measured on held-out text, and the command that uses the exits."""
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
    decoded = exits.provenance["decoded"]
    target, best = decoded["target"], decoded["best"]
    console.print(
        f"If skipped layers kept their true state: mean depth {held['depth']:.3f} at {target:.0%} agreement "
        f"(oracle {held['oracle_depth']:.3f})."
    )
    threshold = 0.9
    if best is None:
        console.print(
            f"No threshold tried kept {target:.0%} agreement with exits on; below, a common one to start with."
        )
    else:
        threshold = math.ceil(1000 * best["threshold"]) / 1000  # rounded towards caution
        console.print(
            f"Decoding with exits on, policy propagate, threshold {best['threshold']:.5f}: agreement "
            f"{best['agreement']:.1%}, mean depth {best['depth']:.3f} of the layers, counted reduction "
            f"{best['counted_reduction']:.1%}."
        )
        if best["counted_reduction"] <= 0.0:
            console.print(
                "At this agreement these exits save nothing. Train longer or on more text, accept less agreement, or "
                f"tune the model for exits first: dynamax tune {model} --data … --out DIR."
            )
    console.print(f"Saved in {out}. Next:", soft_wrap=True)
    console.print(f'  dynamax generate {model} --exits {out} --prompt "…" --threshold {threshold}', soft_wrap=True)
