"""A GPU with no memory left: eager takes over and says so, and ``engine="cuda"`` raises an error that says why.

    PYTHONPATH=src python recipes/speed/memory.py

Builds a model at the width of Mistral 7B, with few layers and random weights; takes all memory of the GPU but a little;
and generates, so that making the engine's programs really runs out of memory. Exits with 1 if it is not as promised.
"""

from __future__ import annotations

import sys
import warnings

import torch
from checks import few_layers, heads_for

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.errors import UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import INPUTS

#: Bytes left: enough for eager steps, not for the tables of three exits' heads (25 MB each).
LEFT = 56 << 20
LAYERS = 4


def fill(device: torch.device) -> list[torch.Tensor]:
    """All memory but ``LEFT``, in plain allocations."""
    torch.cuda.empty_cache()
    taken = []
    for size in (1 << 30, 64 << 20, 4 << 20):
        while torch.cuda.mem_get_info(device)[0] > LEFT + size:
            taken.append(torch.empty(size, dtype=torch.uint8, device=device))
    return taken


def main() -> int:
    if not torch.cuda.is_available():
        print("This needs a CUDA device.")
        return 1
    device = torch.device("cuda")
    model = few_layers("mistral-7b", LAYERS, device, torch.bfloat16)
    heads, readout = heads_for(adapt(model), LAYERS, "mlp", INPUTS)
    exits = Exits.of(adapt(model), readout.config, heads)
    ids = torch.randint(1, model.config.vocab_size, (1, 16), device=device)

    def generate(engine: str | None):
        early = EarlyExit(exits, threshold=0.5, engine=engine)
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, custom_generate=early)

    before = generate("eager")  # libraries are set up
    taken = fill(device)
    print(f"{sum(map(len, taken)) / 2**30:.1f} GiB taken, {torch.cuda.mem_get_info(device)[0] / 2**20:.0f} MiB left")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        out = generate(None)
    said = [str(one.message) for one in heard if "engine 'eager'" in str(one.message)]
    print(f"no engine named: {out.engine} ran, and said: {said}")
    try:
        generate("cuda")
        refused = ""
    except UsageError as error:
        refused = str(error)
    print(f"engine='cuda': {refused or 'ran'}")
    del taken
    torch.cuda.empty_cache()
    after = generate(None)
    print(f"with memory again: {after.engine} ran")
    kept = out.engine == "eager" and bool(said) and torch.equal(out.sequences, before.sequences)
    kept = kept and "out of memory" in refused and after.engine == "cuda"
    print("as promised" if kept else "NOT AS PROMISED")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
