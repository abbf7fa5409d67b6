"""The committed report: what ``dynamax paper`` found, with promises that were calibrated and measured elsewhere.

python recipes/paper/finish.py --eval DIR [--exits NAME=DIR …] [--shifts FILE] --out DIR

``--exits`` names exits that ``dynamax calibrate`` wrote, by backbone; their promises and evidence join the document.
``--shifts`` is recipes/promises/results/shift.json. Writes OUT/eval.json, OUT/report.html, OUT/figures, and
OUT/summary.md: every setting's figures as means over tasks.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import markdown, parsed, parser
from dynamax_llm.evaluation.harness.results import Evaluation, Shift
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.report import check_targets, write_report


def main() -> None:
    """Read, join, write."""
    options = arguments()
    page, figures = options.out / "report.html", options.out / "figures"
    options.out.mkdir(parents=True, exist_ok=True)
    check_targets(page, figures)
    found = joined(Evaluation.read(options.eval), dict(options.exits), options.shifts)
    found.save(options.out)
    write_report([found], page, figures)
    (options.out / "summary.md").write_text(summary(found), encoding="utf-8")
    print(f"{page}: {page.stat().st_size / 1e6:.2f} MB, {len(found.cells)} cells")


def joined(found: Evaluation, exits: dict[str, Path], shifts: Path | None) -> Evaluation:
    """The document with the promises of ``exits`` by backbone, and with shifts."""
    unknown = sorted(exits.keys() - {backbone.name for backbone in found.backbones})
    if unknown:
        raise SystemExit(f"no backbone {', '.join(unknown)} in the evaluation")
    promises = {
        name: tuple(promise.to_json() for promise in Exits.from_pretrained(folder).promises)
        for name, folder in exits.items()
    }
    rows: list[dict[str, Any]] = [] if shifts is None else json.loads(shifts.read_text(encoding="utf-8"))
    moved = tuple(Shift.model_validate(row) for row in rows)
    return found.model_copy(update={"promises": {**found.promises, **promises}, "shifts": (*found.shifts, *moved)})


def summary(found: Evaluation) -> str:
    """Means over tasks, each weighing the same; agreement also at its lowest."""
    rows = []
    for backbone in found.backbones:
        for setting in found.settings[backbone.name]:
            cells = [cell for cell in found.cells if (cell.backbone, cell.setting) == (backbone.name, setting.id)]

            def values(name: str, cells: Any = cells) -> list[float]:
                return [value.value for cell in cells if (value := getattr(cell, name)) is not None]

            agreement, depth, counted = (values(name) for name in ("agreement", "mean_depth", "counted_reduction"))
            means = [fmean(agreement), min(agreement), fmean(values("rouge_l")), fmean(values("degenerate"))]
            shares = [f"{value:.3f}" for value in (*means, fmean(depth))]
            speed = f"{fmean(values('speed_up')):.2f}"
            rows.append([backbone.name, setting.id, *shares, f"{fmean(counted):.1%}", speed])
    header = ["backbone", "setting", "agreement", "lowest", "ROUGE-L", "degenerate", "depth"]
    return markdown([*header, "counted reduction", "speed-up"], rows) + "\n"


def arguments() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__, "out")
    made.add_argument("--eval", type=Path, required=True, help="what dynamax paper wrote")
    made.add_argument("--exits", type=named, action="append", default=[], metavar="NAME=DIR")
    made.add_argument("--shifts", type=Path)
    return parsed(made)


def named(text: str) -> tuple[str, Path]:
    """NAME=DIR as a pair."""
    name, sign, folder = text.partition("=")
    if not sign or not name or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, Path(folder)


if __name__ == "__main__":
    main()
