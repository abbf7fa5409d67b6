"""How fast prompts and texts are read on a CPU by Mamba-2 layers: our pass over several tokens and the stock mixers'.

    python recipes/cpu/mamba_prompt.py --text FILE [--repeats 9] [--threads 1] [--model mamba-ee]

Both in one process, in alternating pairs: tokens/s by medians, the ratio as the median of neighbouring runs. Also the
greatest difference in h after the last layer, relative to its greatest value, in logits, and in the states left in the
cache. ``window`` rows are passes over few tokens that continue the state of a prompt, as under ``verify``.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import conditions, markdown, parsed, parser
from dynamax_llm.backbones import Backbone, StackedCache, adapt, mixers
from dynamax_llm.backbones.loading import load
from dynamax_llm.evaluation.common.timing import paired, seconds
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.readouts.base import build_readout
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.collect import collect_exits, forward

HEADER = ("pass", "tokens", "stock, tokens/s", "ours, tokens/s", "times as fast", "h", "logits", "conv", "SSM")
PAST = 100  # tokens before a window
CAN_RUN = mixers.can_run


def choose(ours: bool) -> None:
    """Let multi-token passes be ours, or the stock mixers'."""
    mixers.can_run = CAN_RUN if ours else lambda mixer, h: False


def read(backbone: Backbone, ids: Tensor, cache: StackedCache | None, past: int = 0) -> Tensor:
    """h (B, T, d) after all layers."""
    h = backbone.embed(ids)
    ctx = backbone.context(h, past=past)
    for index in range(backbone.n_layers):
        h = backbone.layer(index, h, cache, ctx)
    return h


def differences(backbone: Backbone, ids: Tensor, prompt: Tensor | None) -> list[str]:
    """Of h, logits, conv windows and SSM states after a pass over ids (B, T), which may follow a prompt."""
    found = []
    for ours in (False, True):
        cache = backbone.new_cache()
        if prompt is not None:
            choose(False)
            read(backbone, prompt, cache)
        choose(ours)
        h = read(backbone, ids, cache, 0 if prompt is None else prompt.shape[1])
        found.append([h / h.abs().max(), backbone.readout(h), *cache.recurrent_parts(0, backbone.n_layers)])
    return [f"{float((one - other).abs().max()):.0e}" for one, other in zip(*found, strict=True)]


def row(label: str, tokens: int, work: Callable[[], object], repeats: int, apart: list[str]) -> list[object]:
    """One line of the table for ``work``, which reads this many tokens."""
    times: dict[bool, list[float]] = {True: [], False: []}

    def side(ours: bool) -> float:
        choose(ours)
        times[ours].append(seconds(work))
        return times[ours][-1]

    found = paired(lambda: side(False), lambda: side(True), repeats)
    rates = [f"{tokens / statistics.median(times[ours][1:]):.0f}" for ours in (False, True)]
    speed = f"{found.median:.2f} ({found.least:.2f} to {found.greatest:.2f})"
    return [label, tokens, *rates, speed, *apart, *[""] * (4 - len(apart))]


@torch.no_grad()
def main() -> None:
    made = parser(__doc__)
    made.add_argument("--text", type=Path, required=True, help="a text file, read from its start")
    made.add_argument("--model", default="mamba-ee")
    made.add_argument("--repeats", type=int, default=9)
    args = parsed(made)
    model, tokenizer = load(args.model)
    backbone, repeats = adapt(model), args.repeats
    text = args.text.read_text(encoding="utf-8")[:60000]
    ids = tokenizer(text, return_tensors="pt").input_ids
    rows = []
    for batch, length in ((1, 64), (1, 130), (1, 512), (1, 2048), (4, 256)):
        part = ids[:, : batch * length].view(batch, length)
        work = lambda part=part: read(backbone, part, backbone.new_cache())  # noqa: E731
        rows.append(row(f"prompt, {batch} x {length}", part.numel(), work, repeats, differences(backbone, part, None)))
    prompt = ids[:, :PAST]
    cache = backbone.new_cache()
    read(backbone, prompt, cache)
    for length in (4, 8):
        part = ids[:, PAST : PAST + length]
        apart = differences(backbone, part, prompt)
        rows.append(
            row(f"window of {length}", length, lambda part=part: read(backbone, part, cache, PAST), 3 * repeats, apart)
        )
    exits = Exits.untrained(backbone, ("1/4", "1/2", "3/4"))
    readout, part = build_readout(backbone, exits.config), ids[:, :1024].view(4, 256)
    batch = Batch(part, torch.ones_like(part, dtype=torch.bool))
    rows.append(row("forward, 4 x 256", 1024, lambda: forward(backbone, exits.config.layers, part), repeats, []))
    rows.append(row("collect_exits, 4 x 256", 1024, lambda: collect_exits(backbone, readout, batch), repeats, []))
    print(json.dumps(conditions()), "float32\n")
    print(markdown(HEADER, rows))


if __name__ == "__main__":
    main()
