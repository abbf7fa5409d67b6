"""Ways to tune one checkpoint for early exits, on the same text with the same budget, and the table that compares them.

    python recipes/tuning/study.py run MODEL --data TEXT --out OUT [--names lora,full] [--tokens 4e6] [--device cuda]
    python recipes/tuning/study.py table OUT          # from OUT/NAME/tuning.json, as Markdown

`run` writes OUT/NAME, a stock model folder, for each way in VARIANTS; it is `dynamax tune` with these settings.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import markdown, parsed, parser
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
    rows = [("before", first["before"], 1.0)]
    rows += [(name, record["after"], record["tokens_kept"]) for name, record in records.items()]
    lines = [[name, *(f"{found[key]:.3f}" for _, key in COLUMNS), f"{kept:.3f}"] for name, found, kept in rows]
    header = ["", *(title for title, _ in COLUMNS), "tokens that are the original's"]
    return (
        f"{first['tokens']:,} training tokens, {first['after']['tokens']:,} held-out tokens, exits after layers "
        f"{', '.join(map(str, first['layers']))} of {len(first['after']['loss_per_layer'])}.\n\n"
        + markdown(header, lines)
    )


def main() -> None:
    made = parser(__doc__, "device")
    made.add_argument("verb", choices=("run", "table"))
    made.add_argument("model", help="run: a model folder, hub id or shipped backbone; table: the folder OUT")
    made.add_argument("--data", help="text, as dynamax tune takes it")
    made.add_argument("--out", type=Path, default=Path("out"))
    made.add_argument("--names", default=",".join(VARIANTS), help="which ways, separated by commas")
    made.add_argument("--exits", default="1/4,3/8,1/2,5/8,3/4,7/8", help="layers or shares of the depth")
    made.add_argument("--tokens", type=float, default=4e6)
    made.add_argument("--batch", type=int, default=16384, help="tokens of a step")
    made.add_argument("--eval-tokens", type=float, default=50e3)
    args = parsed(made)
    run(args) if args.verb == "run" else print(table(Path(args.model)))


if __name__ == "__main__":
    main()
