"""Is a Mamba block better than a transformer block of as many parameters, as a draft and at an exit?

    python -m recipes.blocks.compare MODEL --data text.jsonl.xz --out blocks.json [--device cuda] [--tokens 4e6]
    python -m recipes.blocks.compare MODEL --data prompts.jsonl --answers --out blocks.json      # its own answers
    python -m recipes.blocks.compare --render blocks.json                                         # Markdown

A run is one kind and one seed: one training of a draft and of exit blocks of that kind (``train_many``), then what they
do on held-out documents. Text, order, steps, learning rates and the positions that are learned from are the same for
every kind. A transformer block may start as a copy of the last layer, which a Mamba block cannot: without
--warm-start or --no-warm-start it is trained both ways where it can be. Runs that are in the file are skipped, an
interrupted training goes on, and several processes may write to one file.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes.blocks import measure
from recipes.blocks.table import table
from recipes.common import conditions, parsed, parser

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.backbones.loading import load
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.block_kinds.mamba import FORK_CHUNK
from dynamax_llm.exits.config import ExitConfig, place_exits
from dynamax_llm.exits.files import write_atomically
from dynamax_llm.exits.readouts.trained import TrainedOptions
from dynamax_llm.exits.registries import BLOCKS, READOUTS
from dynamax_llm.text.answer_source import AnswerSource, AnySource
from dynamax_llm.text.answers import make_answers
from dynamax_llm.text.prompts import read_prompts
from dynamax_llm.text.settings import AnswerSettings
from dynamax_llm.text.sources import find_source
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.trainer import train_many
from dynamax_llm.training.warm_start import start_from_last_layer

#: Arguments that decide the figures; a file holds runs of one choice of them.
DECIDING = ("tokens", "exits", "vocabulary", "every", "draft_steps", "batch", "sequence", "eval_tokens", "dtype")
DECIDING += ("answers", "lr", "prompts", "prompt", "new", "proposals")


def configs_of(backbone: Backbone, kind: str, args: argparse.Namespace) -> dict[str, ExitConfig]:
    """A draft and exit blocks of one kind."""
    options = {"block": kind, "vocabulary": args.vocabulary, "inputs": ("hidden", "statistics"), "head": "mlp"}
    layers = place_exits(args.exits, backbone.n_layers)
    return {
        name: ExitConfig.from_options(layers, backbone.n_layers, readout=name, **options) for name in ("draft", "block")
    }


def settings_of(seed: int, warm: bool, args: argparse.Namespace) -> TrainSettings:
    tokens = int(args.tokens)
    return TrainSettings(
        max_tokens=tokens,
        sequence=args.sequence,
        batch_tokens=args.batch,
        block_share=0.85,
        block_lr=args.lr,
        lr=3e-3,
        draft_steps=args.draft_steps,
        every=args.every,
        warm_start=warm,
        eval_tokens=10_000,
        eval_every=max(tokens // 10, 1),
        seed=seed,
        quiet=not sys.stderr.isatty(),
    )


def variants(backbone: Backbone, args: argparse.Namespace) -> list[tuple[str, bool]]:
    """Kinds, and whether their blocks start from the last layer."""
    found = []
    for kind in args.kinds:
        config = configs_of(backbone, kind, args)["draft"]
        options = READOUTS.lookup("draft").fitted(config, backbone).readout_options
        assert isinstance(options, TrainedOptions)
        can = start_from_last_layer(options.new_block(backbone.width), backbone)
        wanted = (True, False) if args.warm_start is None else (args.warm_start,)
        found += [(kind, warm) for warm in dict.fromkeys(can and each for each in wanted)]
    return found


def name_of(model: str, kind: str, warm: bool, seed: int) -> str:
    return f"{Path(model).name} {kind} {'warm' if warm else 'cold'} {seed}"


@contextmanager
def document(path: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The file's content while no other process changes it; written back at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = json.loads(path.read_text()) if path.exists() else {"settings": settings, "runs": {}}
        for name, value in found["settings"].items():
            if settings.get(name) != value:
                sys.exit(f"{path} holds runs with {name} {value!r}, not {settings.get(name)!r}: give another --out")
        before = json.dumps(found)
        yield found
        if json.dumps(found) != before or not path.exists():
            write_atomically(path, json.dumps(found).encode())


def measured(
    backbone: Backbone, found: dict[str, Exits], settings: TrainSettings, batches: list, args: argparse.Namespace
) -> dict[str, Any]:
    """Everything that is measured of one run."""
    for exits in found.values():
        assert exits.heads is not None
        exits.heads.to(backbone.device)
        exits.check_backbone(backbone)
    draft, block = found["draft"], found["block"]
    parameters, macs = measure.sizes(backbone, draft, block)
    sums = measure.losses(backbone, draft, settings, batches) | measure.losses(backbone, block, settings, batches)
    prompts = measure.prompts_of(batches, args.prompts, args.prompt, backbone.device)
    return {
        "parameters": parameters,
        "macs": macs,
        "sums": sums | measure.matches(backbone, draft, settings.every, batches),
        "depths": measure.depths(backbone, block, batches),
        "decoded": measure.decoded(backbone.model, draft, prompts, args.new, args.proposals),
    }


def rounded(value: Any) -> Any:
    """The same with numbers of six digits, so that the file stays small."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def source_of(model: Any, tokenizer: Any, args: argparse.Namespace) -> AnySource:
    if not args.answers:
        return find_source(args.data)
    answers = AnswerSettings(rows=args.rows, max_new_tokens=args.answer_tokens)
    return AnswerSource(make_answers(model, tokenizer, read_prompts(args.data), answers, args.work / "answers"))


def compare(args: argparse.Namespace) -> None:
    settings = {name: getattr(args, name) for name in DECIDING} | {"data": Path(args.data).name}
    with document(args.out, settings) as content:
        done = set(content["runs"])
    model, tokenizer = load(args.model, dtype=args.dtype, device_map=args.device)
    backbone = adapt(model)
    source, batches = source_of(model, tokenizer, args), None
    for seed in args.seeds:
        for kind, warm in variants(backbone, args):
            name = name_of(args.model, kind, warm, seed)
            if name in done:
                print(f"{name}: already there", flush=True)
                continue
            start, training = time.monotonic(), settings_of(seed, warm, args)
            folder = args.work / name.replace(" ", "-")
            found = train_many(backbone, tokenizer, source, configs_of(backbone, kind, args), training, folder)
            trained = time.monotonic()
            if batches is None:
                batches = measure.held_out(source, tokenizer, training, int(args.eval_tokens))
            run = {"model": Path(args.model).name, "kind": kind, "warm": warm, "seed": seed}
            run |= measured(backbone, found, training, batches, args)
            wall = found["draft"].provenance["wall_seconds"]
            run["seconds"] = {"training": wall, "all": time.monotonic() - start}
            run |= {"fingerprint": found["draft"].fingerprint["weights"], "conditions": conditions(args.device)}
            with document(args.out, settings) as content:
                content["runs"][name] = rounded(run)
            took = f"{wall:.0f} s of training, {trained - start:.0f} s with its reports"
            print(f"{name}: {took}, {time.monotonic() - start:.0f} s in all", flush=True)


def main() -> None:
    made = parser(__doc__, "device")
    made.add_argument("model", nargs="?", help="model folder, hub id or shipped backbone")
    made.add_argument("--render", type=Path, metavar="FILE", help="print the table of this file, and end")
    made.add_argument("--data", help="text; with --answers prompts")
    made.add_argument("--answers", action="store_true", help="learn from the model's own answers to --data")
    made.add_argument("--out", type=Path, help="the JSON file")
    made.add_argument("--work", type=Path, help="folder of exits and answers; default: OUT's folder, runs")
    made.add_argument("--tokens", type=float, default=4e6, help="training tokens of a run")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--kinds", nargs="+", default=["transformer", "mamba"], choices=tuple(BLOCKS))
    made.add_argument("--warm-start", action=argparse.BooleanOptionalAction, help="default: both, where possible")
    made.add_argument("--exits", default="1/4,1/2,3/4", help="layers or shares of the depth of the exit blocks")
    made.add_argument("--vocabulary", type=int, default=0, help="tokens that blocks and draft speak; 0: all")
    made.add_argument("--every", type=int, default=FORK_CHUNK, help="learn at one token in this many")
    made.add_argument("--draft-steps", type=int, default=4)
    made.add_argument("--lr", type=float, default=1e-3, help="of blocks and drafts")
    made.add_argument("--batch", type=int, default=16384, help="tokens of a step")
    made.add_argument("--sequence", type=int, default=512)
    made.add_argument("--dtype", default="float32")
    made.add_argument("--eval-tokens", type=float, default=3e4)
    made.add_argument("--prompts", type=int, default=16, help="that are really decoded")
    made.add_argument("--prompt", type=int, default=48, help="tokens of a prompt from plain text")
    made.add_argument("--new", type=int, default=48, help="tokens decoded of a prompt")
    made.add_argument("--proposals", type=int, default=4, help="of a verification")
    made.add_argument("--rows", type=int, default=256, help="prompts answered at once")
    made.add_argument("--answer-tokens", type=int, default=224)
    args = parsed(made)
    if args.render is not None:
        print(table(json.loads(args.render.read_text())))
        return
    if None in (args.model, args.data, args.out):
        made.error("MODEL, --data and --out are needed, or --render")
    if args.every % FORK_CHUNK:
        made.error(f"--every {args.every}: Mamba blocks learn at multiples of {FORK_CHUNK}, and all kinds alike here")
    args.work = args.work or args.out.parent / "runs"
    compare(args)


if __name__ == "__main__":
    main()
