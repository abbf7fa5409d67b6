"""Ways to tune one checkpoint for early exits, on the same text with the same budget, and the table that compares them.

    python recipes/tuning/study.py run MODEL --data TEXT --out OUT [--names lora,full] [--tokens 4e6] [--device cuda]
    python recipes/tuning/study.py table OUT          # from OUT/NAME/tuning.json, as Markdown

`run` writes OUT/NAME, a stock model folder, for each way in VARIANTS; it is `dynamax tune` with these settings.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dynamax_llm.backbones import adapt
from dynamax_llm.backbones.loading import load, peek
from dynamax_llm.exits.config import place_exits
from dynamax_llm.text.sources import find_source
from dynamax_llm.training.tuning import TuneSettings, tune

#: What differs between the ways; everything else is `dynamax tune`'s default.
VARIANTS: dict[str, dict[str, object]] = {
    "lora": {},
    "lora-rotating": {"schedule": "rotating"},
    "lora-text": {"teacher": "current", "distil": 0.7},  # the reference backbones' loss
    "full": {"method": "full", "lr": 1e-3},
    "full-rotating": {"method": "full", "lr": 1e-3, "schedule": "rotating"},
    "full-text": {"method": "full", "lr": 1e-3, "teacher": "current", "distil": 0.7},
}
COLUMNS = (
    ("full model's loss", "loss"),
    ("exits' loss", "exit_loss"),
    ("oracle, all layers", "oracle_depth"),
    ("oracle, exits", "oracle_depth_at_exits"),
    ("margin rule at 98 %", "margin_depth"),
)


def run(args: argparse.Namespace) -> None:
    """Tune once per name."""
    layers = place_exits(args.exits, peek(args.model).num_hidden_layers)
    for name in args.names.split(","):
        model, tokenizer = load(args.model, dtype="float32", device_map=args.device)
        settings = TuneSettings(
            max_tokens=int(args.tokens), batch_tokens=args.batch, eval_tokens=int(args.eval_tokens), **VARIANTS[name]
        )
        out = args.out / name
        result = tune(adapt(model), tokenizer, find_source(args.data), layers, settings, out, peek(args.model).dtype)
        rate = result.record["tokens"] / result.record["wall_seconds"]
        print(f"{name}: {result.record['wall_seconds']} s, {rate:,.0f} tokens/s", flush=True)


def table(out: Path) -> str:
    """One row for the model before, one for each way."""
    records = {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("*/tuning.json"))}
    if not records:
        raise SystemExit(f"{out} holds no NAME/tuning.json: run `study.py run` first")
    first = next(iter(records.values()))
    lines = [
        f"{first['tokens']:,} training tokens, {first['after']['tokens']:,} held-out tokens, exits after layers "
        f"{', '.join(map(str, first['layers']))} of {len(first['after']['loss_per_layer'])}.",
        "",
        "| | " + " | ".join(title for title, _ in COLUMNS) + " | tokens that are the original's |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for name, figures, kept in [
        ("before", first["before"], 1.0),
        *((name, record["after"], record["tokens_kept"]) for name, record in records.items()),
    ]:
        lines.append(f"| {name} | " + " | ".join(f"{figures[key]:.3f}" for _, key in COLUMNS) + f" | {kept:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("run")
    one.add_argument("model", help="model folder, hub id or shipped backbone")
    one.add_argument("--data", required=True, help="text, as dynamax tune takes it")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--names", default=",".join(VARIANTS), help="which ways, separated by commas")
    one.add_argument("--exits", default="1/4,3/8,1/2,5/8,3/4,7/8", help="layers or shares of the depth")
    one.add_argument("--tokens", type=float, default=4e6)
    one.add_argument("--batch", type=int, default=16384, help="tokens of a step")
    one.add_argument("--eval-tokens", type=float, default=50e3)
    one.add_argument("--device", default="cpu")
    verbs.add_parser("table").add_argument("out", type=Path)
    args = parser.parse_args()
    run(args) if args.verb == "run" else print(table(args.out))


if __name__ == "__main__":
    main()
