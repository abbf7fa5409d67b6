"""How fast a draft and four blocks train at a 7B shape with random weights, beside the backbone's forward alone.

    python -m recipes.smollm2.scale_7b mistral-7b --device cuda [--batch-tokens 16384]

Prints tokens per second of both (medians of steps in turn, one process) and the memory that training adds.
"""

from __future__ import annotations

import json
import statistics
import time

import torch
from recipes.common import conditions, parsed, parser

from dynamax_llm.backbones import adapt
from dynamax_llm.evaluation.common.random_models import random_model
from dynamax_llm.exits.config import ExitConfig, place_exits
from dynamax_llm.exits.registries import READOUTS
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.collect import hidden_at
from dynamax_llm.training.blocks import BlockLearner, DraftLearner
from dynamax_llm.training.settings import TrainSettings

SEQUENCE = 512


def main() -> None:
    made = parser(__doc__, "model", "device")
    made.add_argument("--batch-tokens", type=int, default=16384)
    made.add_argument("--steps", type=int, default=8)
    made.add_argument("--every", type=int, default=4)
    made.add_argument("--draft-steps", type=int, default=3)
    made.add_argument("--vocabulary", type=int, default=8192)
    args = parsed(made)
    backbone = adapt(random_model(args.model, args.device))
    settings = TrainSettings(every=args.every, draft_steps=args.draft_steps)
    options = {"head": "mlp", "vocabulary": args.vocabulary}
    layers = place_exits("1/8,1/4,1/2,3/4", backbone.n_layers)

    def config(readout: str) -> ExitConfig:
        made = ExitConfig.from_options(layers, backbone.n_layers, readout=readout, **options)
        return READOUTS.lookup(readout).fitted(made, backbone)

    def clock(work: object) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    ids = torch.randint(backbone.vocab_size, (args.batch_tokens // SEQUENCE, SEQUENCE))
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
    clock(lambda: hidden_at(backbone, (), ids))
    torch.cuda.reset_peak_memory_stats()
    clock(lambda: hidden_at(backbone, (), ids))
    forward_peak = torch.cuda.max_memory_allocated()
    learners = [BlockLearner(backbone, config("block"), settings), DraftLearner(backbone, config("draft"), settings)]
    depths = {depth for learner in learners for depth in learner.depths}

    def train() -> None:
        hidden = hidden_at(backbone, depths, ids)
        for learner in learners:
            learner.learn(hidden, batch, 0.5)

    for _ in range(2):
        train()
    torch.cuda.reset_peak_memory_stats()
    seconds: dict[str, list[float]] = {"forward": [], "training": []}
    for _ in range(args.steps):
        seconds["forward"].append(clock(lambda: hidden_at(backbone, (), ids)))
        seconds["training"].append(clock(train))
    rates = {name: args.batch_tokens / statistics.median(values) for name, values in seconds.items()}
    record = {
        "conditions": conditions(args.device),
        "model": args.model,
        "tokens_per_second": rates,
        "share_of_forward": rates["training"] / rates["forward"],
        "parameters": sum(p.numel() for learner in learners for p in learner.weights.parameters()),
        "memory_added_gb": (torch.cuda.max_memory_allocated() - forward_peak) / 1e9,
        "forward_peak_gb": forward_peak / 1e9,
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
