"""Wall clock of the decode steps against full depth in the same engine: batch 1, neighbouring runs, ratios only.

Time starts when the first new token is handed out, so the prompt's pass is not in it. For every prompt the policy and
full depth (threshold "never", ``propagate``) run one after the other, in alternating order; a cell's number is the
median of the ratios over prompts. Thresholds are those of the study, from results/MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence

import torch
import transformers
from bench import Bench, Threshold, generate
from prompts import load_prompts

from dynamax_llm.backbones.loading import load
from dynamax_llm.decoding.thresholds import NEVER

#: Warm-up tokens of either side before a cell's first pair.
WARM_UP = 8


def seconds(bench: Bench, ids: torch.Tensor, new: int, estimator: str, policy: str, threshold: Threshold) -> float:
    """From the first new token to the last."""
    early = bench.early(estimator, policy, threshold)
    first: list[float] = []

    def note(tokens: torch.Tensor, layers: torch.Tensor) -> None:
        if not first:
            first.append(time.perf_counter())

    early.on_token = note
    generate(bench.model, ids, new, early)
    return time.perf_counter() - first[0]


def measure_times(model: str, estimators: Sequence[str], args: argparse.Namespace) -> None:
    """Time every cell of results/MODEL.json that is chosen and not timed yet; results/MODEL-time.json."""
    path = args.results / f"{model}-time.json"
    study = json.loads((args.results / f"{model}.json").read_text())
    prompts, new, length = args.prompts or 3, args.new_tokens, args.prompt_tokens
    command = f"python recipes/policies/study.py time --prompts {prompts} --new-tokens {new}"
    machine = f"{platform.processor() or platform.machine()}, CPU, {args.threads} thread(s), batch 1, float32"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    done = {"command": command, "machine": machine, "versions": versions, "new_tokens": new, "cells": {}}
    if path.exists() and not args.again:
        done["cells"] = json.loads(path.read_text())["cells"]
    texts = load_prompts(args.data, load(model)[1], "eval", prompts, length)
    bench = Bench(model, "cpu", texts, length, 1)
    for cell in study["cells"]:
        name = f"{cell['policy']}|{cell['judge']}|{cell['target']}"
        chosen = cell["judge"] in estimators and cell["policy"] in args.policies
        if not chosen or name in done["cells"]:
            continue
        ratios = _pairs(bench, new, cell)
        median = statistics.median(ratios)
        done["cells"][name] = {"median": median, "least": min(ratios), "greatest": max(ratios), "pairs": len(ratios)}
        path.write_text(json.dumps(done, indent=1) + "\n")
        print(f"{model} {name}: {median:.3f} ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)


def _pairs(bench: Bench, new: int, cell: dict) -> list[float]:
    """Policy over full depth, per prompt."""
    estimator, policy, threshold = cell["judge"], cell["policy"], cell["threshold"]
    ratios = []
    for turn, ids in enumerate(bench.prompts(len(bench.texts))):
        sides = {"cell": (estimator, policy, threshold), "full": (estimator, "propagate", NEVER)}
        if turn == 0:
            for side in sides.values():
                seconds(bench, ids, WARM_UP, *side)
        order = ("cell", "full") if turn % 2 else ("full", "cell")
        taken = {side: seconds(bench, ids, new, *sides[side]) for side in order}
        ratios.append(taken["cell"] / taken["full"])
    return ratios
