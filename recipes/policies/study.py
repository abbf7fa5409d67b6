"""What state policies cost and change: every policy, judge and depth on both shipped backbones. See README.md.

    python recipes/policies/study.py prepare --data DIR            # DIR: the reference backbones' training folder
    python recipes/policies/study.py run --out OUT [--device cuda] [--workers 12]
    python recipes/policies/study.py collect --out OUT             # ROUGE-L, intervals: results/MODEL.json
    python recipes/policies/study.py time --prompts 3              # wall clock on this machine: results/MODEL-time.json
    python recipes/policies/study.py table                         # results/MODEL.md from both, results/summary.md

`run` resumes: every finished cell is a line in a file of OUT. `time` resumes too; --again measures anew.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from bench import ESTIMATORS, MEASURE, RUNS
from cells import Group, part_of
from prompts import prepare, sha256
from records import Settings
from timing import measure_times
from transformers.utils import logging

from dynamax_llm.backbones.loading import DEFAULT_HEAD, REFERENCE_BACKBONES
from report import collect, render, summarise

HERE = Path(__file__).resolve().parent
PROMPTS = HERE.parents[1] / ".carry" / "policies" / "prompts.jsonl.xz"
RESULTS = HERE / "results"
#: The nearest to 1/2 that confidences can be asked for: at 1/2 itself every token leaves, which is the estimator
#: "static".
DEPTHS = "0.55,0.65,0.8"
#: The estimator of the summary: the head that is used when none is named.
SUMMARY = DEFAULT_HEAD


def settings(args: argparse.Namespace) -> Settings:
    if not args.data.exists():
        sys.exit(f"no prompts at {args.data}: run `study.py prepare --data DIR` first")
    return Settings(
        prompts_sha256=sha256(args.data),
        prompts=args.prompts,
        tuning=args.tuning,
        checked=args.checked,
        alone=args.alone,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        tuning_tokens=args.tuning_tokens,
        device=args.device,
        alone_device=args.alone_device,
    )


def run(args: argparse.Namespace) -> int:
    """Every group of cells, here one after the other or in several processes; the slowest first.

    ``verify`` comes last: it takes the thresholds that the batches have found by then.
    """
    parts: dict[str, list[str]] = {}
    for name in sorted(args.policies, key=lambda name: part_of(name).startswith("verify")):
        parts.setdefault(part_of(name), []).append(name)
    failed = 0
    for exact in (False, True):
        chosen = [runs for part, runs in parts.items() if part.startswith("verify") == exact]
        models = sorted(args.models)  # mamba-ee is the slower
        groups = [(model, estimator, runs) for model in models for runs in chosen for estimator in args.estimators]
        if args.workers > 1 and len(groups) > 1:
            failed += spread(groups, args)
            continue
        for model, estimator, runs in groups:
            Group(model, estimator, part_of(runs[0]), settings(args), args.data, args.out).run(runs, args.depths)
    return 1 if failed else 0


def spread(groups: list[tuple[str, str, list[str]]], args: argparse.Namespace) -> int:
    """One process per group, ``--workers`` at a time: this very command with one model, one judge and some policies.

    The processes take turns among the GPUs, if there are several. Returns how many failed.
    """
    start, failed, started = time.perf_counter(), 0, 0
    gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    waiting, running = list(groups), []
    while waiting or running:
        while waiting and len(running) < args.workers:
            model, estimator, runs = waiting.pop(0)
            own = ["--models", model, "--judges", estimator, "--policies", ",".join(runs), "--workers", "1"]
            place = {"CUDA_VISIBLE_DEVICES": str(started % gpus)} if gpus > 1 else {}
            process = subprocess.Popen([sys.executable, *sys.argv, *own], env={**os.environ, **place})
            running.append((f"{model} {estimator} {runs[0]}", process))
            started += 1
        time.sleep(0.2)
        for item in [item for item in running if item[1].poll() is not None]:
            running.remove(item)
            failed += item[1].returncode != 0
            state = "done" if item[1].returncode == 0 else f"FAILED with exit code {item[1].returncode}"
            print(f"{time.perf_counter() - start:7.1f} s  {item[0]} …: {state}", flush=True)
    return failed


def listed(allowed: tuple[str, ...]):
    """A parser of comma-separated names."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        wrong = sorted(set(names) - set(allowed))
        if wrong:
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: choose from {', '.join(allowed)}")
        return names

    return parse


def numbers(text: str) -> list[float]:
    return [float(item) for item in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("prepare", "run", "collect", "time", "table"))
    parser.add_argument("--data", type=Path, help="prepare: the training folder; else what prepare wrote")
    parser.add_argument("--out", type=Path, help="folder of finished cells")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--models", type=listed(REFERENCE_BACKBONES), default=list(REFERENCE_BACKBONES))
    parser.add_argument(
        "--judges", "--heads", type=listed(ESTIMATORS), help="default: all; for time, mamba and the margin"
    )
    parser.add_argument("--policies", type=listed(RUNS), default=list(RUNS))
    parser.add_argument("--depths", type=numbers, default=numbers(DEPTHS))
    parser.add_argument("--prompts", type=int, help="judged prompts (default 64; time: 3)")
    parser.add_argument("--tuning", type=int, default=Settings.tuning, help="prompts for finding thresholds")
    parser.add_argument("--checked", type=int, default=Settings.checked, help="prompts under verify, one at a time")
    parser.add_argument("--alone", type=int, default=Settings.alone, help="prompts under defer, one at a time")
    parser.add_argument("--prompt-tokens", type=int, default=Settings.prompt_tokens)
    parser.add_argument("--new-tokens", type=int, default=Settings.new_tokens)
    parser.add_argument("--tuning-tokens", type=int, default=Settings.tuning_tokens)
    parser.add_argument("--device", default="cpu", help="where batches run")
    parser.add_argument("--alone-device", default="cpu", help="where single prompts run")
    parser.add_argument("--workers", type=int, default=1, help="processes, one model and judge each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="time: forget earlier timings")
    return parser.parse_args()


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.stage == "prepare":
        if args.data is None:
            sys.exit("prepare needs --data DIR, the folder that the reference backbones were trained on")
        out = (args.out or PROMPTS.parent) / PROMPTS.name
        facts = prepare(args.data, out, {"eval": args.prompts or 96, "tune": args.tuning})
        print(f"{out}: {facts['counts']} prompts, sha256 {facts['prompts_sha256']}")
        return 0
    args.data = args.data or PROMPTS
    if args.stage in ("run", "collect") and args.out is None:
        sys.exit(f"{args.stage} needs --out, the folder of finished cells")
    if args.stage == "run":
        args.prompts, args.estimators = args.prompts or Settings.prompts, args.estimators or list(ESTIMATORS)
        return run(args)
    for model in args.models:
        if args.stage == "collect":
            collect(model, args.out, args.data, args.results)
        elif args.stage == "time":
            measure_times(model, args.estimators or [DEFAULT_HEAD, MEASURE], args)
        else:
            print(render(model, args.results))
    if args.stage == "table":
        print(summarise(args.models, args.results, SUMMARY))
    return 0


if __name__ == "__main__":
    sys.exit(main())
