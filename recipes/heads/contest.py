"""Which exit head is best? Same text, same budget, same settings for each, several seeds, and all the baselines.

    python recipes/exits/text.py --data DIR --out TEXT
    python recipes/heads/contest.py train transformer-ee --text TEXT --out OUT [--device cuda] [--tokens 4e6]
    python recipes/heads/contest.py judge transformer-ee --text TEXT --out OUT [--device cuda]
    python recipes/heads/contest.py both transformer-ee --text TEXT --out OUT --runs seed0 fourteen seed1 seed2
    python recipes/heads/contest.py generate transformer-ee --text TEXT --out OUT       # free text, added to the JSON
    python recipes/heads/contest.py documents transformer-ee --text TEXT [--eval-tokens 6e4]   # what is judged on
    python recipes/heads/contest.py ship transformer-ee --out OUT
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
import lzma
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from dynamax_llm.evaluation.compare.contest import TARGETS, Contest, Points, Standing
from tabulated import table
from transformers.utils import logging

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.backbones.loading import REFERENCE_FOLDER, load
from dynamax_llm.decoding.loop import EarlyExit
from dynamax_llm.evaluation.common.bootstrap import interval
from dynamax_llm.evaluation.compare.heads import Candidate
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import HEADS, ExitConfig, place_exits
from dynamax_llm.exits.features import MEASURES
from dynamax_llm.metrics import rouge_l
from dynamax_llm.text.batches import Batch, find_source, pad
from dynamax_llm.training.presets import PRESETS
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.trainer import train_many

STAGES = ("train", "judge", "both", "generate", "documents", "merge", "table", "ship")
SIX = "1/4,3/8,1/2,5/8,3/4,7/8"
FOURTEEN = ",".join(f"{share}/16" for share in range(2, 16))
ROW = 512
#: Free generation: prompts, their tokens, new tokens.
PROMPTS, PROMPT, NEW = 48, 64, 64


def variants(n_layers: int, exits: str) -> dict[str, ExitConfig]:
    """Every head on the default inputs, at widths that make them cost the same; MLP and Mamba head on h alone too."""
    layers = place_exits(exits, n_layers)
    found = {head: ExitConfig(layers, n_layers, head=head) for head in HEADS}
    alone = {f"{head}-hidden": ExitConfig(layers, n_layers, head=head, inputs=("hidden",)) for head in ("mlp", "mamba")}
    return found | alone


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
    every = variants(backbone.n_layers, SIX)
    seeds = chosen({head: every[head] for head in HEADS}, args.heads)
    runs: dict[str, tuple[dict[str, ExitConfig], TrainSettings]] = {}
    for seed in args.seeds:
        settings = TrainSettings(max_tokens=tokens, batch_tokens=args.batch, seed=seed, **shared)
        # What h alone is worth is asked once.
        runs[f"seed{seed}"] = (chosen(every, args.heads) if seed == args.seeds[0] else seeds, settings)
        if seed == args.seeds[0]:
            fourteen = variants(backbone.n_layers, FOURTEEN)
            runs["fourteen"] = ({head: fourteen[head] for head in ("mlp", "mamba")}, settings)
            runs["again"] = ({"mamba": every["mamba"]}, dataclasses.replace(settings, on_policy=0.5))
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


def chosen_texts(tokenizer, path: Path, most: int) -> Iterator[tuple[str, list[int]]]:
    """Documents that are long enough and their first tokens, until there are ``most``."""
    total = 0
    for text in find_source(str(path)).documents(seed=0):
        ids = tokenizer(text, verbose=False)["input_ids"][:ROW]
        if len(ids) >= 2 * PROMPT and total < most:
            yield text, ids
            total += len(ids)


def documents(tokenizer, path: Path, most: int) -> list[Batch]:
    """The first tokens of every document, one a row, until there are ``most``."""
    rows = sorted((ids for _, ids in chosen_texts(tokenizer, path, most)), key=len)
    return [pad(rows[start : start + 16]) for start in range(0, len(rows), 16)]


def tell(tokenizer, args: argparse.Namespace) -> None:
    """What is judged on: tokens by source."""
    path = args.text / "eval.jsonl.xz"
    with lzma.open(path, "rt", encoding="utf-8") as file:
        source = {row["text"]: row["source"] for row in map(json.loads, file)}
    found: Counter[str] = Counter()
    for text, ids in chosen_texts(tokenizer, path, int(args.eval_tokens)):
        found[source[text]] += len(ids)
    total = found.total()
    print(f"{total:,} tokens: " + ", ".join(f"{name} {count / total:.1%}" for name, count in found.most_common()))


def both(backbone: Backbone, tokenizer, args: argparse.Namespace) -> None:
    """Train and judge one of ``--runs`` after another: cut off, what was judged stands."""
    shown: list[dict] = []
    if args.seconds is not None:
        args.tokens = min(args.tokens, budget(backbone, tokenizer, args))
    for run in args.runs:
        one = argparse.Namespace(**{**vars(args), "runs": [run]})
        train(backbone, tokenizer, one)
        estimator(backbone, tokenizer, one, shown)


def budget(backbone: Backbone, tokenizer, args: argparse.Namespace) -> float:
    """Tokens that the first seed's heads train on in ``--seconds`` here, in round hundred thousands."""
    source = find_source(str(args.text / "train.jsonl.xz"))
    configs = chosen(variants(backbone.n_layers, SIX), args.heads)
    took = []
    with TemporaryDirectory() as folder:
        for tokens in (4 * args.batch, 24 * args.batch):  # the first pays for what is set up once
            settings = TrainSettings(max_tokens=tokens, batch_tokens=args.batch, eval_tokens=4000, quiet=True)
            start = time.monotonic()
            train_many(backbone, tokenizer, source, configs, settings, Path(folder) / str(tokens))
            took.append(time.monotonic() - start)
    rate = 20 * args.batch / max(took[1] - took[0], 1e-3)
    print(f"{rate:,.0f} tokens/s", flush=True)
    return max(1e5, args.seconds * rate // 1e5 * 1e5)


def estimator(backbone: Backbone, tokenizer, args: argparse.Namespace, shown: list[dict] | None = None) -> None:
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
        seen = contest.exit_batches(Candidate("", widest))
        for name, item in exits.items():
            stand(Candidate(name, item), seen, run)
            if run == f"seed{args.seeds[0]}" and name == "mamba":
                stand(
                    Candidate("mamba, thresholds not net", dataclasses.replace(item, drift_penalty={})), seen, "gross"
                )
        if run == f"seed{args.seeds[0]}":
            plainest = Exits.untrained(backbone, SIX)
            unread = contest.exit_batches(Candidate("", plainest, "softmax_margin"))
            for name in MEASURES:
                stand(Candidate(name, plainest, name), unread, "measure")
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
            f"python recipes/heads/contest.py {stage} {args.model} --text TEXT --out OUT --tokens {args.tokens:.0f} "
            f"--batch {args.batch} --seeds {' '.join(map(str, args.seeds))} --eval-tokens {args.eval_tokens:.0f}"
            for stage in ("train", "judge")
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
        "check_macs": candidate.estimator.macs(0),
    }


def at(points: Points) -> dict[str, list[float]]:
    found = {str(target): points.at(target) for target in TARGETS}
    return {target: [value.value, value.low, value.high] for target, value in found.items()}


def generate(backbone: Backbone, tokenizer, args: argparse.Namespace) -> None:
    """Free text of the first seed's heads and of the margin rule, added to OUT/MODEL.json.

    Each at the thresholds that gave it 98 % agreement, under ``propagate`` and ``defer``.
    """
    place = args.out / f"{args.model}.json"
    facts = json.loads(place.read_text())
    batches = documents(tokenizer, args.text / "eval.jsonl.xz", int(args.eval_tokens))
    ids = torch.stack([ids[:PROMPT] for batch in batches for ids in batch.ids][-PROMPTS:]).to(backbone.device)
    run = f"seed{args.seeds[0]}"
    for item in facts["standings"]:
        if item["run"] == run and item["name"] in HEADS:
            exits, measure = Exits.from_pretrained(args.out / args.model / run / item["name"]), None
        elif item["name"] == "softmax_margin":
            exits, measure = Exits.untrained(backbone, SIX), item["name"]
        else:
            continue
        item["generation"] = {}
        for policy, name in (("propagate", "threshold"), ("defer", "threshold_intact")):
            early = EarlyExit(exits, measure=measure, threshold=min(item[name]["0.98"], 1.0), policy=policy)
            item["generation"][policy] = compared(backbone, ids, early)
        print(item["name"], item["generation"], flush=True)
    place.write_text(json.dumps(facts, indent=1) + "\n")


@torch.no_grad()
def compared(backbone: Backbone, ids: torch.Tensor, early: EarlyExit) -> dict:
    """Greedy text after ids (B, T), with exits, beside the full model's."""
    setting = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    setting["attention_mask"] = torch.ones_like(ids)
    whole = backbone.model.generate(ids, **setting)[:, PROMPT:]
    out = backbone.model.generate(ids, custom_generate=early, **setting)
    mine = out.sequences[:, PROMPT:]
    pairs = list(zip(mine, whole, strict=True))
    scores = [rouge_l(*(" ".join(map(str, row.tolist())) for row in pair)) for pair in pairs]
    return {
        "rouge_l": interval(scores).model_dump(),
        "depth": interval((out.exit_layers.double().mean(1) / backbone.n_layers).tolist()).model_dump(),
        "identical": sum(torch.equal(*pair) for pair in pairs) / len(pairs),
    }


def merge(args: argparse.Namespace) -> None:
    """OUT/*/MODEL.json, judged in several processes, as one OUT/MODEL.json."""
    parts = [json.loads(path.read_text()) for path in sorted(args.out.glob(f"*/{args.model}.json"))]
    whole = {**parts[0], "standings": [item for part in parts for item in part["standings"]]}
    (args.out / f"{args.model}.json").write_text(json.dumps(whole, indent=1) + "\n")


def ship(args: argparse.Namespace) -> None:
    """The first seed's heads become those that travel with the package."""
    for head in HEADS:
        found = args.out / args.model / f"seed{args.seeds[0]}" / head
        shutil.copytree(found, REFERENCE_FOLDER / args.model / "exits" / head, dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("model", help="a shipped backbone, or for table the JSON file")
    parser.add_argument("--text", type=Path, default=Path("TEXT"))
    parser.add_argument("--out", type=Path, default=Path("OUT"))
    parser.add_argument("--tokens", type=float, default=4e6)
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--eval-tokens", type=float, default=8e4, help="that judge looks at")
    parser.add_argument("--held-out", type=float, default=2e4, help="tokens that training looks at")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", default=[], help="only these: seed0, …, fourteen, twelve, again, paper")
    parser.add_argument("--heads", nargs="+", default=[], help="only these of the seeds' and fourteen's heads")
    parser.add_argument("--seconds", type=float, help="of training, by the speed here: fewer tokens")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.stage == "merge":
        merge(args)
        return
    if args.stage == "ship":
        ship(args)
        return
    if args.stage == "table":
        print(table(json.loads(Path(args.model).read_text())))
        return
    logging.set_verbosity_error()
    model, tokenizer = load(args.model, dtype="float32", device_map=args.device)
    if args.stage == "documents":
        tell(tokenizer, args)
        return
    {"train": train, "judge": estimator, "both": both, "generate": generate}[args.stage](adapt(model), tokenizer, args)


if __name__ == "__main__":
    main()
