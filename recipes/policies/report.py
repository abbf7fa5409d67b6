"""results/MODEL.json and results/MODEL-time.json as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import markdown

Cell = dict[str, Any]
#: The estimator of the summary.
SUMMARY = "mamba"
COLUMNS = (
    *("aim", "policy", "mean depth", "agreement, own text", "agreement, real text (depth)", "ROUGE-L", "identical"),
    *("first difference, median (mean)", "counted reduction", "pass reduction", "time"),
)
COUNTS = ("drafted", "corrected", "rolled_back", "windows")
HEADS = ("estimator", "policy", "mean depth", "acceptance", "proposed", "corrected", "rolled back", "windows")


def load(model: str, results: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recorded document, and the recorded times."""
    times = results / f"{model}-time.json"
    found = json.loads((results / f"{model}.json").read_text(encoding="utf-8"))
    return found, json.loads(times.read_text(encoding="utf-8")) if times.exists() else {"cells": {}}


def render(model: str, results: Path) -> str:
    """All cells of a model, a table per estimator, and what became of drafts under ``verify``."""
    found, times = load(model, results)
    parts = [f"# {model}: what the policies cost and change", _conditions(found)]
    if times["cells"]:
        parts.append(
            "Time: wall clock of the decode steps over full depth in the same engine, median (least to greatest) of "
            f"neighbouring runs; {times.get('machine') or times['device']}, {times['new_tokens']} tokens; "
            f"`{times['command']}`."
        )
    for estimator in dict.fromkeys(cell["estimator"] for cell in found["cells"]):
        rows = [line(cell, times["cells"]) for cell in found["cells"] if cell["estimator"] == estimator]
        parts += [f"## {estimator.replace('_', ' ')}", markdown(COLUMNS, rows)]
    if checked := [cell for cell in found["cells"] if cell["policy"].startswith("verify")]:
        parts += ["## Proposals under `verify`", markdown((*HEADS, "window, KiB"), map(_proposals, checked))]
    return "\n\n".join(parts) + "\n"


def summarise(models: Sequence[str], results: Path) -> str:
    """One estimator on every model, the columns that a choice needs."""
    rows = []
    for model in models:
        found, times = load(model, results)
        for cell in (cell for cell in found["cells"] if cell["estimator"] == SUMMARY):
            aim, policy, depth, own, _, rouge, _, _, *rest = line(cell, times["cells"])
            rows.append([model, aim, policy, depth, *(text.partition(" [")[0] for text in (own, rouge)), *rest])
    columns = ("model", "aim", "policy", "mean depth", "agreement", "ROUGE-L", *COLUMNS[-3:])
    note = "Columns and intervals: " + ", ".join(f"[{model}]({model}.md)" for model in models) + "."
    return f"# What the policies cost and change: {SUMMARY}\n\n{note}\n\n{markdown(columns, rows)}\n"


def _conditions(found: dict[str, Any]) -> str:
    s, machine = found["settings"], found["machine"]
    versions = machine["versions"]
    if not isinstance(versions, str):
        versions = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{s['prompts']} prompts of {s['prompt_tokens']} tokens, {s['new_tokens']} new tokens each, float32, greedy, "
        f"batches on {machine['device_name']}; `verify` on {s['checked']} of them, passes and counted reduction of "
        f"`defer` on {s['alone']}, one at a time on {machine['alone_device_name']}. {versions}. Prompts' "
        f"sha256 {s['prompts_sha256'][:16]}. 95 % intervals in brackets: bootstrap over prompts. How each column is "
        "measured: [README](../README.md)."
    )


def line(cell: Cell, times: dict[str, Cell]) -> list[str]:
    """A cell's row of COLUMNS."""
    own = real = "exact"
    if not cell["policy"].startswith("verify"):
        own = _interval(cell["agreement"])
        real = f"{_interval(cell['agreement_real_text'])} ({_short(cell['agreement_real_text_depth'])})"
    first, time = cell["first_difference"], times.get(f"{cell['policy']}|{cell['estimator']}|{cell['target']}")
    return [
        _short(cell["target"]),
        cell["policy"].replace("-", ", window "),
        _short(cell["depth"]),
        own,
        real,
        _interval(cell["rouge_l"]),
        f"{cell['identical']:.0%}",
        f"{first['median']:.0f} ({first['mean']:.0f})",
        f"{cell['counted_reduction']:.1%}",
        f"{cell['pass_reduction']:.1%}" if "pass_reduction" in cell else "–",
        "–" if time is None else f"{time['median']:.2f} ({time['least']:.2f} to {time['greatest']:.2f})",
    ]


def _proposals(cell: Cell) -> list[str]:
    facts = cell["verification"]
    checked = facts["accepted"] + facts["corrected"]
    rate = f"{facts['accepted'] / checked:.3f}" if checked else "–"
    names = [cell["estimator"].replace("_", " "), cell["policy"].replace("-", ", window "), _short(cell["depth"])]
    return [*names, rate, *(f"{facts[name]:,}" for name in COUNTS), f"{cell['window_bytes'] / 1024:,.0f}"]


def _interval(item: dict[str, float]) -> str:
    return f"{_short(item['mean'])} [{_short(item['low'])}, {_short(item['high'])}]"


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0") if value < 1 else f"{value:.3f}"
