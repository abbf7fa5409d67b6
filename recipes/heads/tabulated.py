"""The table of a contest, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

TARGETS = ("0.95", "0.98", "0.99")
NAMES = {"again": "mamba, second pass on policy"}
HEADER = (
    "judge",
    "sees",
    "AUROC",
    "average precision",
    "calibration error",
    *(f"intact {target}" for target in TARGETS),
    *(f"propagate {target}" for target in TARGETS),
    "parameters a head",
    "check, share of a layer",
)


def table(facts: Mapping[str, Any]) -> str:
    """One line per judge, means over seeds; the smallest and largest seed in brackets where there are several."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for item in facts["standings"]:
        run = "seeds" if item["run"].startswith("seed") else item["run"]
        groups.setdefault((run, item["name"]), []).append(item)
    rows = [line(run, name, items, facts) for (run, name), items in groups.items()]
    rows.sort(key=lambda row: row[0])
    lines = [HEADER, ["---"] * len(HEADER), *(row[1] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def line(run: str, name: str, items: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> tuple[float, list[str]]:
    """The depth it is sorted by, and the cells."""
    first = items[0]
    shown = {"fourteen": f"{name}, fourteen exits", "paper": f"{name}, the paper's preset"}.get(
        run, NAMES.get(run, name)
    )
    if run == "static":
        cells = [shown, "–", "–", "–", "–", *["–"] * 3, *(depth(items, "propagate", one) for one in TARGETS), "0", "0"]
        return (9.0, cells)
    exits = len(first["exits"])
    ranks = [spread([mean(item[key]) for item in items]) for key in ("auroc", "average_precision", "calibration_error")]
    cells = [
        shown,
        first["inputs"].replace("hidden", "h").replace("signals", "statistics") or "–",
        *ranks,
        *(depth(items, "intact", target) for target in TARGETS),
        *(depth(items, "propagate", target) for target in TARGETS),
        f"{first['parameters'] // exits:,}",
        f"{first['check_macs'] / facts['layer_macs']:.1%}",
    ]
    return (fmean(item["intact"]["0.98"][0] for item in items), cells)


def depth(items: Sequence[Mapping[str, Any]], policy: str, target: str) -> str:
    """Mean over seeds, seeds' ends, and half the first seed's interval over documents."""
    values = [item[policy][target] for item in items]
    half = (values[0][2] - values[0][1]) / 2
    return f"{spread([value[0] for value in values])} ±{half:.3f}"


def spread(values: Sequence[float]) -> str:
    ends = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{ends}"


def mean(values: Sequence[float | None]) -> float:
    return fmean(value for value in values if value is not None)
