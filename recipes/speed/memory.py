"""A GPU with no memory left: the eager engine runs with a warning, and ``engine="cuda"`` raises an error.

    PYTHONPATH=src python recipes/speed/memory.py

Builds a model at the width of Mistral 7B, with few layers and random weights; takes all memory of the GPU but a little;
and generates, so that recording the engine's graphs runs out of memory. Exits with 1 if any of this fails.
"""

from __future__ import annotations

import copy
import sys
import warnings

import torch
from transformers import AutoModelForCausalLM

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.common.random_models import SHAPES
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.heads import ExitHeads

#: Bytes left: enough for eager steps, not for the tables of three exits' heads (25 MB each).
LEFT, LAYERS = 56 << 20, 4


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
    device, shape = torch.device("cuda"), copy.deepcopy(SHAPES.lookup("mistral-7b"))
    shape.num_hidden_layers, shape.eos_token_id = LAYERS, None
    with device:
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).eval()
    backbone, config = adapt(model), ExitConfig(tuple(range(1, LAYERS)), LAYERS)
    exits = Exits.of(backbone, config, ExitHeads(config, backbone.width).to(device).eval())
    ids = torch.randint(1, model.config.vocab_size, (1, 16), device=device)

    def generate(engine: str | None):
        early, mask = EarlyExit(exits, threshold=0.5, engine=engine), torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, custom_generate=early)

    before = generate("eager")  # libraries are set up
    taken = fill(device)
    print(f"{sum(map(len, taken)) / 2**30:.1f} GiB taken, {torch.cuda.mem_get_info(device)[0] / 2**20:.0f} MiB left")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = generate(None)
    warned = [str(one.message) for one in caught if "engine 'eager'" in str(one.message)]
    print(f"no engine named: {out.engine} ran, with the warnings {warned}")
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
    passed = out.engine == "eager" and bool(warned) and torch.equal(out.sequences, before.sequences)
    passed = passed and "out of memory" in refused and after.engine == "cuda"
    print("as documented" if passed else "NOT AS DOCUMENTED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
