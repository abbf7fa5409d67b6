"""The table of a comparison of blocks: means and ranges over seeds, differences with paired bootstrap intervals.

A difference is between the means over seeds of two kinds; its interval is over documents (or prompts), drawn alike for
both kinds and all seeds. It says what other text would change, and nothing about other seeds.

Shapes: N documents, D draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from recipes.common import markdown

from dynamax_llm.evaluation.common.bootstrap import draws, ends
from dynamax_llm.evaluation.common.points import Points

Run = dict[str, Any]
#: A figure of one run for draws of samples (D, N): (D,).
Figure = Callable[[Run, np.ndarray], np.ndarray]
TARGET = 0.98


def ratio(over: Sequence[float], under: Sequence[float], index: np.ndarray) -> np.ndarray:
    """Ratio of totals per draw; where a draw has nothing to divide by, that of all samples."""
    sums, weights = np.asarray(over, dtype=np.float64), np.asarray(under, dtype=np.float64)
    whole = sums.sum() / max(weights.sum(), 1e-12)
    totals = weights[index].sum(-1)
    return np.where(totals > 0, sums[index].sum(-1) / np.where(totals > 0, totals, 1.0), whole)


def named(name: str) -> Figure:
    """One ratio of the run's sums."""
    return lambda run, index: ratio(*run["sums"][name], index)


def mean_of(prefix: str) -> Figure:
    """The mean of all ratios whose names begin so: over steps, or over exits."""

    def figure(run: Run, index: np.ndarray) -> np.ndarray:
        return np.mean([ratio(*run["sums"][name], index) for name in run["sums"] if name.startswith(prefix)], axis=0)

    return figure


def chained(proposals: int) -> Figure:
    """Tokens a verification of so many proposals gives by the matches of teacher-forced chains: 1 + Σ Π match."""

    def figure(run: Run, index: np.ndarray) -> np.ndarray:
        steps = [ratio(*run["sums"][f"match {step + 1}"], index) for step in range(proposals)]
        return 1.0 + np.cumprod(steps, axis=0).sum(0)

    return figure


def depth(estimator: str) -> Figure:
    """Mean share of the layers, the block not counted, at TARGET agreement."""

    def figure(run: Run, index: np.ndarray) -> np.ndarray:
        found = run["depths"][estimator]
        tokens = np.asarray(found["tokens"], dtype=np.float64)
        layers = np.asarray(found["layers"], dtype=np.float64) / found["n_layers"]
        agree, none = np.asarray(found["agree"], dtype=np.float64), np.zeros((0, 0))
        points = Points(tuple(found["thresholds"]), agree, layers, tokens, none)
        return np.concatenate([points.drawn(part, TARGET) for part in np.array_split(index, min(40, len(index)))])

    return figure


def decoding(run: Run, index: np.ndarray) -> np.ndarray:
    """Tokens a verification gave in real decoding."""
    return ratio(run["decoded"]["tokens"], run["decoded"]["verifications"], index)


def figures(proposals: int) -> dict[str, Figure]:
    """Columns by their headings."""
    return {
        "draft: loss": mean_of("draft loss"),
        "match 1": named("match 1"),
        "match 2": named("match 2"),
        "match 3": named("match 3"),
        f"tokens a verification, {proposals} proposals: chains": chained(proposals),
        "decoded": decoding,
        "exit blocks: loss": mean_of("exit loss"),
        "depth at 98 %, head": depth("head"),
        "margin": depth("margin"),
    }


def samples(run: Run, figure: Figure) -> int:
    """How many documents or prompts a figure has."""
    return len(run["decoded"]["tokens"]) if figure is decoding else len(run["sums"]["match 1"][0])


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and least to greatest where there are several."""
    ends_of = f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{ends_of}"


def groups_of(runs: Sequence[Run]) -> dict[tuple[str, str], dict[int, Run]]:
    """Runs by model and kind, then by seed."""
    found: dict[tuple[str, str], dict[int, Run]] = {}
    for run in runs:
        start = "from the last layer" if run["warm"] else "from random weights"
        found.setdefault((run["model"], f"{run['kind']}, {start}"), {})[run["seed"]] = run
    return found


def row(key: tuple[str, str], runs: Sequence[Run], columns: dict[str, Figure]) -> list[str]:
    """A kind: sizes, seconds, and every figure over seeds."""
    first = runs[0]
    cells = [*key, str(len(runs)), f"{first['parameters']['block']:,}", f"{first['macs']['draft step']:,}"]
    cells.append(f"{first['macs']['exit']:,}")
    cells.append(spread([run["seconds"]["training"] for run in runs], 0))
    for figure in columns.values():
        whole = np.arange(samples(first, figure))[None]
        cells.append(spread([float(figure(run, whole)[0]) for run in runs]))
    return cells


def difference(one: dict[int, Run], other: dict[int, Run], figure: Figure) -> str:
    """Over the seeds that both have, one kind's figure less the other's with its interval."""
    seeds = sorted(one.keys() & other.keys())
    count = samples(one[seeds[0]], figure)
    values = []
    for index in (np.arange(count)[None], draws(count)):
        sides = [np.mean([figure(side[seed], index) for seed in seeds], axis=0) for side in (one, other)]
        values.append(sides[0] - sides[1])
    if count < 2:
        return f"{values[0][0]:+.3f}"
    low, high = ends(values[1])
    return f"{values[0][0]:+.3f} [{low:+.3f}, {high:+.3f}]"


def table(document: dict[str, Any]) -> str:
    """The runs of a file as Markdown."""
    settings = document["settings"]
    columns = figures(settings["proposals"])
    groups = groups_of(list(document["runs"].values()))
    head = ["model", "block", "seeds", "parameters of a block", "MACs of a draft step", "of an exit's block"]
    lines = [row(key, list(found.values()), columns) for key, found in sorted(groups.items())]
    for key, found in sorted(groups.items()):
        for other, theirs in sorted(groups.items()):
            if key[0] == other[0] and key[1] < other[1] and found.keys() & theirs.keys():
                cells = [key[0], f"difference: {key[1]} – {other[1]}", str(len(found.keys() & theirs.keys()))]
                lines.append([*cells, *["–"] * 4, *(difference(found, theirs, each) for each in columns.values())])
    note = (
        f"{settings['tokens']:,.0f} training tokens a run of {settings['data']}, one in {settings['every']} learned "
        "from. Means, least and greatest seed in parentheses. Differences of means over seeds, 95 % intervals of the "
        "paired bootstrap over documents (decoded: prompts) in brackets. MACs: weights, without attention over the "
        "state. Depth does not count the block. Seconds: draft and exit blocks together."
    )
    return markdown([*head, "s of training", *columns], lines) + "\n\n" + note
