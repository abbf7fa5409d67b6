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
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import device_name, markdown, median_seconds, parsed, parser
from dynamax_llm.backbones import Backbone, Context, adapt
from dynamax_llm.backbones.cache import StackedCache
from dynamax_llm.backbones.loading import load
from dynamax_llm.evaluation.common.random_models import SHAPES

#: Tokens before the window, and vocabulary of a random shape: neither changes what is timed.
PROMPT, VOCABULARY = 32, 64
HEADS = (
    *("drafted, kept", "per drafted token: replay", "copies", "per rejection: replay together", "replay single"),
    *("copies", "break-even share of rejected windows: together", "single", "MiB: replay", "copies"),
)


class Drafted(NamedTuple):
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
    before, steps, after = saved(backbone, cache), [], []
    for place in range(PROMPT, PROMPT + count):
        steps.append(_run(backbone, h[:, place : place + 1], cache))
        after.append(saved(backbone, cache))
    return Drafted(cache, before, [torch.cat(inputs, dim=1) for inputs in zip(*steps, strict=True)]), after


def _run(backbone: Backbone, h: Tensor, cache: StackedCache) -> list[Tensor]:
    """All layers over h (1, T, d); returns the input of each."""
    read = []
    for index in range(backbone.n_layers):
        read.append(h)
        h = backbone.layer(index, h, cache, Context())
    return read


@torch.no_grad()
def replay(backbone: Backbone, window: Drafted, kept: int, together: bool) -> None:
    """From the state before the window to the state after its first ``kept`` tokens."""
    for index, x in enumerate(window.inputs):
        for part in [x[:, :kept]] if together else x[:, :kept].split(1, dim=1):
            backbone.update_state(index, part, window.cache, Context())


def measure(backbone: Backbone, width: int, repeats: int) -> list[str]:
    """One line of the table: a window of ``width`` drafted tokens of which half are kept when it is rejected."""
    window, after = draft(backbone, width)
    cache, kept = window.cache, max(width // 2, 1)
    copying, back, together, single = (
        1000 * median_seconds(call, backbone.device, repeats)
        for call in (
            lambda: saved(backbone, cache),
            lambda: restore(backbone, cache, after[kept - 1]),
            lambda: replay(backbone, window, kept, together=True),
            lambda: replay(backbone, window, kept, together=False),
        )
    )
    state, inputs = (sum(part.nbytes for part in group) / 2**20 for group in (window.before, window.inputs))
    row = [f"{width}, {kept}", f"{copying / width:.3f}", f"{copying:.3f}", f"{back + together:.2f}"]
    row += [f"{back + single:.2f}", f"{back:.3f}"]
    row += [f"{(width - 1) * copying / one:.3f}" for one in (together, single)]
    return [*row, f"{state + inputs:.1f}", f"{width * state:.1f}"]


def main() -> None:
    made = parser(__doc__, "device")
    made.add_argument("--shape", help="a large Mamba shape instead of mamba-ee: codestral-mamba-7b")
    made.add_argument("--layers", type=int, default=4, help="layers of a large shape")
    made.add_argument("--windows", default="4,8,16")
    made.add_argument("--repeats", type=int, default=20)
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parsed(made)
    dtype = getattr(torch, args.dtype)
    if args.shape is None:
        backbone = adapt(load("mamba-ee", dtype=dtype, device_map=args.device)[0])
    else:
        config = copy.deepcopy(SHAPES.lookup(args.shape))
        config.num_hidden_layers, config.vocab_size = args.layers, VOCABULARY
        with torch.device(args.device):
            backbone = adapt(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())
    window, _ = draft(backbone, 1)
    with torch.no_grad():
        token = median_seconds(lambda: _run(backbone, window.inputs[0], window.cache), backbone.device, args.repeats)
    print(
        f"{args.shape or 'mamba-ee'}, {backbone.n_layers} layers, {args.dtype}, {device_name(args.device)}, torch "
        f"{torch.__version__}; milliseconds, medians of {args.repeats}; one token takes {1000 * token:.2f}\n"
    )
    print(markdown(HEADS, [measure(backbone, width, args.repeats) for width in map(int, args.windows.split(","))]))


if __name__ == "__main__":
    main()
