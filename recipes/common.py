"""What the recipes share: options, the conditions of a measurement, timed generations, JSON and Markdown tables."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from dynamax_llm.evaluation.common.bootstrap import interval
from dynamax_llm.evaluation.common.timing import seconds


def parser(doc: str | None, *flags: str) -> argparse.ArgumentParser:
    """A parser described by a module's docstring; ``flags`` name common options: model, text, data, out, device."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=1)
    if "model" in flags:
        made.add_argument("model", help="model folder, hub id or shipped backbone")
    if "device" in flags:
        made.add_argument("--device", default="cpu")
    for name in ("text", "data", "out"):
        if name in flags:
            made.add_argument(f"--{name}", type=Path, required=True, help="a folder or a file")
    return made


def parsed(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with its threads set and transformers' messages off."""
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return args


def command() -> str:
    """This command line, its program as a path below the repository."""
    program = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parents[1]
    name = program.relative_to(root) if program.is_relative_to(root) else program.name
    return " ".join(["python", str(name), *sys.argv[1:]])


def device_name(device: str | torch.device) -> str:
    """The GPU's name, or the processor's."""
    on_gpu = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine()


def conditions(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Command, device, threads and versions."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    versions["python"] = platform.python_version()
    place = {"device": device_name(device), "threads": torch.get_num_threads()}
    return {"command": command(), **place, "versions": versions}


def write_json(path: Path, document: Any) -> None:
    """Write a document as JSON, its folder made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [header, ["---"] * len(header), *rows])


def bootstrap(values: Sequence[float]) -> dict[str, float]:
    """Mean over samples with its 95 % bootstrap interval."""
    found = interval(values)
    low, high = (found.value if end is None else end for end in (found.low, found.high))
    return {"mean": found.value, "low": low, "high": high}


def median_seconds(call: Callable[[], object], device: torch.device | str, repeats: int, warm_up: int = 2) -> float:
    """Median wall clock of a call; the first ``warm_up`` calls are left out."""
    return statistics.median([seconds(call, device) for _ in range(repeats + warm_up)][warm_up:])


def generate(model: Any, ids: torch.Tensor, new: int, early: Any = None) -> Any:
    """Exactly ``new`` greedy tokens after ids (B, P): an EarlyExitOutput, or without ``early`` the sequences."""
    extra = {} if early is None else {"custom_generate": early}
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options, **extra)


def decode_seconds(model: Any, ids: torch.Tensor, new: int, early: Any = None) -> float:
    """Wall clock of the decode steps alone: ``new`` tokens less the prompt's pass and the first token."""
    whole = seconds(lambda: generate(model, ids, new, early), ids.device)
    return whole - seconds(lambda: generate(model, ids, 1, early), ids.device)


def event_microseconds(call: Callable[[], object], repeats: int = 9) -> float:
    """Median time of a call between two CUDA events."""
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[2:])
