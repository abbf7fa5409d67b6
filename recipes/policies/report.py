"""From finished cells to numbers (ROUGE-L, intervals) and from numbers to tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench import ESTIMATORS, RUNS, first_difference
from cells import family_of
from prompts import facts_path
from records import Row, read, unpack

from dynamax_llm.backbones.loading import load

#: Resamples of the prompts and the seed of their draw, for 95 % percentile intervals.
RESAMPLES, SEED = 2000, 0


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean over prompts, with the 95 % percentile interval of its bootstrap."""
    found = np.asarray(values, dtype=float)
    draws = np.random.default_rng(SEED).integers(len(found), size=(RESAMPLES, len(found)))
    low, high = np.quantile(found[draws].mean(axis=1), (0.025, 0.975))
    return {"mean": float(found.mean()), "low": float(low), "high": float(high)}


class Texts:
    """Continuations compared as a reader sees them: decoded, then ROUGE-L F1 of words, without stemming."""

    def __init__(self, model: str) -> None:
        from rouge_score.rouge_scorer import RougeScorer

        self.tokenizer = load(model)[1]
        self.scorer = RougeScorer(["rougeL"], use_stemmer=False)

    def rouge(self, tokens: list[int], full: list[int]) -> float:
        """1 for equal texts, an empty one included."""
        if tokens == full:
            return 1.0
        one, other = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in (tokens, full))
        return 1.0 if one == other else self.scorer.score(other, one)["rougeL"].fmeasure

    def compare(self, tokens: list[list[int]], full: list[list[int]]) -> dict[str, Any]:
        """Two sets of continuations, row by row."""
        pairs = list(zip(tokens, full, strict=True))
        firsts = [first_difference(one, other) for one, other in pairs]
        return {
            "prompts": len(pairs),
            "rouge_l": interval([self.rouge(one, other) for one, other in pairs]),
            "identical": sum(one == other for one, other in pairs) / len(pairs),
            "first_difference": {"mean": statistics.fmean(firsts), "median": statistics.median(firsts)},
        }


def collect(model: str, out: Path, prompts: Path, results: Path) -> dict[str, Any]:
    """Numbers of all finished cells of a model: results/MODEL.json."""
    texts, cells, settings, machine = Texts(model), [], {}, {}
    for estimator in ESTIMATORS:
        rows: dict[str, Row] = {}
        for path in sorted(out.glob(f"{model}-{estimator}-*.jsonl")):
            rows |= read(path)
        if not rows:
            continue
        settings, machine = rows["settings"], rows["machine"]
        width = settings["new_tokens"]
        full = unpack(rows["full"]["tokens"], width) if "full" in rows else []
        names = [key.partition("|")[2] for key in rows if key.startswith(("quality|", "alone|verify"))]
        for policy, target in (name.split("|") for name in names):
            cells.append({"judge": estimator, "policy": policy, "target": float(target)})
            cells[-1] |= _cell(rows, policy, target, texts, full, width)
    order = {name: place for place, name in enumerate((*RUNS, *ESTIMATORS))}
    cells.sort(key=lambda cell: (order[cell["judge"]], cell["target"], order[cell["policy"]]))
    facts = facts_path(prompts)
    found = {
        "model": model,
        "settings": {name: value for name, value in settings.items() if name not in ("key", "settings")},
        "machine": {name: machine[name] for name in ("device_name", "alone_device_name", "versions")},
        "prompts": json.loads(facts.read_text()) if facts.exists() else {},
        "cells": cells,
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{model}.json").write_text(json.dumps(_rounded(found), indent=1) + "\n")
    print(f"{results / f'{model}.json'}: {len(cells)} cells")
    return found


def _cell(rows: dict[str, Row], policy: str, target: str, texts: Texts, full: list[list[int]], width: int) -> Row:
    threshold = rows[f"threshold|{family_of(policy)}|{target}"]
    cell: Row = {"threshold": threshold["threshold"], "tuned_depth": threshold["depth"]}
    alone = rows.get(f"alone|{policy}|{target}")
    if policy.startswith("verify"):
        assert alone is not None
        shared = ("depth", "counted_reduction", "pass_reduction", "window_bytes", "replayed", "verification", "gaps")
        compared = texts.compare(unpack(alone["tokens"], width), unpack(alone["full"], width))
        return {**cell, **{name: alone[name] for name in shared}, **compared}
    row = rows[f"quality|{policy}|{target}"]
    cell |= {name: row[name] for name in ("depth", "layers", "counted_reduction")}
    cell["agreement"] = interval([count / row["forced"] for count in row["agreeing"]])
    cell["agreement_depth"] = row["agreeing_depth"]
    cell["agreement_real_text"] = interval([count / row["forced"] for count in row["agreeing_real"]])
    cell["agreement_real_text_depth"] = row["agreeing_real_depth"]
    if policy == "defer":
        if alone is not None:
            cell |= {name: alone[name] for name in ("pass_reduction", "window_bytes")}
            cell["counted_reduction"], cell["alone_prompts"] = alone["counted_reduction"], alone["prompts"]
    else:
        # Alone, a token passes exactly the layers it runs.
        cell["pass_reduction"] = 1.0 - row["decoded_depth"]
    return cell | texts.compare(unpack(row["tokens"], width), full)


def _rounded(item: Any) -> Any:
    """Six digits after the point; thresholds are kept as they were."""
    if isinstance(item, dict):
        return {name: value if name == "threshold" else _rounded(value) for name, value in item.items()}
    if isinstance(item, list):
        return [_rounded(value) for value in item]
    return round(item, 6) if isinstance(item, float) else item


COUNTS = ("drafted", "corrected", "rolled_back", "windows")
COLUMNS = (
    "aim",
    "policy",
    "mean depth",
    "agreement, own text",
    "agreement, real text (depth)",
    "ROUGE-L",
    "identical",
    "first difference, median (mean)",
    "counted reduction",
    "pass reduction",
    "time",
)


def render(model: str, results: Path) -> str:
    """The tables of a model: results/MODEL.md."""
    found = json.loads((results / f"{model}.json").read_text())
    times = _times(model, results)
    parts = [f"# {model}: what the policies cost and change", _preamble(found, times)]
    estimators = dict.fromkeys(cell["judge"] for cell in found["cells"])
    for estimator in estimators:
        cells = [cell for cell in found["cells"] if cell["judge"] == estimator]
        parts.append(f"## {estimator.replace('_', ' ')}")
        parts.append(_table(COLUMNS, [_line(cell, times["cells"]) for cell in cells]))
    checked = [cell for cell in found["cells"] if cell["policy"].startswith("verify")]
    if checked:
        parts += ["## Proposals under `verify`", _proposals(checked)]
    text = "\n\n".join(parts) + "\n"
    (results / f"{model}.md").write_text(text)
    return text


def summarise(models: Sequence[str], results: Path, estimator: str) -> str:
    """One judge on every model, the few columns that a choice needs: results/summary.md."""
    heads = (
        "model",
        "aim",
        "policy",
        "mean depth",
        "agreement",
        "ROUGE-L",
        "counted reduction",
        "pass reduction",
        "time",
    )
    lines = []
    for model in models:
        cells = json.loads((results / f"{model}.json").read_text())["cells"]
        times = _times(model, results)["cells"]
        for cell in cells:
            if cell["judge"] != estimator:
                continue
            aim, policy, depth, own, _, rouge, _, _, *rest = _line(cell, times)
            brief = (text.partition(" [")[0] for text in (own, rouge))
            lines.append([model, aim, policy, depth, *brief, *rest])
    title = f"# What the policies cost and change: {estimator.replace('_', ' ')}"
    note = "Columns and intervals: " + ", ".join(f"[{model}]({model}.md)" for model in models) + "."
    text = f"{title}\n\n{note}\n\n{_table(heads, lines)}\n"
    (results / "summary.md").write_text(text)
    return text


def _times(model: str, results: Path) -> dict[str, Any]:
    path = results / f"{model}-time.json"
    return json.loads(path.read_text()) if path.exists() else {"cells": {}}


def _preamble(found: dict[str, Any], times: dict[str, Any]) -> str:
    s, machine = found["settings"], found["machine"]
    lines = [
        f"{s['prompts']} prompts of {s['prompt_tokens']} tokens, {s['new_tokens']} new tokens each, float32, greedy, "
        f"batches on {machine['device_name']}; `verify` on {s['checked']} of them, passes and counted reduction of "
        f"`defer` on {s['alone']}, one at a time on {machine['alone_device_name']}. {machine['versions']}. Prompts' "
        f"sha256 {s['prompts_sha256'][:16]}. 95 % intervals in brackets: bootstrap over prompts. How each column is "
        "measured: [README](../README.md).",
    ]
    if times["cells"]:
        lines.append(
            f"Time: wall clock of the decode steps over full depth in the same engine, median (least to greatest) of "
            f"neighbouring runs; {times['machine']}, {times['new_tokens']} tokens; `{times['command']}`."
        )
    return "\n\n".join(lines)


def _line(cell: Row, times: dict[str, Row]) -> list[str]:
    own = real = "exact"
    if not cell["policy"].startswith("verify"):
        own = _interval(cell["agreement"])
        real = f"{_interval(cell['agreement_real_text'])} ({_short(cell['agreement_real_text_depth'])})"
    first, time = cell["first_difference"], times.get(f"{cell['policy']}|{cell['judge']}|{cell['target']}")
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


def _proposals(cells: list[Row]) -> str:
    heads = (
        "judge",
        "policy",
        "mean depth",
        "acceptance",
        "proposed",
        "corrected",
        "rolled back",
        "windows",
        "window, KiB",
    )
    lines = []
    for cell in cells:
        v = cell["verification"]
        checked = v["accepted"] + v["corrected"]
        rate = f"{v['accepted'] / checked:.3f}" if checked else "–"
        estimator, policy = cell["judge"].replace("_", " "), cell["policy"].replace("-", ", window ")
        lines.append([estimator, policy, _short(cell["depth"]), rate])
        lines[-1] += [f"{v[name]:,}" for name in COUNTS]
        lines[-1].append(f"{cell['window_bytes'] / 1024:,.0f}")
    return _table(heads, lines)


def _interval(item: dict[str, float]) -> str:
    return f"{_short(item['mean'])} [{_short(item['low'])}, {_short(item['high'])}]"


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0") if value < 1 else f"{value:.3f}"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
