"""What the decode loop costs and saves on a CPU, against full depth and against Hugging Face, in paired runs.

    python recipes/cpu/overhead.py [--repeats 15] [--tokens 96] [--threads 1]

Bars of issue 2: never exiting takes at most 1.05 of Hugging Face's own ``generate``; leaving every token at half depth
under ``propagate`` takes at most 0.65 of full depth per new token. Medians of ratios of neighbouring runs, so that a
machine whose speed drifts does not matter. Time per token is that of the decode steps: prompt and first token apart.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
import transformers
from transformers.utils import logging

from dynamax_llm.backbones import adapt
from dynamax_llm.backbones.loading import load, shipped_exits
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.exits.artifact import Exits

PROMPT = "The river rises in the mountains of the north and flows through three countries before it reaches the sea."


def seconds(model, inputs, tokens: int, custom=None) -> float:
    """Wall clock of ``tokens`` greedy tokens, never ending early."""
    start = time.perf_counter()
    extra = {} if custom is None else {"custom_generate": custom}
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **extra)
    return time.perf_counter() - start


def ratio(one, other, repeats: int) -> tuple[float, float, float]:
    """Median, minimum and maximum of one() / other() over neighbouring runs in alternating order."""
    one(), other()
    ratios = []
    for turn in range(repeats):
        if turn % 2:
            bottom, top = other(), one()
        else:
            top, bottom = one(), other()
        ratios.append(top / bottom)
    return statistics.median(ratios), min(ratios), max(ratios)


def measure(name: str, repeats: int, tokens: int) -> None:
    model, tokenizer = load(name)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    half = Exits.untrained(adapt(model), ("1/2",))
    never = EarlyExit(half, measure="state_similarity", threshold="never")

    def run(custom, new=tokens):
        return seconds(model, inputs, new, custom)

    def steps(custom):  # decode steps alone: subtract the prompt and the token it yields
        return run(custom) - run(custom, 1)

    rows = [("never exit / Hugging Face generate", ratio(lambda: run(never), lambda: run(None), repeats))]
    for policy in ("propagate", "copy" if "attention" in adapt(model).kinds else "stale"):
        always = EarlyExit(half, measure="state_similarity", threshold=0.0, policy=policy)
        label = f"all tokens leave at 1/2, {policy} / full depth"
        rows.append((label, ratio(lambda c=always: steps(c), lambda: steps(never), repeats)))
    trained = shipped(name)
    if trained is not None:
        judged = EarlyExit(trained, threshold=0.0)
        label = f"all tokens leave at 1/2, propagate, {trained.config.head} head / full depth"
        rows.append((label, ratio(lambda: steps(judged), lambda: steps(never), repeats)))
    for label, (median, low, high) in rows:
        print(f"{name:15s} {label:62s} {median:.3f}  ({low:.3f} to {high:.3f})", flush=True)


def shipped(name: str) -> Exits | None:
    """The Mamba heads that ship with the backbone at the paper's four depths, the first at 1/2; None without any."""
    folder = shipped_exits(name, "four/mamba")
    if folder is None:
        print(f"{name}: no shipped exits")
        return None
    return Exits.from_pretrained(folder)


def arguments(description: str | None, repeats: int, tokens: int) -> argparse.Namespace:
    """The command line, applied: threads set, the machine and the versions printed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=["transformer-ee", "mamba-ee"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    print(
        f"{platform.processor() or platform.machine()}, {args.threads} thread(s), torch {torch.__version__}, "
        f"transformers {transformers.__version__}, float32, batch 1, {args.tokens} new tokens, {args.repeats} pairs"
    )
    return args


def main() -> None:
    args = arguments(__doc__, repeats=15, tokens=96)
    for name in args.models:
        measure(name, args.repeats, args.tokens)


if __name__ == "__main__":
    main()
