"""Does an exported draft give the draft's own logits in the library ``speculators``?

python -m recipes.export.check MODEL --exits DRAFT --folder FOLDER --text file.txt
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from recipes.common import parsed, parser
from torch import Tensor

from dynamax_llm.backbones import adapt
from dynamax_llm.backbones.loading import load
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.readouts.draft import DraftReadout
from dynamax_llm.traces.chains import chain
from dynamax_llm.traces.collect import hidden_at

#: Steps of a chain; largest difference of logits that passes, in float32.
STEPS, TOLERANCE = 4, 1e-3


def theirs(folder: str, tapped: Tensor, ids: Tensor) -> list[Tensor]:
    """The library's logits (T - 1, K) per step, from taps side by side (1, T - 1, N d) and ids (1, T)."""
    try:
        from speculators import SpeculatorModel, SpeculatorModelConfig
    except ImportError as error:
        sys.exit(f"this check needs the library speculators ({error})")
    config = SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    draft = SpeculatorModel.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    logits: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        logits.append(output[0])

    draft.lm_head.register_forward_hook(keep)
    draft(tapped, ids[:, 1:], torch.zeros_like(ids[:, 1:]), ttt_steps=STEPS)
    return logits


@torch.no_grad()
def main() -> None:
    made = parser(__doc__, "model", "text")
    made.add_argument("--exits", required=True, help="the draft")
    made.add_argument("--folder", required=True, help="what it was exported to, in float32")
    made.add_argument("--length", type=int, default=90, help="tokens of the text")
    args = parsed(made)
    model, tokenizer = load(args.model, dtype="float32")
    backbone, exits = adapt(model), Exits.from_pretrained(args.exits)
    readout = exits.readout(backbone)
    assert isinstance(readout, DraftReadout)
    ids = tokenizer(Path(args.text).read_text(), return_tensors="pt").input_ids[:, : args.length]
    hidden = hidden_at(backbone, (0, *readout.taps), ids)
    tapped = [hidden[tap] for tap in readout.taps]
    found = theirs(args.folder, torch.cat(tapped, dim=-1)[:, :-1], ids)
    forks, worst = torch.arange(1, ids.shape[1] - STEPS), 0.0
    middle = ids.shape[1] // 2
    states = readout.observe(hidden[0][:, :middle], [h[:, :middle] for h in tapped], readout.initial_state(1))
    for step, (outputs, _) in enumerate(chain(readout._draft, readout.taps, hidden, forks, STEPS)):
        ours, other = readout.scores(0, outputs)[0], found[step][: len(forks)]
        new = hidden[0][:, middle + step : middle + step + 1]
        output, state = readout.transform(0, new, states[0])
        assert state is not None
        states = [state]
        alone = float((readout.scores(0, output)[0, 0] - found[step][middle - 1]).abs().max())
        largest, same = float((ours - other).abs().max()), float((ours.argmax(-1) == other.argmax(-1)).float().mean())
        worst = max(worst, largest, alone)
        print(f"step {step + 1}: largest difference {largest:.1e}, one at a time {alone:.1e}, same token {same:.1%}")
    sys.exit(0 if worst <= TOLERANCE else f"differences up to {worst:.1e}")


if __name__ == "__main__":
    main()
