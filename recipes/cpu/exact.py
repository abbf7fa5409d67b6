"""What exact state and exact output cost and save on a CPU where every draft is right: zero-tail backbones.

    python recipes/cpu/exact.py [--repeats 9] [--tokens 97] [--threads 1]

The layers after half of the depth add nothing (``testing.zero_tail``), so leaving there gives exactly the full model's
token while the full model costs what it always costs. The aim: ``verify`` with the exit at half depth runs at least
1.25 times as fast as full depth. Medians of ratios of neighbouring runs; prompt and first token apart.
"""

from __future__ import annotations

import torch
from overhead import PROMPT, arguments, decode_seconds, four_exits, generate

from dynamax_llm.backbones import adapt
from dynamax_llm.backbones.loading import load
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.evaluation.common.timing import paired
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.testing import zero_tail

RUNS = (("propagate", 16), ("defer", 16), ("verify", 4), ("verify", 8), ("verify", 16))


def measure(name: str, repeats: int, tokens: int) -> None:
    model, tokenizer = load(name)
    ids, half = tokenizer(PROMPT, return_tensors="pt").input_ids, adapt(model).n_layers // 2
    zero_tail(model, half)
    free, trained = Exits.untrained(adapt(model), (half,)), four_exits(name)
    # The shipped head decides at the first exit with all its work; at threshold 0 its confidence does not matter.
    heads = Exits.of(adapt(model), ExitConfig.from_json(trained.config.to_json()), trained.heads)
    never = EarlyExit(free, measure="state_similarity", threshold="never")
    settings = {
        policy if policy == "propagate" else f"{policy}, window {window}": EarlyExit(
            free, measure="state_similarity", threshold=0.0, policy=policy, window=window
        )
        for policy, window in RUNS
    }
    settings["verify, window 16, Mamba head"] = EarlyExit(heads, threshold=0.0, policy="verify")
    expected = generate(model, ids, tokens)
    for label, early in settings.items():
        out = generate(model, ids, tokens, early)
        rate = "" if out.verification is None else f", {out.verification.acceptance_rate:.0%} accepted"
        same = "same text" if torch.equal(out.sequences, expected) else "OTHER TEXT"
        sides = [lambda e=decoding: decode_seconds(model, ids, tokens, e) for decoding in (never, early)]
        found = paired(*sides, repeats)
        speed = f"{found.median:.2f}x ({found.least:.2f} to {found.greatest:.2f})"
        print(f"{name:15s} {label:38s} {speed}  {same}{rate}", flush=True)


def main() -> None:
    args = arguments(__doc__, repeats=9, tokens=97)
    print("speed-up over full depth of the same engine, zero tail after half of the layers")
    for name in args.models:
        measure(name, args.repeats, args.tokens)


if __name__ == "__main__":
    main()
