"""Blocks and a draft for SmolLM2, in one pass over its own answers (and some plain text), on one GPU.

    python -m recipes.smollm2.train MODEL --prompts train.jsonl --out DIR [--text FILE] [--tokens 30e6]

writes DIR/block and DIR/draft, and DIR/training.json with the seconds of every stage. The same command resumes.
"""

from __future__ import annotations

import json
import time

import torch
from recipes.common import conditions, parsed, parser

from dynamax_llm.backbones import adapt
from dynamax_llm.backbones.loading import load
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.text.answer_source import AnswerSource, MixedSource
from dynamax_llm.text.answers import make_answers
from dynamax_llm.text.prompts import read_prompts
from dynamax_llm.text.settings import AnswerSettings
from dynamax_llm.text.sources import find_source
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.trainer import train_many

#: Exits of the probe that this repeats: early ones, because a block there knows much already.
LAYERS = (4, 8, 15, 22)
INPUTS = ("hidden", "statistics")


def main() -> None:
    made = parser(__doc__, "model", "device", "out")
    made.add_argument("--prompts", required=True)
    made.add_argument("--text", help="plain text in a share of the batches")
    made.add_argument("--text-share", type=float, default=0.25)
    made.add_argument("--tokens", type=float, default=30e6, help="0: answers alone")
    made.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    made.add_argument("--block", default="transformer")
    made.add_argument("--join", default="matrix", help="of the draft; concatenate: dynamax export can write it")
    made.add_argument("--vocabulary", type=int, nargs=2, default=(8192, 16384), help="of the blocks, of the draft")
    made.add_argument("--max-prompts", type=int)
    made.add_argument("--answers", help="folder of the answers; default OUT/answers")
    made.add_argument("--batch-tokens", type=int, default=16384)
    made.add_argument("--sequence", type=int, default=512)
    made.add_argument("--rows", type=int, default=1024, help="prompts answered at once")
    made.add_argument("--max-new-tokens", type=int, default=224)
    made.add_argument("--draft-steps", type=int, default=4)
    made.add_argument("--every", type=int, default=4)
    made.add_argument("--block-share", type=float, default=0.88)
    made.add_argument("--lr", type=float, default=1e-3)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--state-rank", type=int, default=64, help="of the learned state update; 0: none")
    made.add_argument("--only", choices=("block", "draft"))
    args = parsed(made)
    start = time.monotonic()
    model, tokenizer = load(args.model, device_map=args.device)
    backbone = adapt(model)
    seconds = {"load": time.monotonic() - start}
    asked = AnswerSettings(
        rows=args.rows, max_prompts=args.max_prompts, max_new_tokens=args.max_new_tokens, seed=args.seed
    )
    folder = args.answers or args.out / "answers"
    answers = make_answers(model, tokenizer, read_prompts(args.prompts), asked, folder)
    seconds["answers"] = time.monotonic() - start - sum(seconds.values())
    print(json.dumps(seconds))
    if not args.tokens:
        return
    source = AnswerSource(answers)
    if args.text:
        source = MixedSource(source, find_source(args.text), args.text_share)
    options = {"block": args.block, "inputs": INPUTS, "head": "mlp", "join": args.join}
    n_layers, (blocks, draft) = backbone.n_layers, args.vocabulary
    configs = {
        "block": ExitConfig.from_options(
            args.layers, n_layers, readout="block", vocabulary=blocks, state_rank=args.state_rank, **options
        ),
        "draft": ExitConfig.from_options((0,), n_layers, readout="draft", vocabulary=draft, **options),
    }
    configs = {name: config for name, config in configs.items() if args.only in (None, name)}
    settings = TrainSettings(
        max_tokens=int(args.tokens),
        sequence=args.sequence,
        batch_tokens=args.batch_tokens,
        block_share=args.block_share,
        block_lr=args.lr,
        lr=3e-3,
        draft_steps=args.draft_steps,
        every=args.every,
        held_out=0.02,
        eval_tokens=30_000,
        eval_every=1_000_000,
        seed=args.seed,
    )
    trained = train_many(backbone, tokenizer, source, configs, settings, args.out)
    seconds["training"] = time.monotonic() - start - sum(seconds.values())
    record = {"conditions": conditions(args.device), "seconds": seconds, "tokens": int(args.tokens)}
    for name, exits in trained.items():
        kept = ("readout_losses", "held_out", "chains", "wall_seconds")
        record[name] = {key: exits.provenance[key] for key in kept if key in exits.provenance}
    if torch.cuda.is_available():
        record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    (args.out / "training.json").write_text(json.dumps(record, indent=1))
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
