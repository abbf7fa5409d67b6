"""What training exit heads costs beside the backbone's own forward, in paired runs on one device.

    python recipes/scale/bench.py [--shape mistral-7b] [--heads mamba mlp] [--tokens 4096] [--out DIR]

The aim: with four heads of one kind on documents of 4,096 tokens, training reaches at least 80 % of forward-only's
tokens/s, in less than 4 GB more. **Forward-only** is what reading a document with the frozen model costs: embedding,
every layer, final norm, LM head and the argmax at every position, in the code that training uses for its labels.
**Exits** adds the exits' readouts, statistics and labels; **training** adds the heads' forward, backward and optimiser
step. The backbone has the published shape and random weights, in bfloat16 on a GPU; documents are random token ids.
Each run is a loop of ``--steps`` steps between two synchronisations; runs alternate, and medians of ``--repeats`` are
reported. ``DIR/scale.json`` holds the numbers, ``DIR/profile-HEAD.txt`` where a step's time goes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import conditions, parsed, parser, write_json
from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.evaluation.common.random_models import random_model
from dynamax_llm.evaluation.common.timing import seconds
from dynamax_llm.exits.config import ExitConfig, place_exits
from dynamax_llm.exits.readouts.base import build_readout
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.collect import collect_exits, forward
from dynamax_llm.traces.labels import argmax
from dynamax_llm.traces.simulate import ThresholdSample
from dynamax_llm.training.learner import HeadLearner
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.side_stream import SideStream

NAMES = {"mistral": "mistral-7b", "codestral": "codestral-mamba-7b", "tiny": "tiny-transformer"}
#: Host calls that say whether the device is waited for, and how many launches a step takes.
CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpyAsync", "cudaLaunchKernel", "cuLaunchKernelEx")

Step = Callable[[], object]


def steps(backbone: Backbone, head: str, tokens: int, exits: str) -> dict[str, Step]:
    """One step of each kind, on a document of random ids made anew each time."""
    config = ExitConfig(place_exits(exits, backbone.n_layers), backbone.n_layers, head=head)
    settings = TrainSettings(sequence=tokens, batch_tokens=tokens)
    learner = HeadLearner(config, backbone.width, settings, backbone.device)
    readout, generator = build_readout(backbone, config), torch.Generator().manual_seed(0)
    aside = SideStream(backbone.device)

    def document() -> Batch:
        ids = torch.randint(1, backbone.vocab_size, (1, tokens), generator=generator)
        return Batch(ids, torch.ones_like(ids, dtype=torch.bool))

    @torch.no_grad()
    def read() -> object:
        return argmax(backbone, forward(backbone, (), document().ids).final.flatten(0, 1))

    def learn() -> None:
        made = collect_exits(backbone, readout, document())
        draw = ThresholdSample.sample(made.mask, settings.no_exit_share, generator)
        aside.run(lambda: learner.step(made, draw, 0.5), made)

    return {"forward": read, "exits": lambda: collect_exits(backbone, readout, document()), "train": learn}


def repeated(step: Step, count: int, device: torch.device) -> float:
    """Wall clock of one step, averaged over ``count`` of them in a row."""
    return seconds(lambda: [step() for _ in range(count)], device) / count


def peak(step: Step, device: torch.device) -> float:
    """GB allocated at most during two steps, weights included; nan on a CPU."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats(device)
    repeated(step, 2, device)
    return torch.cuda.max_memory_allocated(device) / 1e9


def measure(kinds: dict[str, Step], args: argparse.Namespace, device: torch.device) -> dict[str, dict]:
    """Medians, extremes and peak memory of each kind of step; runs of different kinds alternate."""
    for step in kinds.values():
        repeated(step, min(3, args.steps), device)
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(args.repeats):
        for name, step in kinds.items():
            times[name].append(repeated(step, args.steps, device))
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(found),
            "range": [1e3 * min(found), 1e3 * max(found)],
            "tokens_per_second": args.tokens / statistics.median(found),
            "peak_gb": peak(kinds[name], device),
        }
        for name, found in times.items()
    }


def calls_of(step: Step, device: torch.device, table: Path | None) -> dict[str, float]:
    """Host calls of one step, on average over three; where its time goes is written to ``table``."""
    with torch.profiler.profile() as found:
        repeated(step, 3, device)
    averages = found.key_averages()
    if table:
        order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        table.write_text(averages.table(sort_by=order, row_limit=40, max_name_column_width=90))
    counts = {row.key: row.count for row in averages}
    return {name: counts.get(name, 0) / 3 for name in CALLS}


def report(head: str, found: dict[str, dict], calls: dict[str, float]) -> None:
    base = found["forward"]
    for name, row in found.items():
        low, high = row["range"]
        print(
            f"{head:12s} {name:8s} {row['milliseconds']:8.2f} ms ({low:.2f} to {high:.2f})  "
            f"{row['tokens_per_second']:9,.0f} tokens/s  {row['tokens_per_second'] / base['tokens_per_second']:.3f} of "
            f"forward-only  peak {row['peak_gb']:.2f} GB ({row['peak_gb'] - base['peak_gb']:+.2f})",
            flush=True,
        )
    print(f"{head:12s} calls a training step: {calls}", flush=True)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--shape", default="mistral-7b", help="or mistral, codestral, tiny")
    made.add_argument("--heads", nargs="+", default=["mamba", "mlp"])
    made.add_argument("--exits", default="1/2,5/8,3/4,7/8")
    made.add_argument("--tokens", type=int, default=4096)
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--out", type=Path)
    args = parsed(made)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backbone = adapt(random_model(NAMES.get(args.shape, args.shape), device, dtype).requires_grad_(False))
    about = {"shape": args.shape, "dtype": str(dtype), **conditions(device)}
    about |= {name: getattr(args, name) for name in ("tokens", "steps", "repeats")}
    print(about)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    heads = {}
    for head in args.heads:
        kinds = steps(backbone, head, args.tokens, args.exits)
        found = measure(kinds, args, device)
        calls = calls_of(kinds["train"], device, args.out and args.out / f"profile-{head}.txt")
        report(head, found, calls)
        heads[head] = {"steps": found, "calls": calls}
    if args.out:
        write_json(args.out / "scale.json", {**about, "heads": heads})


if __name__ == "__main__":
    main()
