"""Which exit head is best? Same text, same budget, same settings for each, several seeds, and all the baselines.

    python recipes/exits/text.py --data DIR --out TEXT
    python recipes/heads/contest.py train transformer-ee --text TEXT --out OUT [--device cuda] [--tokens 4e6]
    python recipes/heads/contest.py judge transformer-ee --text TEXT --out OUT [--device cuda]
    python recipes/heads/contest.py both transformer-ee --text TEXT --out OUT --runs seed0 fourteen seed1 seed2
    python recipes/heads/contest.py table OUT/transformer-ee.json
    TEXT=TEXT OUT=OUT bash recipes/heads/gpu.sh                # all of it, both backbones side by side

OUT/MODEL gets one folder of exits per head and seed, OUT/MODEL.json every measured point. Killed and called again,
`train` resumes; `both` judges each run when it is trained, so that a deadline costs only the last. The judged text
was seen neither by the backbones nor by the heads; one document is one row of at most 512 tokens, so that intervals are
over documents.
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
from tabulated import table
from transformers.utils import logging

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.backbones.loading import load
from dynamax_llm.decoding.loop import EarlyExit
from dynamax_llm.evaluation.bootstrap import interval
from dynamax_llm.evaluation.compare import Candidate
from dynamax_llm.evaluation.contest import TARGETS, Contest, Points, Standing
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence import MEASURES
from dynamax_llm.exits.config import HEADS, ExitConfig, place_exits
from dynamax_llm.metrics import rouge_l
from dynamax_llm.training.data import Batch, find_source, pad
from dynamax_llm.training.presets import PRESETS
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.trainer import train_many

SIX = "1/4,3/8,1/2,5/8,3/4,7/8"
SHARES = (4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
TWELVE = ",".join(f"{share}/16" for share in SHARES)
FOURTEEN = "1/8,3/16," + TWELVE
ROW = 512
#: Free generation: prompts, their tokens, new tokens.
PROMPTS, PROMPT, NEW = 48, 64, 64


def variants(n_layers: int, exits: str) -> dict[str, ExitConfig]:
    """Every head on the default inputs; and the Mamba head without the tokens' rows, and on h alone."""
    layers = place_exits(exits, n_layers)
    found = {head: ExitConfig(layers, n_layers, head=head) for head in HEADS}
    found["mamba-statistics"] = ExitConfig(layers, n_layers, head="mamba", inputs=("hidden", "signals"))
    found["mamba-hidden"] = ExitConfig(layers, n_layers, head="mamba", inputs=("hidden",))
    return found


def chosen(configs: dict[str, ExitConfig], heads: list[str]) -> dict[str, ExitConfig]:
    """Those named in ``heads``; all of them where none is."""
    return {name: config for name, config in configs.items() if not heads or name in heads}


def train(backbone: Backbone, tokenizer, args: argparse.Namespace) -> None:
    source = find_source(str(args.text / "train.jsonl.xz"))
    tokens = int(args.tokens)
    shared = {
        "eval_every": max(tokens // 3, 1),
        "eval_tokens": int(args.held_out),
        "patience": 1000,
        "quiet": not sys.stderr.isatty(),
    }
    configs = chosen(variants(backbone.n_layers, SIX), args.heads)
    fourteen = chosen(variants(backbone.n_layers, FOURTEEN), args.heads or ["mlp", "mamba"])
    fourteen = {head: fourteen[head] for head in ("mlp", "mamba") if head in fourteen}
    runs: dict[str, tuple[dict[str, ExitConfig], TrainSettings]] = {}
    for seed in args.seeds:
        settings = TrainSettings(max_tokens=tokens, batch_tokens=args.batch, seed=seed, **shared)
        runs[f"seed{seed}"] = (configs, settings)
        if seed == args.seeds[0]:
            mamba = {"mamba": variants(backbone.n_layers, SIX)["mamba"]}
            runs["fourteen"] = (fourteen, settings)
            runs["twelve"] = ({"mamba": variants(backbone.n_layers, TWELVE)["mamba"]}, settings)
            runs["again"] = (mamba, dataclasses.replace(settings, on_policy=0.5))
    preset = PRESETS.lookup("dynamax-paper")
    heads = {head: preset.exit_config(backbone.n_layers, head=head) for head in ("linear", "transformer", "mamba")}
    sequence = min(4096, backbone.max_positions() or 4096)
    runs["paper"] = (heads, preset.train_settings(**{**shared, "sequence": sequence, "batch_tokens": sequence}))
    for name in args.runs or runs:
        start = time.time()
        found = train_many(backbone, tokenizer, source, runs[name][0], runs[name][1], args.out / args.model / name)
        for head, exits in found.items():
            held = exits.provenance["held_out"]
            print(f"{name:8s} {head:18s} held-out depth {held['depth']:.3f}, {time.time() - start:.0f} s", flush=True)


def documents(tokenizer, path: Path, most: int) -> list[Batch]:
    """The first tokens of every document, one a row, until there are ``most``."""
    rows, total = [], 0
    for text in find_source(str(path)).documents(seed=0):
        ids = tokenizer(text, verbose=False)["input_ids"][:ROW]
        if len(ids) >= 2 * PROMPT and total < most:
            rows.append(ids)
            total += len(ids)
    rows.sort(key=len)
    return [pad(rows[start : start + 16]) for start in range(0, len(rows), 16)]


def both(backbone: Backbone, tokenizer, args: argparse.Namespace) -> None:
    """Train and judge one of ``--runs`` after another: cut off, what was judged stands."""
    shown: list[dict] = []
    for run in args.runs:
        one = argparse.Namespace(**{**vars(args), "runs": [run]})
        train(backbone, tokenizer, one)
        judge(backbone, tokenizer, one, shown)


def judge(backbone: Backbone, tokenizer, args: argparse.Namespace, shown: list[dict] | None = None) -> None:
    contest = Contest(backbone, documents(tokenizer, args.text / "eval.jsonl.xz", int(args.eval_tokens)))
    folder, shown = args.out / args.model, [] if shown is None else shown
    start = time.time()

    def stand(candidate: Candidate, seen, run: str) -> Standing:
        standing = contest.stand(candidate, seen)
        shown.append({"run": run, **plain(standing)})
        print(
            f"{run:8s} {candidate.name:18s} {shown[-1]['intact']['0.98']}", f"{time.time() - start:.0f} s", flush=True
        )
        return standing

    places = sorted(path for path in folder.glob("*/*") if (path / "exits.json").is_file())
    by_run: dict[str, list[Path]] = {}
    for place in places:
        by_run.setdefault(place.parent.name, []).append(place)
    for run, found in by_run.items():
        if args.runs and run not in args.runs:
            continue
        exits = {place.name: Exits.from_pretrained(place) for place in found}
        widest = max(exits.values(), key=lambda item: len(item.config.inputs))  # what it sees, the others see too
        seen = contest.harvests(Candidate("", widest))
        for name, item in exits.items():
            standing = stand(Candidate(name, item), seen, run)
            if run == f"seed{args.seeds[0]}" and name == "mamba":
                uniform = dataclasses.replace(item, disturbance={})
                stand(Candidate("mamba, thresholds not net", uniform), seen, "gross")
            if args.generation and run == f"seed{args.seeds[0]}" and name in HEADS:
                shown[-1 if name != "mamba" else -2]["generation"] = generate(backbone, contest, standing)
        if run == f"seed{args.seeds[0]}":
            plainest = Exits.untrained(backbone, SIX)
            unread = contest.harvests(Candidate("", plainest, "softmax_margin"))
            for name in MEASURES:
                standing = stand(Candidate(name, plainest, name), unread, "measure")
                if args.generation and name == "softmax_margin":
                    shown[-1]["generation"] = generate(backbone, contest, standing)
            shown.append({"run": "static", "name": "static depth", "propagate": at(contest.static(plainest))})
        record(args, backbone, contest, shown, time.time() - start)


def record(args: argparse.Namespace, backbone: Backbone, contest: Contest, shown: list, seconds: float) -> None:
    """What was found so far, in OUT/MODEL.json."""
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    facts = {
        "model": args.model,
        "commands": [
            f"python recipes/heads/contest.py train {args.model} --text TEXT --out OUT --tokens {args.tokens:.0f} "
            f"--batch {args.batch} --seeds {' '.join(map(str, args.seeds))}",
            f"python recipes/heads/contest.py judge {args.model} --text TEXT --out OUT --eval-tokens "
            f"{args.eval_tokens:.0f}",
        ],
        "versions": versions,
        "device": torch.cuda.get_device_name() if backbone.device.type == "cuda" else "CPU",
        "documents": len(contest.tokens),
        "tokens": int(contest.tokens.sum()),
        "parameters": sum(parameter.numel() for parameter in backbone.model.parameters()),
        "layer_macs": backbone.costs().layers[0].layer,
        "readout_macs": backbone.costs().readout,
        "seconds": round(seconds),
        "standings": shown,
    }
    (args.out / f"{args.model}.json").write_text(json.dumps(facts, indent=1) + "\n")


def plain(standing: Standing) -> dict:
    """A standing as JSON types."""
    candidate = standing.candidate
    heads = candidate.exits.heads if candidate.measure is None else None
    return {
        "name": candidate.name,
        "inputs": candidate.inputs,
        "exits": list(candidate.exits.config.layers),
        "oracle": standing.oracle,
        "auroc": standing.auroc,
        "average_precision": standing.average_precision,
        "calibration_error": standing.calibration_error,
        "intact": at(standing.intact),
        "propagate": at(standing.propagate),
        "reduction": {str(target): standing.propagate.reduction(target) for target in TARGETS},
        "threshold": {str(target): standing.propagate.threshold(target) for target in TARGETS},
        "threshold_intact": {str(target): standing.intact.threshold(target) for target in TARGETS},
        "parameters": 0 if heads is None else sum(parameter.numel() for parameter in heads.parameters()),
        "check_macs": candidate.judge.macs(0),
    }


def at(points: Points) -> dict[str, list[float]]:
    found = {str(target): points.at(target) for target in TARGETS}
    return {target: [value.value, value.low, value.high] for target, value in found.items()}


@torch.no_grad()
def generate(backbone: Backbone, contest: Contest, standing: Standing) -> dict:
    """Free greedy text at the threshold that gave 98 % agreement, against the full model's: under each policy."""
    rows = [ids[:PROMPT] for batch in contest.batches for ids in batch.ids][-PROMPTS:]
    ids = torch.stack(rows).to(backbone.device)
    setting = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    model, candidate = backbone.model, standing.candidate
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), **setting)[:, PROMPT:]
    found = {}
    for policy, points in (("propagate", standing.propagate), ("defer", standing.intact)):
        early = EarlyExit(
            candidate.exits, measure=candidate.measure, threshold=min(points.threshold(0.98), 1.0), policy=policy
        )
        out = model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=early, **setting)
        mine = out.sequences[:, PROMPT:]
        scores = [
            rouge_l(*(" ".join(map(str, row.tolist())) for row in pair)) for pair in zip(mine, whole, strict=True)
        ]
        depth = (out.exit_layers.double().mean(1) / backbone.n_layers).tolist()
        found[policy] = {
            "rouge_l": interval(scores).model_dump(),
            "depth": interval(depth).model_dump(),
            "identical": sum(torch.equal(*pair) for pair in zip(mine, whole, strict=True)) / len(mine),
        }
    return found


def merge(args: argparse.Namespace) -> None:
    """OUT/*/MODEL.json, judged in several processes, as one OUT/MODEL.json."""
    parts = [json.loads(path.read_text()) for path in sorted(args.out.glob(f"*/{args.model}.json"))]
    whole = {**parts[0], "standings": [item for part in parts for item in part["standings"]]}
    (args.out / f"{args.model}.json").write_text(json.dumps(whole, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "judge", "both", "merge", "table"))
    parser.add_argument("model", help="a shipped backbone, or for table the JSON file")
    parser.add_argument("--text", type=Path, default=Path("TEXT"))
    parser.add_argument("--out", type=Path, default=Path("OUT"))
    parser.add_argument("--tokens", type=float, default=4e6)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--eval-tokens", type=float, default=8e4, help="that judge looks at")
    parser.add_argument("--held-out", type=float, default=2e4, help="tokens that training looks at")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", default=[], help="only these: seed0, …, fourteen, twelve, again, paper")
    parser.add_argument("--heads", nargs="+", default=[], help="only these of the seeds' and fourteen's heads")
    parser.add_argument("--generation", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.stage == "merge":
        merge(args)
        return
    if args.stage == "table":
        print(table(json.loads(Path(args.model).read_text())))
        return
    logging.set_verbosity_error()
    model, tokenizer = load(args.model, dtype="float32", device_map=args.device)
    {"train": train, "judge": judge, "both": both}[args.stage](adapt(model), tokenizer, args)


if __name__ == "__main__":
    main()
