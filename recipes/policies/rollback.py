"""Two ways of taking tokens back from SSM state: one snapshot and a replay of inputs, or a copy per drafted token.

    python recipes/policies/rollback.py [--windows 4,8,16] [--repeats 20]                 # mamba-ee, CPU, float32
    python recipes/policies/rollback.py --shape codestral-mamba-7b --layers 4 --device cuda --dtype bfloat16

    replay    what engines/journal.py does. Before a window conv windows and SSM states are copied once, and the inputs
              of every layer are kept (they exist anyway). A rejection restores the copy and runs the state update over
              the k tokens that stay: ``together`` in one multi-token pass per layer, as the journal does, or
              ``single``, one token after the other.
    copies    conv windows and SSM states are copied after every drafted token. A rejection restores one of the copies.
              It needs layers that run token by token: a catch-up pass over many tokens leaves no state in between.

With W drafted tokens, s the time of copying all state and R(k) that of a replay, a window costs s + r (s + R(k)) or
W s + r s when a share r of the windows is rejected: replay is cheaper up to the break-even r = (W - 1) s / R(k).
Copying and restoring move the same bytes; both are timed. All layers' state is copied in one operation per tensor.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from dynamax_llm.backbones import Backbone, Context, adapt
from dynamax_llm.backbones.cache import StackedCache
from dynamax_llm.backbones.loading import load
from dynamax_llm.evaluation.compare.shapes import SHAPES

#: Tokens before the window, and vocabulary of a random shape: neither changes what is timed.
PROMPT, VOCABULARY = 32, 64


@dataclass(frozen=True)
class Drafted:
    """A window that was drafted: inputs (1, W, d) of every layer, and the state before it."""

    cache: StackedCache
    before: list[Tensor]
    inputs: list[Tensor]


def parts(backbone: Backbone, cache: StackedCache) -> list[Tensor]:
    """All recurrent state, as views."""
    return cache.recurrent_parts(0, backbone.n_layers)


def saved(backbone: Backbone, cache: StackedCache) -> list[Tensor]:
    """A copy of all recurrent state."""
    return [part.clone() for part in parts(backbone, cache)]


def restore(backbone: Backbone, cache: StackedCache, states: list[Tensor]) -> None:
    """Put a copy back."""
    for part, state in zip(parts(backbone, cache), states, strict=True):
        part.copy_(state)


@torch.no_grad()
def draft(backbone: Backbone, count: int) -> tuple[Drafted, list[list[Tensor]]]:
    """``count`` random tokens one at a time after a prompt: the window, and a copy of the state after each token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, min(VOCABULARY, backbone.vocab_size), (1, PROMPT + count), generator=generator)
    h, cache = backbone.embed(ids.to(backbone.device)), backbone.new_cache()
    _run(backbone, h[:, :PROMPT], cache)
    before = saved(backbone, cache)
    inputs: list[list[Tensor]] = [[] for _ in range(backbone.n_layers)]
    after = []
    for place in range(PROMPT, PROMPT + count):
        for index, x in enumerate(_run(backbone, h[:, place : place + 1], cache)):
            inputs[index].append(x)
        after.append(saved(backbone, cache))
    return Drafted(cache, before, [torch.cat(part, dim=1) for part in inputs]), after


def _run(backbone: Backbone, h: Tensor, cache: StackedCache) -> list[Tensor]:
    """All layers over h (1, T, d); returns what each of them read."""
    read = []
    for index in range(backbone.n_layers):
        read.append(h)
        h = backbone.layer(index, h, cache, Context())
    return read


@torch.no_grad()
def replay(backbone: Backbone, window: Drafted, kept: int, together: bool) -> None:
    """From the state before the window to the state after its first ``kept`` tokens."""
    for index, x in enumerate(window.inputs):
        runs = [x[:, :kept]] if together else x[:, :kept].split(1, dim=1)
        for part in runs:
            backbone.update_state(index, part, window.cache, Context())


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median wall clock of a call, the device's work included."""
    taken = []
    for turn in range(repeats + 2):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn >= 2:  # the first ones warm caches and allocator
            taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)


def measure(backbone: Backbone, width: int, repeats: int) -> list[str]:
    """One line of the table: a window of ``width`` drafted tokens of which half are kept when it is rejected."""
    window, after = draft(backbone, width)
    cache, device, kept = window.cache, backbone.device, max(width // 2, 1)

    def timed(call: Callable[[], object]) -> float:
        return milliseconds(call, device, repeats)

    state = sum(part.nbytes for part in window.before)
    inputs = sum(part.nbytes for part in window.inputs)
    copying = timed(lambda: saved(backbone, cache))
    back = timed(lambda: restore(backbone, cache, after[kept - 1]))
    together = timed(lambda: replay(backbone, window, kept, together=True))
    single = timed(lambda: replay(backbone, window, kept, together=False))
    spared = (width - 1) * copying
    return [
        f"{width}, {kept}",
        f"{copying / width:.3f}",
        f"{copying:.3f}",
        f"{back + together:.2f}",
        f"{back + single:.2f}",
        f"{back:.3f}",
        f"{spared / together:.3f}",
        f"{spared / single:.3f}",
        f"{(state + inputs) / 2**20:.1f}",
        f"{width * state / 2**20:.1f}",
    ]


HEADS = (
    "drafted, kept",
    "per drafted token: replay",
    "copies",
    "per rejection: replay together",
    "replay single",
    "copies",
    "break-even share of rejected windows: together",
    "single",
    "MiB: replay",
    "copies",
)


def token_milliseconds(backbone: Backbone, repeats: int) -> float:
    """One token through all layers, for scale."""
    window, _ = draft(backbone, 1)
    h = window.inputs[0]
    with torch.no_grad():
        return milliseconds(lambda: _run(backbone, h, window.cache), backbone.device, repeats)


def find(args: argparse.Namespace) -> Backbone:
    """The shipped backbone, or a stack of ``--layers`` random layers of a large shape."""
    dtype = getattr(torch, args.dtype)
    if args.shape is None:
        return adapt(load("mamba-ee", dtype=dtype, device_map=args.device)[0])
    config = copy.deepcopy(SHAPES.lookup(args.shape))
    config.num_hidden_layers, config.vocab_size = args.layers, VOCABULARY
    with torch.device(args.device):
        return adapt(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="a large Mamba shape instead of mamba-ee: codestral-mamba-7b")
    parser.add_argument("--layers", type=int, default=4, help="layers of a large shape")
    parser.add_argument("--windows", default="4,8,16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    backbone = find(args)
    place = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"CPU, {args.threads} thread(s)"
    print(
        f"{args.shape or 'mamba-ee'}, {backbone.n_layers} layers, {args.dtype}, {place}, torch {torch.__version__}; "
        f"milliseconds, medians of {args.repeats}; one token through these layers takes "
        f"{token_milliseconds(backbone, args.repeats):.2f}\n"
    )
    print(f"| {' | '.join(HEADS)} |\n| {' | '.join(['---'] * len(HEADS))} |")
    for width in map(int, args.windows.split(",")):
        print(f"| {' | '.join(measure(backbone, width, args.repeats))} |", flush=True)


if __name__ == "__main__":
    main()
