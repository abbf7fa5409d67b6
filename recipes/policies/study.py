"""What state policies cost and change: every policy, estimator and depth on both shipped backbones. See README.md.

    python recipes/texts.py policies --data DIR --out prompts.jsonl.xz
    python recipes/policies/study.py run --data prompts.jsonl.xz --out OUT [--device cuda] [--models mamba-ee] …
    python recipes/policies/study.py collect --data prompts.jsonl.xz --out OUT    # results/MODEL.json
    python recipes/policies/study.py time --data prompts.jsonl.xz --prompts 3     # results/MODEL-time.json
    python recipes/policies/study.py table                                        # results/MODEL.md, results/summary.md

`run` resumes: every cell is a file of OUT/records with one line per prompt. Its cells of several models and estimators
may be measured by several processes at once (gpu.sh). `time` measures what results/MODEL-time.json lacks.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from common import (
    bootstrap,
    conditions,
    decode_seconds,
    device_name,
    generate,
    parsed,
    parser,
    write_json,
)
from dynamax_llm.backbones import adapt
from dynamax_llm.backbones.loading import REFERENCE_BACKBONES, load, shipped_exits
from dynamax_llm.calibration.prompts import Item
from dynamax_llm.calibration.risks import AgreementRisk
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.decoding.thresholds import NEVER
from dynamax_llm.engines.plan import DEFAULT_WINDOW, POLICIES
from dynamax_llm.evaluation.common.timing import Ratio, paired
from dynamax_llm.evaluation.harness.records import Records, cell_path
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import HEADS
from dynamax_llm.metrics import first_divergence, rouge_l
from dynamax_llm.text.sources import json_records
from report import render, summarise

HERE = Path(__file__).resolve().parent
#: Estimators: the shipped four-exit heads, the margin rule, and a fixed exit, which no confidence decides.
MEASURE, STATIC = "softmax_margin", "static"
ESTIMATORS = (*HEADS, MEASURE, STATIC)
#: Every policy with its ordinary window, and ``verify`` with a short one.
RUNS = (*POLICIES, "verify-4")
DEFAULTS = {"prompts": 64, "tuning": 32, "checked": 16, "alone": 8, "prompt_tokens": 64, "new_tokens": 128}
#: Log odds of thresholds in the search for a depth, halvings of that range, and a depth that is near enough.
LOG_ODDS, HALVINGS, TOLERANCE = (-6.0, 16.0), 8, 0.01
Threshold = float | list[float | str]


def window_of(run: str) -> tuple[str, int]:
    """The policy of a run and how many tokens may wait: "verify-4" is ``verify`` with a window of 4."""
    policy, _, window = run.partition("-")
    return policy, int(window) if window else DEFAULT_WINDOW


def threshold_for_depth(depth_at: Callable[[float], float], aim: float) -> tuple[float, float]:
    """(threshold, depth) nearest to a mean depth that rises with the threshold, by bisection in log odds."""
    low, high = LOG_ODDS
    best = (1.0, 1.0)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        threshold = 1.0 / (1.0 + math.exp(-middle))
        depth = depth_at(threshold)
        best = min(best, (threshold, depth), key=lambda pair: abs(pair[1] - aim))
        if abs(depth - aim) <= TOLERANCE:
            break
        low, high = (middle, high) if depth < aim else (low, middle)
    return best


class Study:
    """One shipped backbone on one device with its prompts; finished cells are read back from ``out``."""

    def __init__(self, model: str, args: argparse.Namespace, device: str | None = None) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.name, self.args = model, args
        self.model, self.tokenizer = load(model, dtype="float32", device_map=device or args.device)
        self.backbone, self.prompt, self.new = adapt(self.model), args.prompt_tokens, args.new_tokens
        self.texts = self.load_texts("eval", args.prompts)
        names = ("prompts", "tuning", "prompt_tokens", "new_tokens")
        self.identity = {"prompts_sha256": sha256(args.data), **{name: getattr(args, name) for name in names}}
        self.identity["n_layers"] = self.backbone.n_layers

    def load_texts(self, split: str, count: int) -> Tensor:
        """The first ``count`` texts of a split, (count, P + T), end-of-text first as in training."""
        length, eos = self.prompt + self.new, self.tokenizer.eos_token_id
        texts = [row["text"] for _, row in json_records(self.args.data) if row["split"] == split][:count]
        rows = [[eos, *self.tokenizer(text).input_ids[: length - 1]] for text in texts]
        if len(rows) < count or min(map(len, rows)) < length:
            sys.exit(f"{self.args.data} has fewer than {count} texts of {length} tokens in split {split!r}")
        return torch.tensor(rows, device=self.backbone.device)

    def defines(self, run: str) -> bool:
        """Whether the policy is defined for this backbone's layers."""
        return set(self.backbone.kinds) <= set(POLICIES[window_of(run)[0]].kinds)

    @functools.cache  # noqa: B019 - as long as the process
    def exits(self, head: str | None) -> Exits:
        """The shipped heads at the paper's four depths, which the recorded cells were measured with."""
        folder = None if head is None else shipped_exits(self.name, f"four/{head}")
        return Exits.untrained(self.backbone) if folder is None else Exits.from_pretrained(folder)

    def early(self, estimator: str, run: str, threshold: Any) -> EarlyExit:
        """A decoding; a fixed exit takes the cheapest measure, which is never below 0."""
        policy, window = window_of(run)
        measure = {MEASURE: MEASURE, STATIC: "state_similarity"}.get(estimator)
        exits = self.exits(None if measure else estimator)
        return EarlyExit(exits, threshold=threshold, policy=policy, window=window, measure=measure)

    @functools.cached_property
    def full(self) -> Tensor:
        """Prompts and the full model's own greedy continuations (N, P + T)."""
        return generate(self.model, self.texts[:, : self.prompt], self.new)

    def agreement(self, early: EarlyExit, texts: Tensor) -> Any:
        """Per prompt, the share of new tokens that differ from the full model's given the same prefix, and depth."""
        items = [Item(tuple(row[:-1]), self.prompt) for row in texts.tolist()]
        return AgreementRisk(self.backbone, self.tokenizer, items).measure(early)

    def threshold(self, estimator: str, run: str, aim: float) -> tuple[Threshold, float]:
        """The threshold of a cell and the depth found with it; ``verify`` drafts as ``defer`` decides."""
        if estimator == STATIC:
            shares = [round(layer / self.backbone.n_layers, 4) for layer in self.exits(None).config.layers]
            return [0.0 if share == aim else NEVER for share in shares], aim
        policy = "defer" if run.startswith("verify") else run
        records = self.records(estimator, f"threshold-{policy}", aim, {})
        if not records.samples:
            prompts, new = self.load_texts("tune", self.args.tuning)[:, : self.prompt], 3 * self.new // 4

            def depth_at(threshold: float) -> float:
                out = generate(self.model, prompts, new, self.early(estimator, policy, threshold))
                return float(out.exit_layers.float().mean()) / self.backbone.n_layers

            threshold, depth = threshold_for_depth(depth_at, aim)
            records.append({"kind": "sample", "doc": 0, "threshold": threshold, "depth": depth})
        return records.samples[0]["threshold"], records.samples[0]["depth"]

    def records(self, estimator: str, run: str, aim: float, facts: dict[str, Any]) -> Records:
        path = cell_path(self.args.out, self.name, estimator, f"{run}@{aim}")
        return Records(path, {**self.identity, **facts})

    def cell(self, estimator: str, run: str, aim: float) -> Records:
        """Measure what is missing of a cell: ``verify`` and the passes of ``defer`` one prompt at a time."""
        threshold, tuned = self.threshold(estimator, run, aim)
        records = self.records(estimator, run, aim, {"threshold": threshold, "tuned_depth": tuned})
        early, exact = self.early(estimator, run, threshold), run.startswith("verify")
        if not exact and len(records.samples) < self.args.prompts:
            records.append(*self.quality(early))
        wanted = {"verify": self.args.checked, "defer": self.args.alone}.get(window_of(run)[0], 0)
        kept = records.samples if exact else records.timings
        kind = "sample" if exact else "timing"
        for row in range(len(kept), min(wanted, self.args.prompts)):
            records.append({"kind": kind, "doc": row, **self.alone(early, row)})
        print(f"{self.name} {estimator} {run}@{aim}: {len(records.samples)} prompts", flush=True)
        return records

    def quality(self, early: EarlyExit) -> list[dict[str, Any]]:
        """Free generation of all prompts in one batch, and agreement along two texts."""
        out = generate(self.model, self.texts[:, : self.prompt], self.new, early)
        own, real = (self.agreement(early, text) for text in (self.full, self.texts))
        return [
            {
                "kind": "sample",
                "doc": row,
                "tokens": out.sequences[row, self.prompt :].tolist(),
                "full": self.full[row, self.prompt :].tolist(),
                "layers": out.exit_layers[row].tolist(),
                "agreement": 1.0 - float(own.losses[row]),
                "agreement_depth": float(own.depth[row]),
                "agreement_real_text": 1.0 - float(real.losses[row]),
                "agreement_real_text_depth": float(real.depth[row]),
                "counted_reduction": out.trace.counted_reduction,
            }
            for row in range(len(self.texts))
        ]

    def alone(self, early: EarlyExit, row: int) -> dict[str, Any]:
        """One prompt by itself: a batch shares its catch-up passes. ``gap``: how much the full model prefers its own
        token to the next best where the texts first differ."""
        ids = self.texts[row : row + 1, : self.prompt]
        out, whole = generate(self.model, ids, self.new, early), generate(self.model, ids, self.new)
        tokens, full = (part[0, self.prompt :].tolist() for part in (out.sequences, whole))
        found: dict[str, Any] = {"tokens": tokens, "full": full, "depth": out.trace.mean_depth, "gap": None}
        found |= {name: getattr(out.trace, name) for name in ("counted_reduction", "pass_reduction")}
        found |= {name: getattr(out.trace.stats, name) for name in ("window_bytes", "replayed")}
        found["verification"] = None if out.verification is None else _counts(out.verification)
        place = first_divergence(tokens, full)
        if place is not None:
            with torch.no_grad():
                best = self.model(whole[:, : self.prompt + place]).logits[0, -1].float().topk(2).values
            found["gap"] = {"prompt": row, "place": place, "gap": float(best[0] - best[1])}
        return found

    def time_ratio(self, cell: dict[str, Any]) -> Ratio:
        """Time of the decode steps over full depth, one pair per prompt."""
        early = self.early(cell["estimator"], cell["policy"], cell["threshold"])
        full = self.early(cell["estimator"], "propagate", NEVER)
        # Each prompt twice in a row, for the two sides of a pair; the first pair warms up.
        prompts = iter([ids for ids in self.texts[:, : self.prompt].split(1) for _ in range(2)] * 2)
        sides = [
            lambda d=decoding: decode_seconds(self.model, next(prompts), self.new, d) for decoding in (early, full)
        ]
        return paired(*sides, len(self.texts))


def _counts(verification: Any) -> dict[str, int]:
    """The counts of a generation, without its single windows."""
    return {name: value for name, value in vars(verification).items() if name != "rounds"}


def summary(estimator: str, run: str, aim: float, records: Records, tokenizer: Any) -> dict[str, Any]:
    """One cell of results/MODEL.json from its records."""
    rows = [records.samples[doc] for doc in sorted(records.samples)]
    alone = list(records.timings.values()) or rows
    width = len(rows[0]["full"])
    firsts = [width if (at := first_divergence(row["tokens"], row["full"])) is None else at for row in rows]
    texts = [[tokenizer.decode(row[key], skip_special_tokens=True) for key in ("tokens", "full")] for row in rows]
    cell = {"estimator": estimator, "policy": run, "target": aim}
    cell |= {name: records.identity[name] for name in ("threshold", "tuned_depth")}
    cell |= {"prompts": len(rows), "rouge_l": bootstrap([rouge_l(*pair) for pair in texts])}
    cell["identical"] = sum(row["tokens"] == row["full"] for row in rows) / len(rows)
    cell["first_difference"] = {"mean": fmean(firsts), "median": median(firsts)}
    cell["counted_reduction"] = fmean(row["counted_reduction"] for row in alone)
    if "pass_reduction" in alone[0]:
        cell["pass_reduction"] = fmean(row["pass_reduction"] for row in alone)
        cell["window_bytes"] = max(row["window_bytes"] for row in alone)
    if run.startswith("verify"):
        counts = {name: sum(row["verification"][name] for row in rows) for name in rows[0]["verification"]}
        facts = {"verification": counts, "replayed": sum(row["replayed"] for row in rows)}
        gaps = [row["gap"] for row in rows if row["gap"] is not None]
        return {**cell, **facts, "depth": fmean(row["depth"] for row in rows), "gaps": gaps}
    layers = Counter(layer for row in rows for layer in row["layers"])
    deepest = records.identity["n_layers"]
    cell["layers"] = {str(layer): count for layer, count in sorted(layers.items())}
    cell["depth"] = sum(layer * count for layer, count in layers.items()) / layers.total() / deepest
    # Alone, a token passes exactly the layers it runs; the first token comes from the prompt's pass.
    cell.setdefault("pass_reduction", 1.0 - fmean(layer for row in rows for layer in row["layers"][1:]) / deepest)
    for name in ("agreement", "agreement_real_text"):
        cell[name] = bootstrap([row[name] for row in rows])
        cell[f"{name}_depth"] = fmean(row[f"{name}_depth"] for row in rows)
    return cell


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cells(args: argparse.Namespace, study: Study) -> list[tuple[str, str, float]]:
    """(estimator, run, aim) of the command line that this backbone defines; a fixed exit has its own depths."""
    fixed = [round(layer / study.backbone.n_layers, 4) for layer in study.exits(None).config.layers[:-1]]
    runs = [run for run in sorted(args.policies, key=lambda run: run.startswith("verify")) if study.defines(run)]
    aims = {estimator: fixed if estimator == STATIC else args.depths for estimator in args.estimators}
    return [(estimator, run, aim) for estimator in args.estimators for aim in aims[estimator] for run in runs]


def run(args: argparse.Namespace) -> None:
    """Measure every cell; those that need single prompts on ``--alone-device``."""
    for model in args.models:
        study = Study(model, args)
        other = study if args.alone_device == args.device else Study(model, args, args.alone_device)
        place = {"device_name": device_name(args.device), "alone_device_name": device_name(args.alone_device)}
        write_json(args.out / f"{model}-conditions.json", {**place, **conditions(args.device)})
        for estimator, name, aim in cells(args, study):
            (other if name.startswith("verify") else study).cell(estimator, name, aim)


def collect(args: argparse.Namespace) -> None:
    """results/MODEL.json from the finished cells."""
    for model in args.models:
        study, found = Study(model, args), []
        for estimator, name, aim in cells(args, study):
            if cell_path(args.out, model, estimator, f"{name}@{aim}").exists():
                found.append(summary(estimator, name, aim, study.cell(estimator, name, aim), study.tokenizer))
        settings = {name: getattr(args, name) for name in DEFAULTS} | {"prompts_sha256": sha256(args.data)}
        machine = json.loads((args.out / f"{model}-conditions.json").read_text())
        document = {"model": model, "settings": settings, "machine": machine, "cells": found}
        write_json(args.results / f"{model}.json", document)
        print(f"{args.results / model}.json: {len(found)} cells")


def time_cells(args: argparse.Namespace) -> None:
    """Decode steps of each recorded cell over full depth in the same engine, per prompt: results/MODEL-time.json."""
    for model in args.models:
        path, study = args.results / f"{model}-time.json", Study(model, args)
        document = {**conditions("cpu"), "new_tokens": args.new_tokens, "cells": {}}
        if path.exists() and not args.again:
            document = json.loads(path.read_text())
        for cell in json.loads((args.results / f"{model}.json").read_text())["cells"]:
            name = f"{cell['policy']}|{cell['estimator']}|{cell['target']}"
            chosen = cell["estimator"] in args.estimators and cell["policy"] in args.policies
            if chosen and name not in document["cells"]:
                ratio = study.time_ratio(cell)
                document["cells"][name] = {**ratio._asdict(), "pairs": args.prompts}
                write_json(path, document)
                print(f"{model} {name}: {ratio}", flush=True)


def table(args: argparse.Namespace) -> None:
    """results/MODEL.md and results/summary.md from the recorded JSON."""
    for model in args.models:
        (args.results / f"{model}.md").write_text(render(model, args.results), encoding="utf-8")
    (args.results / "summary.md").write_text(summarise(args.models, args.results), encoding="utf-8")


def main() -> None:
    stages = {"run": run, "collect": collect, "time": time_cells, "table": table}
    made = parser(__doc__, "device")
    made.add_argument("stage", choices=stages)
    made.add_argument("--data", type=Path, help="the prompts that recipes/texts.py wrote")
    made.add_argument("--out", type=Path, default=Path("out"), help="folder of finished cells")
    made.add_argument("--results", type=Path, default=HERE / "results")
    made.add_argument("--models", nargs="+", choices=REFERENCE_BACKBONES, default=list(REFERENCE_BACKBONES))
    made.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS))
    made.add_argument("--policies", nargs="+", choices=RUNS, default=list(RUNS))
    made.add_argument(
        "--depths", type=lambda text: [float(part) for part in text.split(",")], default=[0.55, 0.65, 0.8]
    )
    for name, value in DEFAULTS.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    made.add_argument("--alone-device", default="cpu", help="where single prompts run")
    made.add_argument("--again", action="store_true", help="time: measure anew")
    args = parsed(made)
    if args.stage != "table" and args.data is None:
        sys.exit(f"{args.stage} needs --data: the prompts that `python recipes/texts.py policies` writes")
    stages[args.stage](args)


if __name__ == "__main__":
    main()
