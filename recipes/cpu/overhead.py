"""What the decode loop costs and saves on a CPU, against full depth and against Hugging Face, in paired runs.

    python recipes/cpu/overhead.py [--repeats 15] [--tokens 96] [--threads 1]

The aims: never exiting takes at most 1.05 of Hugging Face's own ``generate``; leaving every token at half depth under
``propagate`` takes at most 0.65 of full depth per new token. Medians of ratios of neighbouring runs. Time per token is
that of the decode steps: prompt and first token apart.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import conditions, decode_seconds, generate, parsed, parser
from dynamax_llm.backbones import adapt
from dynamax_llm.backbones.loading import REFERENCE_BACKBONES, load, shipped_exits
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.evaluation.common.timing import paired, seconds
from dynamax_llm.exits.artifact import Exits

PROMPT = "The river rises in the mountains of the north and flows through three countries before it reaches the sea."


def four_exits(name: str) -> Exits:
    """The Mamba heads that ship with the backbone at the paper's four depths, the first at 1/2."""
    return Exits.from_pretrained(shipped_exits(name, "four/mamba"))


def measure(name: str, repeats: int, tokens: int) -> None:
    model, tokenizer = load(name)
    ids, half = tokenizer(PROMPT, return_tensors="pt").input_ids, Exits.untrained(adapt(model), ("1/2",))
    never = EarlyExit(half, measure="state_similarity", threshold="never")

    def row(label: str, early: EarlyExit) -> None:
        def steps(decoding: EarlyExit) -> float:
            return decode_seconds(model, ids, tokens, decoding)

        print(f"{name:15s} {label:62s} {paired(lambda: steps(early), lambda: steps(never), repeats)}", flush=True)

    sides = [lambda e=early: seconds(lambda: generate(model, ids, tokens, e)) for early in (never, None)]
    print(f"{name:15s} {'never exit / Hugging Face generate':62s} {paired(*sides, repeats)}", flush=True)
    for policy in ("propagate", "copy" if "attention" in adapt(model).kinds else "stale"):
        always = EarlyExit(half, measure="state_similarity", threshold=0.0, policy=policy)
        row(f"all tokens leave at 1/2, {policy} / full depth", always)
    row("all tokens leave at 1/2, propagate, mamba head / full depth", EarlyExit(four_exits(name), threshold=0.0))


def arguments(doc: str | None, repeats: int, tokens: int) -> argparse.Namespace:
    """The command line; conditions are printed."""
    made = parser(doc)
    made.add_argument("--repeats", type=int, default=repeats)
    made.add_argument("--tokens", type=int, default=tokens)
    made.add_argument("--models", nargs="+", default=list(REFERENCE_BACKBONES))
    args = parsed(made)
    print(json.dumps(conditions()), "float32, batch 1")
    return args


def main() -> None:
    args = arguments(__doc__, repeats=15, tokens=96)
    for name in args.models:
        measure(name, args.repeats, args.tokens)


if __name__ == "__main__":
    main()
