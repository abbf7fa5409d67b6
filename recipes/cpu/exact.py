"""What exact state and exact output cost and save on a CPU where every draft is right: zero-tail backbones.

    python recipes/cpu/exact.py [--repeats 9] [--tokens 97] [--threads 1]

The layers after half of the depth add nothing (``testing.zero_tail``), so leaving there gives exactly the full model's
token while the full model costs what it always costs. Bar 3 of issue 3: ``verify`` with the exit at half depth runs at
least 1.25 times as fast as full depth. Medians of ratios of neighbouring runs; prompt and first token apart.
"""

from __future__ import annotations

import torch
from overhead import PROMPT, arguments, ratio, seconds, shipped

from dynamax_llm.backbones import adapt
from dynamax_llm.backbones.loading import load
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.testing import zero_tail

WINDOWS = (4, 8, 16)


def measure(name: str, repeats: int, tokens: int) -> None:
    model, tokenizer = load(name)
    trained = shipped(name)
    inputs, half = tokenizer(PROMPT, return_tensors="pt"), adapt(model).n_layers // 2
    zero_tail(model, half)
    # The shipped head judges the first exit with all its work; its verdict does not matter at threshold 0.
    free, judged = Exits.untrained(adapt(model), (half,)), None
    if trained is not None and trained.heads is not None:
        assert trained.config.layers[0] == half
        judged = Exits.of(adapt(model), ExitConfig.from_json(trained.config.to_json()), trained.heads)
    never = EarlyExit(free, measure="state_similarity", threshold="never")

    def steps(custom: EarlyExit) -> float:
        return seconds(model, inputs, tokens, custom) - seconds(model, inputs, 1, custom)

    def row(label: str, custom: EarlyExit) -> None:
        out = model.generate(**inputs, custom_generate=custom, max_new_tokens=tokens, min_new_tokens=tokens)
        expected = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        rate = "" if out.verification is None else f", {out.verification.acceptance_rate:.0%} accepted"
        same = "same text" if torch.equal(out.sequences, expected) else "OTHER TEXT"
        median, low, high = ratio(lambda: steps(never), lambda: steps(custom), repeats)
        print(f"{name:15s} {label:38s} {median:.2f}x ({low:.2f} to {high:.2f})  {same}{rate}", flush=True)

    for policy, windows in (("propagate", (16,)), ("defer", (16,)), ("verify", WINDOWS)):
        for window in windows:
            label = policy if policy == "propagate" else f"{policy}, window {window}"
            row(label, EarlyExit(free, measure="state_similarity", threshold=0.0, policy=policy, window=window))
    if judged is not None:
        row("verify, window 16, Mamba head", EarlyExit(judged, threshold=0.0, policy="verify"))


def main() -> None:
    args = arguments(__doc__, repeats=9, tokens=97)
    print("speed-up over full depth of the same engine, zero tail after half of the layers")
    for name in args.models:
        measure(name, args.repeats, args.tokens)


if __name__ == "__main__":
    main()
