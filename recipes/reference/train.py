"""Train one reference backbone on one GPU (or, with --smoke, a tiny twin on the CPU).

    python recipes/reference/train.py transformer --data DIR --out DIR --tokens 800e6 --deadline 540

Writes OUT/<kind>-ee/model.safetensors (bf16) and metrics.json. `--objective ordinary` trains the last layer alone,
as checkpoints usually are, and writes OUT/<kind>-ordinary: what scan and tune are tried on. Under torchrun every
process takes its own share of each batch. `prepare` as the model name only tokenises into --cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTED = time.time()  # the deadline counts imports, tokenising and compiling

import numpy as np
import torch
import transformers
from evaluate import spread, table, validation
from layers import Stack
from mixture import prepare
from objective import MultiExitLoss
from optim import Optimizer, learning_rate
from safetensors.torch import save_file
from shapes import CONTEXT, NAMES, OBJECTIVES, config, name
from torch import Tensor
from transformers import AutoModelForCausalLM

from dynamax_llm.training.multi_exit import rotate_exits
from dynamax_llm.training.parallel import Group

REPORT_SECONDS = 5.0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*NAMES, "prepare"], help="which backbone, or 'prepare' to tokenise only")
    parser.add_argument("--data", type=Path, required=True, help="folder with the corpus files")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder that receives <name>/")
    parser.add_argument("--cache", type=Path, default=Path("build/reference"), help="folder for the tokens")
    parser.add_argument("--tokens", type=float, default=800e6, help="tokens to train on")
    parser.add_argument("--deadline", type=float, default=540, help="seconds after which training must have ended")
    parser.add_argument("--batch", type=int, default=64, help="sequences per step, over all processes")
    parser.add_argument("--length", type=int, default=CONTEXT, help="tokens per sequence")
    parser.add_argument("--matrix-lr", type=float, default=0.02, help="Muon's peak rate")
    parser.add_argument("--other-lr", type=float, default=4e-3, help="AdamW's peak rate")
    parser.add_argument("--objective", choices=OBJECTIVES, default="multi-exit", help="ordinary: the last layer alone")
    parser.add_argument("--exits", type=int, default=3, help="exits trained per step")
    parser.add_argument("--exit-weight", type=float, default=1.0, help="weight of all exits beside the last layer's 1")
    parser.add_argument("--distil", type=float, default=0.7, help="share of the exits' loss that is distillation")
    parser.add_argument("--valid-tokens", type=float, default=1e6, help="held-out tokens measured at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny model on the CPU: proves the recipe runs")
    args = parser.parse_args()
    if args.objective == "ordinary":
        args.exits = 0
    return args


class Batches:
    """Shuffled windows of the packed training tokens: same seed and step, same batch, on any device.

    One epoch cuts the tokens at a random phase into windows of length + 1 and visits each once.
    """

    def __init__(self, tokens: Tensor, length: int, batch: int, seed: int) -> None:
        self.tokens, self.length, self.batch, self.seed = tokens, length, batch, seed
        self.per_epoch = ((len(tokens) - 1 - length) // length) // batch
        if self.per_epoch < 1:
            raise ValueError(f"{len(tokens):,} training tokens do not fill one batch of {batch} x {length}")
        self._epoch, self._starts = -1, torch.empty(0)
        self._span = torch.arange(length + 1, device=tokens.device)

    def __call__(self, step: int) -> Tensor:
        """Windows of this step, (batch, length + 1), int64."""
        epoch, at = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 7919 + epoch)
            phase = int(torch.randint(self.length, (), generator=generator))
            order = torch.randperm((len(self.tokens) - 1 - phase) // self.length, generator=generator)
            self._epoch, self._starts = epoch, (order * self.length + phase).to(self.tokens.device)
        starts = self._starts[at * self.batch : (at + 1) * self.batch]
        return self.tokens[starts[:, None] + self._span].long()


@dataclass
class Training:
    """Everything one run holds while it trains."""

    stack: Stack
    loss: MultiExitLoss
    optimizer: Optimizer
    exits: int
    group: Group

    def step(self, number: int, windows: Tensor, scale: float) -> Tensor:
        """One update on windows (B, T + 1); returns mean cross-entropy per readout, the last layer's last."""
        exits = rotate_exits(number, range(1, self.stack.depth), self.exits)
        states = self.stack.states(windows[:, :-1])
        normed = [self.stack.normed(states[e - 1]) for e in (*exits, self.stack.depth)]
        losses = self.loss.backward(normed, exits, windows[:, 1:], self.stack.head)
        if self.group.size > 1:
            self.group.sum_gradients(self.optimizer.parameters)
            torch._foreach_div_([parameter.grad for parameter in self.optimizer.parameters], self.group.size)
        self.optimizer.step(scale)
        return losses


def build(args: argparse.Namespace, device: torch.device, group: Group) -> Training:
    """Model, objective and optimizer, freshly initialised from the seed."""
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config(args.kind, args.smoke), dtype=torch.float32).to(device)
    model.requires_grad_(True)
    compiled = device.type == "cuda"
    stack = Stack(model, torch.bfloat16 if compiled else torch.float32, compiled)
    optimizer = Optimizer(model, args.matrix_lr, args.other_lr, compiled=compiled)
    return Training(stack, MultiExitLoss(args.distil, args.exit_weight, compiled), optimizer, args.exits, group)


def share_of_time(begun: float | None, deadline: float) -> float:
    """How much of the time between the first step's end and the deadline has passed; 0 before the first step."""
    return 0.0 if begun is None else (time.time() - begun) / max(deadline - (begun - STARTED), 1e-3)


def train(args: argparse.Namespace, run: Training, batches: Batches) -> dict[str, Any]:
    """Train until the tokens or the deadline are used up; the decay ends with whichever comes first.

    The schedule counts seconds from the first step on, so that compiling does not eat the warm-up of a short run.
    """
    per_step = args.batch * args.length
    progress, step, history = 0.0, 0, []
    mark, mark_step, first_step_at = time.time(), 0, None
    while progress < 1:
        if step % 10 == 0:  # all processes must agree on when to stop, so one clock rules
            elapsed = run.group.totals(share_of_time(first_step_at, args.deadline) if run.group.main else 0.0)[0]
        progress = max(step * per_step / args.tokens, elapsed)
        windows = batches(step)
        windows = windows[run.group.rows(len(windows))]
        losses = run.step(step, windows, learning_rate(progress))
        step += 1
        if first_step_at is None:
            losses.tolist()  # waits for compilation
            first_step_at = mark = time.time()
            mark_step = step
            print(f"first step after {first_step_at - STARTED:.1f} s", flush=True)
        if time.time() - mark > REPORT_SECONDS:
            values = losses.tolist()  # waits for the GPU, so the rate below is honest
            rate = (step - mark_step) * per_step / (time.time() - mark)
            row = {"step": step, "seconds": round(time.time() - STARTED, 1), "tokens": step * per_step}
            history.append(row | {"loss": round(values[-1], 4), "tokens_per_second": round(rate)})
            if run.group.main:
                exits = " ".join(f"{v:.3f}" for v in values[:-1])
                print(
                    f"{row['seconds']:6.1f} s  step {step:6d}  {step * per_step / 1e6:7.1f} M tokens  "
                    f"{rate / 1e6:5.2f} M/s  loss {values[-1]:.4f}  exits {exits}  progress {progress:.3f}",
                    flush=True,
                )
            mark, mark_step = time.time(), step
    return {"steps": step, "tokens_seen": step * per_step, "history": history}


def validate(args: argparse.Namespace, stack: Stack) -> dict[str, Any]:
    """The layer table with weights rounded to bf16, as they are shipped."""
    with torch.no_grad():
        for parameter in stack.model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    tokens = torch.from_numpy(np.load(args.cache / "valid.npy").astype(np.int32))
    return validation(stack.model.requires_grad_(False), spread(tokens, int(args.valid_tokens), args.length).long())


def hardware(device: torch.device, processes: int) -> dict[str, Any]:
    """What this ran on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu"
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return {"device": name, "processes": processes, "peak_GiB": peak, "versions": versions}


def save(args: argparse.Namespace, stack: Stack, metrics: dict[str, Any]) -> None:
    """Weights in bf16 without the tied copy of the head, and metrics.json, under OUT/<name>."""
    folder = args.out / name(args.kind, args.objective)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: parameter.detach().to("cpu", torch.bfloat16).contiguous()
        for name, parameter in stack.model.named_parameters()  # named_parameters lists a tied tensor once
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(f"saved {folder}: {sum(w.numel() for w in weights.values()):,} parameters", flush=True)


def main() -> None:
    args = arguments()
    facts = prepare(args.data, args.cache)
    if args.kind == "prepare":
        return
    group = Group.join(cpu=not torch.cuda.is_available())
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    tokens = torch.from_numpy(np.load(args.cache / "train.npy").astype(np.int32)).to(device)
    print(f"{time.time() - STARTED:6.1f} s  {len(tokens):,} training tokens on {device}", flush=True)
    run = build(args, device, group)
    trained = train(args, run, Batches(tokens, args.length, args.batch, args.seed))
    seconds = time.time() - STARTED
    if not group.main:
        return
    print(f"trained {trained['tokens_seen']:,} tokens in {seconds:.0f} s; measuring", flush=True)
    result = validate(args, run.stack)
    print(table(result), flush=True)
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    metrics = {
        "name": name(args.kind, args.objective),
        "options": options,
        "config": json.loads(run.stack.model.config.to_json_string()),
    }
    metrics |= {"data": facts, "wall_seconds": round(seconds, 1), "hardware": hardware(device, group.size)}
    save(args, run.stack, metrics | {"validation": result} | trained)


if __name__ == "__main__":
    main()
