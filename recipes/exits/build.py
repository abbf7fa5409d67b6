"""Train every head on a backbone in one pass, with and without statistics, and compare them all with the measures.

    python recipes/exits/build.py transformer-ee --data DIR --out OUT [--tokens 2e6] [--eval-tokens 60000]
    python recipes/exits/build.py mamba-ee --data DIR --out OUT

DIR holds text as `dynamax train --data` takes it. OUT gets one folder of exits per head, `comparison.md` and
`comparison.json`. Killed and called again, it resumes. Evaluation text is the held-out part (5 % of the documents, by
hash) that no head was trained on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.backbones.loading import load
from dynamax_llm.evaluation import Candidate, Comparison, compare, comparison_table
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import HEADS, ExitConfig, place_exits
from dynamax_llm.exits.confidence import MEASURES
from dynamax_llm.training.data import Split, find_source, first_batches
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.trainer import train_many


def configurations(n_layers: int, layers: str) -> dict[str, ExitConfig]:
    """Every head, seeing h and statistics, and h alone."""
    depths = place_exits(layers, n_layers)
    both = {head: ExitConfig(depths, n_layers, head=head) for head in HEADS}
    alone = {f"{head}-hidden": ExitConfig(depths, n_layers, head=head, inputs=("hidden",)) for head in HEADS}
    return both | alone


def record(backbone: Backbone, results: list[Comparison], oracle: float, args: argparse.Namespace) -> tuple[str, dict]:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    shown = {
        "command": f"python recipes/exits/build.py {args.model} --data DIR --out OUT --tokens {args.tokens:.0f} "
        f"--eval-tokens {args.eval_tokens} --exits {args.exits} --seed {args.seed}",
        "versions": versions,
        "oracle_depth": oracle,
        "results": [
            {**dataclasses.asdict(dataclasses.replace(item, candidate=None)), "name": item.candidate.name,
             "inputs": item.candidate.inputs}
            for item in results
        ],
    }  # fmt: skip
    text = (
        f"# {args.model}: judges at {100 * args.agreement:.0f} % agreement\n\n`{shown['command']}`\n\n{versions}, "
        f"float32, {args.threads} thread(s). On-policy, teacher-forced, `propagate`; exits at {args.exits}; "
        f"{args.eval_tokens:,} held-out tokens. Oracle mean depth {oracle:.3f}.\n\n"
        f"{comparison_table(results, backbone.costs())}\n"
    )
    return text, shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=2e6)
    parser.add_argument("--eval-tokens", type=int, default=60_000)
    parser.add_argument("--agreement", type=float, default=0.98)
    parser.add_argument("--exits", default="1/2,5/8,3/4,7/8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    started = time.time()
    model, tokenizer = load(args.model)
    backbone = adapt(model)
    settings = TrainSettings(max_tokens=int(args.tokens), seed=args.seed, patience=args.patience)
    source = find_source(args.data)
    exits = train_many(backbone, tokenizer, source, configurations(backbone.n_layers, args.exits), settings, args.out)
    print(f"trained in {time.time() - started:.0f} s; comparing", file=sys.stderr, flush=True)
    candidates = [Candidate(item.config.head or "", item) for item in exits.values()]
    plain = Exits.untrained(backbone, args.exits)
    candidates += [Candidate(name, plain, measure=name) for name in MEASURES]
    split = Split(source, tokenizer, True, settings.held_out, settings.sequence, settings.batch_tokens, args.seed + 1)
    batches = first_batches(split, args.eval_tokens)
    results, oracle = compare(backbone, candidates, batches, args.agreement)
    text, shown = record(backbone, results, oracle, args)
    (args.out / "comparison.md").write_text(text)
    (args.out / "comparison.json").write_text(json.dumps(shown, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
