"""The rows of a comparison as a Markdown table: one line per setting, means over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

Row = Mapping[str, Any]
RANKS = ("auroc", "average_precision", "calibration_error")


def comparison_table(rows: Sequence[Row], layer_macs: float) -> str:
    """Sorted by depth at 98 % agreement; smallest and largest seed in brackets, then half the first seed's interval.

    ``rows`` are ``HeadResult.to_json()`` with ``run``, the group they belong to ("seed0", "seed1", … are one), and
    optionally ``at_shape``, the counted reduction at 98 % at a large shape. What a row does not have is a dash.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        run = "seeds" if row["run"].startswith("seed") else row["run"]
        groups.setdefault((run, row["name"]), []).append(row)
    columns = [(p, target) for p in ("intact", "propagate") for target in next((r[p] for r in rows if p in r), ())]
    scaled = any("at_shape" in row for row in rows)
    header = ["estimator", "sees", *(name.replace("_", " ").replace("auroc", "AUROC") for name in RANKS)]
    header += [f"{policy} {target}" for policy, target in columns] + ["parameters a head", "check, share of a layer"]
    lines = []
    for (_, name), items in groups.items():
        first = items[0]
        inputs = first.get("inputs", "").replace("hidden", "h").replace("signals", "statistics")
        cells = [name, inputs or "–", *(_rank(items, key) for key in RANKS)]
        cells += [_depth(items, *column) for column in columns]
        cells.append(f"{first['parameters'] // len(first['exits']):,}" if "exits" in first else "0")
        cells.append(f"{first['check_macs'] / layer_macs:.1%}" if "exits" in first else "0")
        cells += [f"{first['at_shape']:.1%}" if "at_shape" in first else "–"] * scaled
        policy = columns[0][0] if columns[0][0] in first else "propagate"
        lines.append((fmean(item[policy]["0.98"][0] for item in items) if "exits" in first else 9.0, cells))
    header += ["counted reduction at a 7B shape"] * scaled
    ordered = [cells for _, cells in sorted(lines, key=lambda line: line[0])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *ordered])


def _rank(items: Sequence[Row], key: str) -> str:
    """Mean over exits where it is defined, then over seeds."""
    if key not in items[0]:
        return "–"
    return _spread([fmean(value for value in item[key] if value is not None) for item in items])


def _depth(items: Sequence[Row], policy: str, target: str) -> str:
    if policy not in items[0]:
        return "–"
    values = [item[policy][target] for item in items]
    return f"{_spread([value[0] for value in values])} ±{(values[0][2] - values[0][1]) / 2:.3f}"


def _spread(values: Sequence[float]) -> str:
    ends = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{ends}"
