"""What training exit heads costs beside the backbone's own forward, in paired runs on one device.

    python recipes/scale/bench.py [--shape mistral-7b] [--heads mamba mlp] [--tokens 4096] [--out DIR]

The bar: with four heads of one kind on documents of 4,096 tokens, training reaches at least 80 % of forward-only's
tokens/s, in less than 4 GB more. **Forward-only** is what reading a document with the frozen model costs: embedding,
every layer, final norm, LM head and the argmax at every position, in the code that training uses for its labels.
**ExitBatch** adds the exits' readouts, statistics and labels; **training** adds the heads' forward, backward and
optimiser step. The backbone has the published shape and random weights, in bfloat16 on a GPU; documents are random
token ids. Each run is a loop of ``--steps`` steps between two synchronisations; runs alternate, and medians of
``--repeats`` are reported. ``DIR/scale.json`` holds the numbers, ``DIR/profile-HEAD.txt`` where a step's time goes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from dynamax_llm.evaluation.compare.shapes import SHAPES
from transformers import AutoModelForCausalLM, MistralConfig
from transformers.utils import logging

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.exits.config import ExitConfig, place_exits
from dynamax_llm.exits.readout import Readout
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.collect import collect_exits, forward
from dynamax_llm.traces.labels import argmax
from dynamax_llm.traces.simulate import ThresholdSample
from dynamax_llm.training.aside import Aside
from dynamax_llm.training.learner import Learner
from dynamax_llm.training.settings import TrainSettings

NAMES = {"mistral": "mistral-7b", "codestral": "codestral-mamba-7b"}
TINY = MistralConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2
)
#: Host calls that say whether the device is waited for, and how many launches a step takes.
CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpyAsync", "cudaLaunchKernel", "cuLaunchKernelEx")

Step = Callable[[], object]


def build(shape: str, device: torch.device) -> Backbone:
    """The shape with random weights: bfloat16 on a GPU, float32 on a CPU."""
    torch.manual_seed(0)
    config = TINY if shape == "tiny" else SHAPES.lookup(NAMES.get(shape, shape))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return adapt(model.requires_grad_(False).eval())


def steps(backbone: Backbone, head: str, tokens: int) -> dict[str, Step]:
    """One step of each kind, on a document of random ids made anew each time."""
    layers = place_exits("1/2,5/8,3/4,7/8", backbone.n_layers)
    config = ExitConfig(layers, backbone.n_layers, head=head)
    settings = TrainSettings(sequence=tokens, batch_tokens=tokens)
    learner = Learner(config, backbone.width, settings, backbone.device)
    readout, generator = Readout(backbone, config), torch.Generator().manual_seed(0)
    aside = Aside(backbone.device)

    def document() -> Batch:
        ids = torch.randint(1, backbone.vocab_size, (1, tokens), generator=generator)
        return Batch(ids, torch.ones_like(ids, dtype=torch.bool))

    @torch.no_grad()
    def read() -> object:
        return argmax(backbone, forward(backbone, (), document().ids).final.flatten(0, 1))

    def gather() -> object:
        return collect_exits(backbone, readout, document())

    def learn() -> None:
        made = collect_exits(backbone, readout, document())
        draw = ThresholdSample.sample(made.mask, settings.never, generator)
        aside.run(lambda: learner.step(made, draw, 0.5), made)

    return {"forward": read, "harvest": gather, "train": learn}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(step: Step, count: int, device: torch.device) -> float:
    """Wall clock of one step, averaged over ``count`` of them in a row."""
    wait(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    wait(device)
    return (time.perf_counter() - start) / count


def peak(step: Step, device: torch.device) -> float:
    """GB allocated at most during two steps, weights included; nan on a CPU."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats(device)
    seconds(step, 2, device)
    return torch.cuda.max_memory_allocated(device) / 1e9


def measure(kinds: dict[str, Step], args: argparse.Namespace, device: torch.device) -> dict[str, dict]:
    """Medians, extremes and peak memory of each kind of step; runs of different kinds alternate."""
    for step in kinds.values():
        seconds(step, 3, device)
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(args.repeats):
        for name, step in kinds.items():
            times[name].append(seconds(step, args.steps, device))
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(found),
            "range": [1e3 * min(found), 1e3 * max(found)],
            "tokens_per_second": args.tokens / statistics.median(found),
            "peak_gb": peak(kinds[name], device),
        }
        for name, found in times.items()
    }


def profile(step: Step, device: torch.device, out: Path | None, head: str) -> dict[str, float]:
    """Host calls of one step, on average over three; the tables go to ``out``."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as found:
        seconds(step, 3, device)
    averages = found.key_averages()
    orders = ("self_device_time_total", "self_cpu_time_total") if device.type == "cuda" else ("self_cpu_time_total",)
    if out:
        tables = [averages.table(sort_by=order, row_limit=40, max_name_column_width=90) for order in orders]
        (out / f"profile-{head}.txt").write_text("\n\n".join(tables))
    counts = Counter({row.key: row.count for row in averages})
    return {name: counts[name] / 3 for name in CALLS}


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mistral", help="mistral, codestral or tiny")
    parser.add_argument("--heads", nargs="+", default=["mamba", "mlp"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    device = torch.device(args.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(f"{args.shape}, {args.tokens} tokens a step, {args.steps} steps x {args.repeats}; {where}; {versions}")
    backbone = build(args.shape, device)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    heads = {}
    for head in args.heads:
        kinds = steps(backbone, head, args.tokens)
        found = measure(kinds, args, device)
        calls = profile(kinds["train"], device, args.out, head)
        report(head, found, calls)
        heads[head] = {"steps": found, "calls": calls}
    if args.out:
        conditions = {"shape": args.shape, "device": where, "dtype": str(backbone.dtype), "versions": versions}
        numbers = {"tokens": args.tokens, "steps": args.steps, "repeats": args.repeats}
        (args.out / "scale.json").write_text(json.dumps({**conditions, **numbers, "heads": heads}, indent=1) + "\n")


if __name__ == "__main__":
    main()
