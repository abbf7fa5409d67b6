"""Which exit head is best? Same text, same budget, same settings for each, several seeds, and all the baselines.

    python recipes/texts.py heads --data DIR --out TEXT --megabytes 64
    python recipes/heads/compare.py both transformer-ee --text TEXT --out OUT --runs seed0 seed1 seed2
    python recipes/heads/compare.py train transformer-ee --text TEXT --out OUT [--device cuda] [--tokens 4e6]
    python recipes/heads/compare.py evaluate transformer-ee --text TEXT --out OUT [--device cuda]
    python recipes/heads/compare.py generate transformer-ee --text TEXT --out OUT       # free text, added to the JSON
    python recipes/heads/compare.py documents transformer-ee --text TEXT [--eval-tokens 6e4]   # what is evaluated on
    python recipes/heads/compare.py checks transformer-ee --out OUT                     # what one check takes here
    python recipes/heads/compare.py table transformer-ee --out OUT                      # OUT/MODEL.json as Markdown
    python recipes/heads/compare.py ship transformer-ee --out OUT                       # the first run's heads

OUT/MODEL gets one folder of exits per run and head, OUT/MODEL.json one row per setting. Killed and called again,
`train` resumes; `both` evaluates each run when it is trained, so that a deadline costs only the last. The text was seen
neither by the backbones nor by the heads; one document is one row of at most 512 tokens, so that intervals are over
documents. `--exits 1/2,5/8,3/4,7/8` compares at the paper's depths; its heads ship as `four`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import bootstrap, conditions, generate, markdown, median_seconds, parsed, parser, write_json
from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.backbones.loading import REFERENCE_FOLDER, load
from dynamax_llm.decoding.generate import EarlyExit
from dynamax_llm.evaluation.common.random_models import costs_at_shape, projected_reduction
from dynamax_llm.evaluation.compare import HeadComparison, HeadSetting, comparison_table
from dynamax_llm.evaluation.compare.heads import depth_at_targets
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import HEADS, ExitConfig, place_exits
from dynamax_llm.exits.features import exit_features
from dynamax_llm.exits.registries import MEASURES
from dynamax_llm.metrics import rouge_l
from dynamax_llm.text.batches import Batch, find_source, pad
from dynamax_llm.text.sources import json_records
from dynamax_llm.training.presets import PRESETS
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.trainer import train_many

SIX, FOURTEEN = "1/4,3/8,1/2,5/8,3/4,7/8", ",".join(f"{share}/16" for share in range(2, 16))
#: Tokens of a document; free generation: prompts, their tokens, new tokens.
ROW, PROMPTS, PROMPT, NEW = 512, 48, 64, 64
#: The large shape that each reference backbone stands for, and a target agreement.
SCALE, TARGET = {"transformer-ee": "mistral-7b", "mamba-ee": "codestral-mamba-7b"}, 0.98
Runs = dict[str, tuple[dict[str, ExitConfig], TrainSettings]]


def settings_of(n_layers: int, exits: str, chosen: list[str]) -> dict[str, ExitConfig]:
    """Heads on the default inputs, at widths that make them cost the same, and on h alone ("mlp-hidden"), by name."""
    layers = place_exits(exits, n_layers)
    found = {head: ExitConfig(layers, n_layers, head=head) for head in HEADS}
    found |= {f"{head}-hidden": ExitConfig(layers, n_layers, head=head, inputs=("hidden",)) for head in HEADS}
    return {name: found[name] for name in chosen}


def runs_of(backbone: Backbone, args: argparse.Namespace) -> Runs:
    """What can be trained: seeds, the first with heads on h alone; fourteen exits; on policy; the paper's preset."""
    tokens, runs = int(args.tokens), {}
    shared = {"eval_every": max(tokens // 3, 1), "eval_tokens": int(args.held_out), "patience": 1000}
    shared["quiet"] = not sys.stderr.isatty()
    every = settings_of(backbone.n_layers, args.exits, args.heads)
    plain = {name: config for name, config in every.items() if "hidden" not in name}
    settings = TrainSettings(max_tokens=tokens, batch_tokens=args.batch, seed=args.seeds[0], **shared)
    for seed in args.seeds:
        chosen = every if seed == args.seeds[0] else plain  # what h alone is worth is measured once
        runs[f"seed{seed}"] = (chosen, dataclasses.replace(settings, seed=seed))
    runs["fourteen"] = (settings_of(backbone.n_layers, FOURTEEN, ["mlp", "mamba"]), settings)
    again = settings_of(backbone.n_layers, args.exits, ["mamba"])
    runs["again"] = (again, dataclasses.replace(settings, on_policy=0.5))
    preset = PRESETS.lookup("dynamax-paper")
    heads = {head: preset.exit_config(backbone.n_layers, head=head) for head in ("linear", "transformer", "mamba")}
    sequence = min(4096, backbone.max_positions() or 4096)
    runs["paper"] = (heads, preset.train_settings(**{**shared, "sequence": sequence, "batch_tokens": sequence}))
    return {name: runs[name] for name in args.runs or runs}


def train(backbone: Backbone, tokenizer: Any, args: argparse.Namespace) -> None:
    source = find_source(args.text / "train.jsonl.xz")
    for name, (configs, settings) in runs_of(backbone, args).items():
        start = time.time()
        found = train_many(backbone, tokenizer, source, configs, settings, args.out / args.model / name)
        for head, exits in found.items():
            depth = exits.provenance["held_out"]["depth"]
            print(f"{name:8s} {head:18s} held-out depth {depth:.3f}, {time.time() - start:.0f} s", flush=True)


def tokens_within(backbone: Backbone, tokenizer: Any, args: argparse.Namespace) -> float:
    """Tokens that the first seed's heads train on in ``--seconds`` here, in round hundred thousands."""
    source, configs = find_source(args.text / "train.jsonl.xz"), settings_of(backbone.n_layers, args.exits, args.heads)
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


def texts(tokenizer: Any, args: argparse.Namespace) -> Iterator[tuple[dict[str, str], list[int]]]:
    """Unseen documents that are long enough and their first tokens, until there are ``--eval-tokens``."""
    total = 0
    for _, record in json_records(args.text / "eval.jsonl.xz"):
        ids = tokenizer(record["text"], verbose=False)["input_ids"][:ROW]
        if len(ids) >= 2 * PROMPT and total < args.eval_tokens:
            yield record, ids
            total += len(ids)


def batches_of(tokenizer: Any, args: argparse.Namespace) -> list[Batch]:
    """The first tokens of every document, one a row."""
    rows = sorted((ids for _, ids in texts(tokenizer, args)), key=len)
    return [pad(rows[start : start + 16]) for start in range(0, len(rows), 16)]


def documents(backbone: Backbone, tokenizer: Any, args: argparse.Namespace) -> None:
    """Tokens by source."""
    found: Counter[str] = Counter()
    for record, ids in texts(tokenizer, args):
        found[record["source"]] += len(ids)
    total = found.total()
    print(f"{total:,} tokens: " + ", ".join(f"{name} {count / total:.1%}" for name, count in found.most_common()))


def evaluate(backbone: Backbone, tokenizer: Any, args: argparse.Namespace, rows: list[dict] | None = None) -> None:
    """Every trained head of ``--runs``; with the first seed's, the measures and a static depth."""
    comparison, rows = HeadComparison(backbone, batches_of(tokenizer, args)), [] if rows is None else rows
    start, first = time.time(), f"seed{args.seeds[0]}"

    def add(run: str, setting: HeadSetting, traces: Any) -> None:
        result = comparison.evaluate(setting, traces)
        costs = costs_at_shape(SCALE.get(args.model, "mistral-7b"), setting.exits, setting.measure)
        saved = [projected_reduction(costs, counts) for counts in result.propagate.exit_counts.tolist()]
        rows.append({"run": run, **result.to_json(), "at_shape": result.propagate.reduction(TARGET, saved)})
        print(f"{run:8s} {setting.name:26s} {rows[-1]['propagate']['0.98']} {time.time() - start:.0f} s", flush=True)

    names = {"fourteen": "{}, fourteen exits", "paper": "{}, the paper's preset", "again": "{}, second pass on policy"}
    by_run: dict[str, list[Path]] = {}
    for path in sorted((args.out / args.model).glob("*/*/exits.json")):
        if not args.runs or path.parts[-3] in args.runs:
            by_run.setdefault(path.parts[-3], []).append(path.parent)
    for run, places in by_run.items():
        exits = {place.name: Exits.from_pretrained(place) for place in places}
        widest = max(exits.values(), key=lambda item: len(item.config.inputs))  # its features serve the others too
        traces = comparison.exit_batches(HeadSetting("", widest))
        for name, item in exits.items():
            add(run, HeadSetting(names.get(run, "{}").format(name), item), traces)
            if run == first and name == "mamba":
                plain = dataclasses.replace(item, drift_penalty={})
                add("gross", HeadSetting("mamba, thresholds not net", plain), traces)
        if run == first:
            plain = Exits.untrained(backbone, args.exits)
            traces = comparison.exit_batches(HeadSetting("", plain, "softmax_margin"))
            for name in MEASURES:
                add("measure", HeadSetting(name, plain, name), traces)
            static = depth_at_targets(comparison.static(plain))
            rows.append({"run": "static", "name": "static depth", "propagate": static})
        facts = {"model": args.model, **conditions(backbone.device), "exits": args.exits}
        facts |= {"documents": len(comparison.tokens), "tokens": int(comparison.tokens.sum())}
        facts |= {"parameters": sum(parameter.numel() for parameter in backbone.model.parameters())}
        facts |= {"layer_macs": backbone.costs().layers[0].layer, "readout_macs": backbone.costs().readout}
        facts |= {"seconds": round(time.time() - start), "results": rows}
        write_json(args.out / f"{args.model}.json", facts)


def both(backbone: Backbone, tokenizer: Any, args: argparse.Namespace) -> None:
    """Train and evaluate one of ``--runs`` after another: cut off, what was evaluated stands."""
    rows: list[dict] = []
    if args.seconds is not None:
        args.tokens = min(args.tokens, tokens_within(backbone, tokenizer, args))
    for run in args.runs or [f"seed{seed}" for seed in args.seeds]:
        one = argparse.Namespace(**{**vars(args), "runs": [run]})
        train(backbone, tokenizer, one)
        evaluate(backbone, tokenizer, one, rows)


def generate_texts(backbone: Backbone, tokenizer: Any, args: argparse.Namespace) -> None:
    """Free text of the first seed's heads and of the margin rule, at the thresholds of 98 % agreement, under
    ``propagate`` and ``defer``; added to OUT/MODEL.json."""
    place, run = args.out / f"{args.model}.json", f"seed{args.seeds[0]}"
    facts = json.loads(place.read_text())
    ids = torch.stack([row[:PROMPT] for batch in batches_of(tokenizer, args) for row in batch.ids][-PROMPTS:])
    ids = ids.to(backbone.device)
    whole = generate(backbone.model, ids, NEW)[:, PROMPT:]
    for item in facts["results"]:
        if item["run"] == run and item["name"] in HEADS:
            exits, measure = Exits.from_pretrained(args.out / args.model / run / item["name"]), None
        elif item["name"] == "softmax_margin":
            exits, measure = Exits.untrained(backbone, args.exits), item["name"]
        else:
            continue
        item["generation"] = {}
        for policy, name in (("propagate", "threshold"), ("defer", "threshold_intact")):
            early = EarlyExit(exits, measure=measure, threshold=min(item[name]["0.98"], 1.0), policy=policy)
            out = generate(backbone.model, ids, NEW, early)
            pairs = list(zip(out.sequences[:, PROMPT:].tolist(), whole.tolist(), strict=True))
            scores = [rouge_l(*(" ".join(map(str, row)) for row in pair)) for pair in pairs]
            depth = bootstrap((out.exit_layers.double().mean(1) / backbone.n_layers).tolist())
            same = sum(one == other for one, other in pairs) / len(pairs)
            item["generation"][policy] = {"rouge_l": bootstrap(scores), "depth": depth, "identical": same}
        print(item["name"], item["generation"], flush=True)
    write_json(place, facts)


@torch.no_grad()
def checks(backbone: Backbone, tokenizer: Any, args: argparse.Namespace) -> None:
    """Median time of one check of one token: the estimator, and its features at the first and at a later exit."""
    plain, rows = Exits.untrained(backbone, args.exits), []
    folders = sorted((args.out / args.model / f"seed{args.seeds[0]}").glob("*/exits.json"))
    settings = [HeadSetting(path.parent.name, Exits.from_pretrained(path.parent)) for path in folders]
    for setting in (*settings, *(HeadSetting(name, plain, name) for name in MEASURES)):
        estimator, readout = setting.estimator, setting.exits.readout(backbone)
        h = torch.randn(1, 1, backbone.width, device=backbone.device, dtype=backbone.dtype)
        state = (estimator.initial_state(1, backbone.device) or [None])[0]
        first = readout.read(0, h, h, None)[0] if estimator.needs_logits else exit_features(h, h, None, None)
        calls: list[Callable[[], object]] = [
            lambda e=estimator, f=first, s=state, h=h: e.confidence(0, h, f, s),
            *(
                lambda i=exit, r=readout, h=h, f=first, full=estimator.needs_logits: (
                    r.read(i, h, h, f if i else None) if full else exit_features(h, h, None, None)
                )
                for exit in (0, 1)
            ),
        ]
        times = [1e6 * median_seconds(call, backbone.device, 200, warm_up=20) for call in calls]
        rows.append([setting.name, setting.inputs or "–", *(f"{value:.0f}" for value in times)])
    print(markdown(["estimator", "sees", "check, µs", "first exit's features, µs", "later features, µs"], rows))


def ship(args: argparse.Namespace) -> None:
    """The first seed's heads are copied into the package, as its exits or as its ``four``."""
    for head in HEADS:
        target = REFERENCE_FOLDER / args.model / "exits" / ("" if args.exits == SIX else "four") / head
        target.mkdir(parents=True, exist_ok=True)
        for name in ("exits.json", "exits.safetensors"):
            shutil.copyfile(args.out / args.model / f"seed{args.seeds[0]}" / head / name, target / name)


def table(args: argparse.Namespace) -> None:
    facts = json.loads((args.out / f"{args.model}.json").read_text())
    print(comparison_table(facts["results"], facts["layer_macs"]))


def main() -> None:
    stages = {"train": train, "evaluate": evaluate, "both": both, "generate": generate_texts}
    stages |= {"documents": documents, "checks": checks}
    made = parser(__doc__, "device")
    made.add_argument("stage", choices=(*stages, "ship", "table"))
    made.add_argument("model")
    made.add_argument("--text", type=Path, default=Path("TEXT"))
    made.add_argument("--out", type=Path, default=Path("OUT"))
    made.add_argument("--tokens", type=float, default=4e6)
    made.add_argument("--batch", type=int, default=16384)
    made.add_argument("--eval-tokens", type=float, default=8e4, help="that evaluate reads")
    made.add_argument("--held-out", type=float, default=2e4, help="tokens that training evaluates on")
    made.add_argument("--exits", default=SIX, help="layers or shares of the depth")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--runs", nargs="+", default=[], help="only these: seed0, …, fourteen, again, paper")
    made.add_argument("--heads", nargs="+", default=[*HEADS, "mlp-hidden", "mamba-hidden"], help="of the seeds")
    made.add_argument("--seconds", type=float, help="of training, by the speed here: fewer tokens")
    args = parsed(made)
    if args.stage in ("ship", "table"):
        {"ship": ship, "table": table}[args.stage](args)
        return
    model, tokenizer = load(args.model, dtype="float32", device_map=args.device)
    stages[args.stage](adapt(model), tokenizer, args)


if __name__ == "__main__":
    main()
