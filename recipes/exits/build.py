"""Train every head on a backbone in one pass, with and without statistics, and compare them all with the measures.

    python recipes/exits/text.py --data DIR --out TEXT
    python recipes/exits/build.py train transformer-ee --text TEXT --out OUT [--tokens 4e6] [--device cuda]
    python recipes/exits/build.py compare transformer-ee --text TEXT --out OUT [--eval-tokens 100000] [--device cuda]
    python recipes/exits/build.py table transformer-ee --out OUT         # on a CPU: adds what a check takes there
    python recipes/exits/build.py ship transformer-ee --out OUT          # the heads that see h and statistics

OUT gets one folder of exits per head, `comparison.json` and `comparison.md`. Killed and called again, `train` resumes.
The comparison's text was seen neither by the backbones nor by the heads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shutil
import time
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.backbones.loading import REFERENCE_FOLDER, load
from dynamax_llm.evaluation.compare.heads import Candidate, Comparison, Outcome, check_microseconds, compare
from dynamax_llm.evaluation.compare.table import comparison_table
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import HEADS, ExitConfig, place_exits
from dynamax_llm.exits.features import MEASURES
from dynamax_llm.text.batches import Split, find_source, first_batches
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.trainer import train_many

#: The large shape each reference backbone stands for.
SCALE = {"transformer-ee": "mistral-7b", "mamba-ee": "codestral-mamba-7b"}
EVERYTHING = 1.0  # held-out share of a file that was held out as a whole


def configurations(n_layers: int, layers: str) -> dict[str, ExitConfig]:
    """Every head, seeing h and statistics, and h alone."""
    depths = place_exits(layers, n_layers)

    def config(head: str, *inputs: str) -> ExitConfig:
        return ExitConfig(depths, n_layers, head, inputs, width=None, candidates=64, shortlist="top")

    both = {head: config(head, "hidden", "signals") for head in HEADS}
    return both | {f"{head}-hidden": config(head, "hidden") for head in HEADS}


def candidates(backbone: Backbone, args: argparse.Namespace) -> list[Candidate]:
    names = configurations(backbone.n_layers, args.exits)
    trained = [Exits.from_pretrained(args.out / name) for name in names]
    plain = Exits.untrained(backbone, args.exits)
    return [Candidate(item.config.head, item) for item in trained] + [Candidate(n, plain, n) for n in MEASURES]


def train(backbone: Backbone, tokenizer, args: argparse.Namespace) -> None:
    tokens = int(args.tokens)
    settings = TrainSettings(
        max_tokens=tokens, batch_tokens=args.batch, seed=args.seed, patience=1000, eval_every=max(tokens // 5, 1)
    )
    source = find_source(str(args.text / "train.jsonl.xz"))
    start = time.time()
    wanted = configurations(backbone.n_layers, args.exits)
    wanted = {name: wanted[name] for name in args.names.split(",")} if args.names else wanted
    found = train_many(backbone, tokenizer, source, wanted, settings, args.out)
    for name, exits in found.items():
        held = exits.provenance["held_out"]
        print(f"{name:20s} depth {held['depth']:.3f} auroc {' '.join(f'{v:.3f}' for v in held['auroc'])}", flush=True)
    print(f"trained in {time.time() - start:.0f} s")


def run_comparison(backbone: Backbone, tokenizer, args: argparse.Namespace) -> None:
    source = find_source(str(args.text / "eval.jsonl.xz"))
    split = Split(source, tokenizer, True, EVERYTHING, 512, 8192, args.seed + 1)
    batches = first_batches(split, args.eval_tokens)
    start = time.time()
    results, oracle = compare(backbone, candidates(backbone, args), batches, args.agreement)
    shown = {
        "model": args.model,
        "commands": [
            f"python recipes/exits/build.py train {args.model} --text TEXT --out OUT --tokens {args.tokens:.0f} "
            f"--batch {args.batch} --exits {args.exits} --seed {args.seed}",
            f"python recipes/exits/build.py compare {args.model} --text TEXT --out OUT "
            f"--eval-tokens {args.eval_tokens} --agreement {args.agreement}",
        ],
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}",
        "device": torch.cuda.get_device_name() if backbone.device.type == "cuda" else "CPU",
        "tokens": sum(batch.tokens for batch in batches),
        "agreement": args.agreement,
        "exits": args.exits,
        "oracle_depth": oracle,
        "seconds": time.time() - start,
        "results": [_plain(item) for item in results],
    }
    (args.out / "comparison.json").write_text(json.dumps(shown, indent=1) + "\n")
    print(comparison_table(results, backbone.costs()))
    print(f"oracle {oracle:.3f}; compared in {shown['seconds']:.0f} s")


def _plain(item: Comparison) -> dict:
    shown = dataclasses.asdict(dataclasses.replace(item, candidate=None))
    return {**shown, "name": item.candidate.name, "inputs": item.candidate.inputs}


def table(backbone: Backbone, args: argparse.Namespace) -> None:
    shown = json.loads((args.out / "comparison.json").read_text())
    known = {(item.name, item.inputs): item for item in candidates(backbone, args)}
    times = {key: check_microseconds(backbone, item) for key, item in known.items()}
    results = []
    for entry in shown["results"]:
        entry["candidate"] = known[entry.pop("name"), entry.pop("inputs")]
        entry["points"] = [Outcome(**point) for point in entry["points"]]
        results.append(Comparison(**entry))
    commands = "\n".join(f"    {command}" for command in shown["commands"])
    text = (
        f"# {args.model}: judges at {100 * shown['agreement']:.0f} % agreement\n\n{commands}\n\n{shown['versions']}, "
        f"float32, {shown['device']}; {shown['tokens']:,} tokens of text that neither backbone nor heads had seen; "
        f"exits at {shown['exits']}; teacher-forced with exits on, `propagate`. µs: one token on a CPU, one thread, "
        f"least of 20 rounds. Oracle mean depth {shown['oracle_depth']:.3f}. Last column: counted reduction if tokens "
        f"left at the same shares of the depth of a {SCALE[args.model]} shape; a projection, not a measurement.\n\n"
        f"{comparison_table(results, backbone.costs(), times, SCALE[args.model])}\n"
    )
    (args.out / "comparison.md").write_text(text)
    print(text)


def ship(args: argparse.Namespace) -> None:
    """Put the heads that see h and statistics beside the shipped backbone."""
    for head in HEADS:
        target = REFERENCE_FOLDER / args.model / "exits" / "four" / head
        target.mkdir(parents=True, exist_ok=True)
        for name in ("exits.json", "exits.safetensors"):
            shutil.copyfile(args.out / head / name, target / name)
        print(f"{target}: {sum(file.stat().st_size for file in target.iterdir()):,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "compare", "table", "ship"))
    parser.add_argument("model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=5e6)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--names", help="train only these heads, say mlp,mamba-hidden (default: all eight)")
    parser.add_argument("--eval-tokens", type=int, default=100_000)
    parser.add_argument("--agreement", type=float, default=0.98)
    parser.add_argument("--exits", default="1/2,5/8,3/4,7/8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    if args.stage == "ship":
        ship(args)
        return
    model, tokenizer = load(args.model, dtype="float32", device_map=args.device)
    backbone = adapt(model)
    if args.stage == "table":
        table(backbone, args)
    else:
        (train if args.stage == "train" else run_comparison)(backbone, tokenizer, args)


if __name__ == "__main__":
    main()
