"""What one check costs, and whether the fused one says what its plain twin says: every kind of head, at a 7B shape.

    OUT=out PYTHONPATH=src python recipes/speed/checks.py --shape mistral-7b [--batches 1 8]

The model has the shape's true width and vocabulary, a few of its layers (``--layers``) and random weights. First, on
the same h: confidence and tokens of the fused check, of the heads asked through PyTorch, and of the latter in float32,
which is the truth for all; and a tiny float32 model decoded both ways. Then times: a recorded program of layers, and of
layers with a check after each, so that a check meets caches that a layer's weights have swept; the difference is a
check's. Writes OUT/checks-SHAPE.json; exits with 1 if the twins differ.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
from dynamax_llm.decoding.engines import pick_decoder
from dynamax_llm.engines.cuda.machine import Machine, residual_dtype
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.engines.cuda import check as checking
from dynamax_llm.engines.cuda.check import Check
from dynamax_llm.engines.cuda.fused import HeadCheck
from dynamax_llm.engines.cuda.readout import read_out
from dynamax_llm.evaluation.common.random_models import RANDOM_SHAPES, random_model
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import INPUTS, ExitConfig
from dynamax_llm.exits.readouts.base import Readout, build_readout
from dynamax_llm.exits.registries import HEADS

#: Exits, so few that their tables are a small share of the few layers' weights, as in a whole model.
EXITS = 3
#: Checks in one recorded program, and replays of it.
REPEATS, REPLAYS = 20, 9
#: Confidences of twins in float32 may differ by so much.
ROUNDING = 1e-3
#: Heads that are one kernel.
FUSED = ("linear", "mlp")
TINY = {"mistral-7b": "tiny-transformer", "codestral-mamba-7b": "tiny-mamba"}


def few_layers(shape: str, layers: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this shape with random weights and only ``layers`` layers."""
    config = copy.deepcopy(RANDOM_SHAPES.lookup(shape))
    config.num_hidden_layers, config.eos_token_id = layers, None
    with torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def heads_for(backbone: Backbone, layers: int, kind: str, inputs: tuple[str, ...]) -> tuple[ExitHeads, Readout]:
    """Heads of this kind after the first ``EXITS`` layers, drawn so that every part of them matters."""
    config = ExitConfig(tuple(range(1, min(layers, EXITS + 1))), layers, kind, inputs)
    torch.manual_seed(1)
    heads = ExitHeads(config, backbone.width)
    with torch.no_grad():
        for name, part in (*heads.bank.named_parameters(), ("shift", heads.shift), ("prior", heads.prior)):
            if name in ("out", "shift", "prior", "bias", "out_bias"):
                part.normal_(std=0.2)
            elif name == "weight":
                part.normal_(std=part.shape[1] ** -0.5)
        heads.scale.uniform_(0.5, 1.5)
    return heads.to(backbone.device).eval(), build_readout(backbone, config)


def check_for(heads: ExitHeads, readout: Readout, batch: int, *, fuse: bool) -> Check:
    """Its exits, open to nobody."""
    device = readout.backbone.device
    ticket = torch.zeros(1, dtype=torch.int32, device=device)
    return Check(heads, readout, len(readout.config.layers), batch, device, ticket, fuse=fuse)


# the same?


def states(backbone: Backbone, count: int, batch: int) -> list[tuple[Tensor, Tensor]]:
    """h and h before, (B, d) each, of ``count`` exits: one stream that grows."""
    torch.manual_seed(2)
    shape, kind = (batch, backbone.width), {"device": backbone.device}
    h, found = torch.randn(shape, **kind), []
    for _ in range(count):
        before = h + 0.3 * torch.randn(shape, **kind)
        h = before + 0.1 * torch.randn(shape, **kind)
        found.append((h.to(residual_dtype(backbone)), before.to(residual_dtype(backbone))))
    return found


@torch.no_grad()
def asked(check: Check, heads: ExitHeads, points: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor | None]]:
    """Confidence (B,) and leading token (B,), if any, at every exit in turn."""
    found: list[tuple[Tensor, Tensor | None]] = []
    for index, (h, before) in enumerate(points):
        check.ask(index, h, before, None)
        if check.fused is not None:
            token = check.fused.token.clone() if check.fused.looks else None
            found.append((check.fused.confidence[index].clone(), token))
            continue
        seen = check.features[index]
        assert seen is not None
        sure = heads.confidence(index, h.unsqueeze(1), seen, None)[0][:, 0]
        found.append((sure, None if seen.token is None else seen.token[:, 0].clone()))
    return found


def compared(backbone: Backbone, layers: int, batches: list[int]) -> list[dict]:
    """Twins on the same h, in the model's dtype and in float32."""
    exact = adapt(copy.deepcopy(backbone.model).float())
    rows = []
    for batch, kind, inputs in itertools.product(batches, FUSED, (("hidden",), ("hidden", "signals"), INPUTS)):
        points = states(backbone, min(layers - 1, EXITS), batch)
        wide = [(h.to(residual_dtype(exact)), before.to(residual_dtype(exact))) for h, before in points]
        said = {}
        for name, own, given, fuse in (
            ("fused", backbone, points, True),
            ("pytorch", backbone, points, False),
            ("fused float32", exact, wide, True),
            ("float32", exact, wide, False),
        ):
            heads, readout = heads_for(own, layers, kind, inputs)
            said[name] = asked(check_for(heads, readout, batch, fuse=fuse), heads, given)
        row: dict = {"batch": batch, "head": kind, "inputs": inputs, "exits": []}
        for exit in range(len(points)):
            sure, token = said["float32"][exit]
            here: dict = {"confidence": sure.tolist()}
            for name in ("fused", "pytorch", "fused float32"):
                other, chosen = said[name][exit]
                here[f"{name}: difference"] = float((other - sure).abs().max())
                here[f"{name}: same tokens"] = 1.0 if token is None else float((chosen == token).double().mean())
            row["exits"].append(here)
        rows.append(row)
        worst = {
            name: max(here[f"{name}: difference"] for here in row["exits"])
            for name in ("fused", "pytorch", "fused float32")
        }
        same = min(here["fused float32: same tokens"] for here in row["exits"])
        row["ok"] = worst["fused float32"] <= ROUNDING and same == 1.0
        print(
            f"batch {batch}, {kind} on {'+'.join(inputs)}: largest difference to float32 through PyTorch: "
            + ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
            + f"; tokens {'the same' if same == 1.0 else f'{same:.0%} the same'} in float32",
            flush=True,
        )
    return rows


def decoded(shape: str, device: torch.device) -> list[dict]:
    """A tiny float32 model, greedy: tokens and depths with fused checks, and with the same heads through PyTorch."""
    model = random_model(TINY.get(shape, shape), device, torch.float32)
    layers = model.config.num_hidden_layers
    heads, readout = heads_for(adapt(model), layers, "mlp", INPUTS)
    config = readout.config
    torch.manual_seed(3)
    ids = torch.randint(1, model.config.vocab_size, (2, 12), device=device)
    new, rows, fuse = 48 if device.type == "cuda" else 6, [], checking.head_check
    for bar, policy in ((1.0, "propagate"), (0.5, "propagate"), (0.5, "defer"), (0.5, "verify")):
        outs = []
        for chosen in (fuse, lambda *parts: None):
            checking.head_check = chosen
            exits = Exits.of(adapt(model), config, heads)
            early = EarlyExit(exits, threshold=[bar] * len(config.layers), policy=policy, engine="cuda")
            mask = torch.ones_like(ids)
            outs.append(
                model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, custom_generate=early)
            )
        checking.head_check = fuse
        same = torch.equal(outs[0].sequences, outs[1].sequences)
        depths = torch.equal(outs[0].exit_layers, outs[1].exit_layers)
        left = float((outs[0].exit_layers[:, 1:] < layers).double().mean())
        kernels = [[name for name in out.kernels if name in ("check_kernel", "decide_kernel")] for out in outs]
        ok = same and depths and kernels == [["check_kernel"], ["decide_kernel"]]
        rows.append({"threshold": bar, "policy": policy, "left": left, "kernels": kernels, "ok": ok})
        print(f"tiny, float32, {policy}, threshold {bar}: {left:.0%} left, {'the same' if ok else 'DIFFERENT'}")
    return rows


# how long?


def running(model: PreTrainedModel, batch: int) -> Machine:
    """A machine without exits in the middle of a text."""
    early = EarlyExit(
        Exits.untrained(adapt(model), "1/2"), measure="state_similarity", threshold="never", engine="cuda"
    )
    backbone, plan, _ = early.attach(model)
    decoder, _ = pick_decoder(backbone, plan, batch=batch, engine="cuda")
    ids = torch.randint(1, backbone.vocab_size, (batch, 64), device=backbone.device)
    with torch.no_grad():
        decoder.prefill(ids)
        decoder.step(ids[:, -1:], ())
    machine = getattr(decoder, "machine", None)
    assert isinstance(machine, Machine)
    return machine


def microseconds(machine: Machine, after: Callable[[], object] | None, keep: bool = False) -> float:
    """Median of a layer, and what comes ``after``, in a chain of them; ``keep``: h before the layer is kept."""
    p, n, on_gpu = machine.now, machine.backbone.n_layers, machine.now.h.device.type == "cuda"
    begun, repeats = p.h.clone(), REPEATS if on_gpu else 1

    @torch.no_grad()
    def work() -> None:
        p.h.copy_(begun)
        for index in range(repeats):
            machine.layers.layer(index % n, p, fresh=False, keep=machine.before if keep else None)
            if after is not None:
                after()

    work()
    if not on_gpu:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e6
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(REPLAYS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / repeats)
    return statistics.median(times[2:])


def timed(model: PreTrainedModel, layers: int, batch: int) -> Iterator[dict]:
    """A layer, the LM head after it, and every check after it; microseconds, a layer's own taken off."""
    machine, backbone = running(model, batch), adapt(model)
    p = machine.now
    layer = microseconds(machine, None)
    head = microseconds(machine, lambda: read_out(backbone, p.h, machine.logits)) - layer
    yield {"batch": batch, "what": "layer", "us": layer}
    yield {"batch": batch, "what": "LM head", "us": head, "of_a_layer": head / layer}
    for kind, inputs in itertools.product(HEADS, (("hidden",), INPUTS)):
        heads, readout = heads_for(backbone, layers, kind, inputs)
        for fuse in (True, False) if kind in FUSED else (False,):
            check = check_for(heads, readout, batch, fuse=fuse)
            if fuse and check.fused is None:
                reason = HeadCheck.obstacle(heads, readout, check.n_exits)
                print(f"{kind} on {'+'.join(inputs)} is not one kernel here: {reason}; try more --layers", flush=True)
                continue
            with torch.no_grad():
                check.ask(0, p.h, machine.before, None)  # later exits look at what the first one found
            for exit in (0, 1):

                def ask(check: Check = check, exit: int = exit) -> None:
                    check.ask(exit, p.h, machine.before, None)

                own = microseconds(machine, ask, check.sees_before) - layer
                yield {
                    "batch": batch,
                    "what": "check",
                    "head": kind,
                    "inputs": inputs,
                    "exit": "first" if exit == 0 else "later",
                    "kernels": check.kernels if fuse else (*check.kernels, "PyTorch's own"),
                    "us": own,
                    "of_a_layer": own / layer,
                }


def table(rows: list[dict]) -> None:
    """Print times, one line each."""
    for row in rows:
        what = row["what"]
        if what == "check":
            way = "one kernel" if "check_kernel" in row["kernels"] else "through PyTorch"
            what = f"{row['head']} on {'+'.join(row['inputs'])}, {row['exit']} exit, {way}"
        share = f"{row['of_a_layer']:6.1%} of a layer" if "of_a_layer" in row else ""
        print(f"batch {row['batch']}  {row['us']:8.2f} us  {share:>18}  {what}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mistral-7b", choices=list(RANDOM_SHAPES))
    parser.add_argument("--layers", type=int, default=4, help="layers of the model, at least 3")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = few_layers(args.shape, args.layers, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    twins = compared(adapt(model), args.layers, args.batches)
    texts = decoded(args.shape, device)
    times = [row for batch in args.batches for row in timed(model, args.layers, batch)]
    table(times)
    found = {
        "command": f"python {' '.join(sys.argv)}",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {name: metadata.version(name) for name in ("torch", "triton", "transformers")},
        "shape": args.shape,
        "layers": args.layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": time.monotonic() - started,
        "twins": twins,
        "texts": texts,
        "times": times,
    }
    out = Path(os.environ.get("OUT", "."))
    out.mkdir(parents=True, exist_ok=True)
    (out / f"checks-{args.shape}.json").write_text(json.dumps(found, indent=1) + "\n")
    ok = all(row["ok"] for row in (*twins, *texts))
    print(f"{'as it should be' if ok else 'TWINS DIFFER'}, {found['seconds']:.0f} s")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
