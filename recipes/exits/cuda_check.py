"""Early exit on a GPU gives the CPU's tokens and depths: greedy, float32, both shipped backbones, every shipped head.

python recipes/exits/cuda_check.py
"""

from __future__ import annotations

import torch
from transformers.utils import logging

from dynamax_llm.backbones.loading import REFERENCE_BACKBONES, load, shipped_exits
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import HEADS

PROMPTS = ["The river rises in the north and", "User: Hi, I want to find a restaurant.\nAssistant:"]


def main() -> None:
    logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = False
    for name in REFERENCE_BACKBONES:
        rows = {}
        for device in ("cpu", "cuda"):
            model, tokenizer = load(name, dtype="float32", device_map=device)
            inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True).to(device)
            for head in HEADS:
                early = EarlyExit(Exits.from_pretrained(shipped_exits(name, head)), threshold=0.85)
                out = model.generate(**inputs, custom_generate=early, max_new_tokens=48, do_sample=False)
                rows[device, head] = out.sequences.cpu(), out.exit_layers.cpu()
        for head in HEADS:
            pairs = zip(rows["cpu", head], rows["cuda", head], strict=True)
            same = [float((a == b).float().mean()) if a.shape == b.shape else 0.0 for a, b in pairs]
            print(f"{name} {head}: equal tokens {same[0]:.3f}, equal depths {same[1]:.3f}", flush=True)


if __name__ == "__main__":
    main()
