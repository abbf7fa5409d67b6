"""Exact state and exact output at the shapes of Mistral 7B and Codestral Mamba 7B, in the eager engine on a GPU.

    python recipes/policies/shapes.py [--shapes mistral-7b codestral-mamba-7b] [--tokens 64] [--repeats 3]

Weights are random (speed does not depend on them), bfloat16, batch 1. The layers after half of the depth add nothing
(``testing.zero_tail``), and every token leaves at half depth, judged by a cosine: acceptance is then 100 % but for
rounding, so what is timed is the most that leaving at half depth can give in this engine. Agreement of two bfloat16
runs of full depth that differ in nothing but the number of tokens per pass is what ``equal`` can be expected to show.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.evaluation.compare.shapes import SHAPES
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.testing import zero_tail

POLICIES = (("propagate", 16), ("defer", 8), ("defer", 16), ("verify", 8), ("verify", 16))
PROMPT_TOKENS = 64


def build(name: str, device: str, layers: int | None) -> torch.nn.Module:
    """A random model of this shape whose second half adds nothing."""
    config = copy.deepcopy(SHAPES.lookup(name))
    if layers is not None:
        config.num_hidden_layers = layers
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return zero_tail(model, adapt(model).n_layers // 2)


def seconds(model: torch.nn.Module, ids: torch.Tensor, tokens: int, early: EarlyExit | None) -> tuple[float, object]:
    """Wall clock of one greedy generation, prompt included."""
    extra = {} if early is None else {"custom_generate": early}
    torch.cuda.synchronize() if ids.is_cuda else None
    start = time.perf_counter()
    out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **extra)
    torch.cuda.synchronize() if ids.is_cuda else None
    return time.perf_counter() - start, out


def measure(name: str, args: argparse.Namespace) -> None:
    model = build(name, args.device, args.layers)
    backbone = adapt(model)
    ids = torch.randint(1, 32000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1)).to(args.device)
    exits = Exits.untrained(backbone, (backbone.n_layers // 2,))
    make = {"full depth, this engine": EarlyExit(exits, measure="state_similarity", threshold="never")}
    for policy, window in POLICIES:
        label = policy if policy == "propagate" else f"{policy}, window {window}"
        make[label] = EarlyExit(exits, measure="state_similarity", threshold=0.0, policy=policy, window=window)
    runs = {"transformers generate": None, **make}
    times: dict[str, list[float]] = {label: [] for label in runs}
    texts: dict[str, torch.Tensor] = {}
    notes: dict[str, str] = dict.fromkeys(runs, "")
    for turn in range(args.repeats + 1):  # the first turn warms up
        for label, early in runs.items():
            long, out = seconds(model, ids, args.tokens, early)
            short, _ = seconds(model, ids, 1, early)
            if turn:
                times[label].append((long - short) / (args.tokens - 1))
            if early is None:
                texts[label] = out
                continue
            texts[label] = out.sequences
            if out.verification is not None:
                notes[label] = f"{out.verification.acceptance_rate:.1%} accepted"
    full = statistics.median(times["full depth, this engine"])
    expected = texts["transformers generate"]
    for label, found in times.items():
        same = float((texts[label][:, PROMPT_TOKENS:] == expected[:, PROMPT_TOKENS:]).float().mean())
        middle = statistics.median(found)
        print(
            f"{name:20s} {label:26s} {1e3 * middle:7.2f} ms/token {1 / middle:6.1f} tokens/s "
            f"{full / middle:5.2f}x  equal tokens {same:.1%}  {notes[label]}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["mistral-7b", "codestral-mamba-7b"])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, help="fewer layers, to try this script where there is no room")
    args = parser.parse_args()
    logging.set_verbosity_error()
    place = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    print(
        f"{place}, torch {torch.__version__}, transformers {transformers.__version__}, bfloat16, batch 1, "
        f"{PROMPT_TOKENS}-token prompt, {args.tokens} new tokens, medians of {args.repeats}; eager, stock PyTorch "
        "layers (no mamba_ssm kernels); x: against full depth of this engine in the same run",
        flush=True,
    )
    for name in args.shapes:
        measure(name, args)
        if args.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
