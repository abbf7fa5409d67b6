"""Measure a reference-like backbone on the held-out documents, on the CPU.

    python recipes/reference/evaluate.py MODEL_DIR --data DIR --tokens 100e3

Prints loss and agreement per layer, validation loss, bits per byte (comparable across tokenizers) and the oracle
mean depth, for any folder with a MistralForCausalLM or a Mamba2ForCausalLM of one group and its tokenizer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from layers import Stack
from measure import measure, table
from mixture import encode, held_out_documents
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM


def windows(model_dir: Path, data: Path, tokens: int, length: int) -> tuple[Tensor, float]:
    """Held-out windows (W, length + 1) in the model's own tokens, spread over all sources; bytes per token."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    texts = [text for group in held_out_documents(data).values() for text in group]
    packed = torch.from_numpy(np.concatenate(encode(tokenizer, texts)).astype(np.int64))
    count = (len(packed) - 1) // length
    if count < 1:
        raise SystemExit(f"the held-out documents under {data} hold fewer than {length} tokens; lower --length")
    starts = torch.linspace(0, count - 1, max(1, min(count, tokens // length))).long() * length
    size = sum(len(text.encode()) for text in texts) / (len(packed) - len(texts))
    return packed[starts[:, None] + torch.arange(length + 1)], size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with config.json, model.safetensors, tokenizer.json")
    parser.add_argument("--data", type=Path, required=True, help="folder laid out like DIR")
    parser.add_argument("--tokens", type=float, default=100e3, help="held-out tokens to measure on")
    parser.add_argument("--length", type=int, default=1024, help="window length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the measurement to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, local_files_only=True).eval()
    held_out, size = windows(args.model, args.data, int(args.tokens), args.length)
    result = measure(Stack(model), held_out, batch=4, bytes_per_token=size)
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
