"""Measure a reference-like backbone on the held-out documents, on the CPU.

    python recipes/reference/evaluate.py MODEL_DIR --data DIR --tokens 100e3

Prints loss and agreement per layer, validation loss, bits per byte (comparable across tokenizers) and the oracle
mean depth, for any folder with a model of a supported family and its tokenizer.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mixture import encode, held_out_documents
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import parsed, parser, write_json
from dynamax_llm.backbones import adapt
from dynamax_llm.text.batches import Batch
from dynamax_llm.training.tuning.measure import measure


def spread(tokens: Tensor, wanted: int, length: int) -> Tensor:
    """Windows (W, length + 1) of a token stream, spread evenly, about ``wanted`` tokens in all."""
    count = (len(tokens) - 1) // length
    starts = torch.linspace(0, count - 1, max(1, min(count, wanted // length))).long() * length
    return tokens[starts[:, None] + torch.arange(length + 1)]


def validation(model: PreTrainedModel, held_out: Tensor, bytes_per_token: float | None = None) -> dict[str, Any]:
    """Loss, accuracy, agreement per layer and oracle depth over windows (W, T + 1), as metrics.json records them."""
    backbone, depth = adapt(model), model.config.num_hidden_layers
    batches = [Batch(part.long(), torch.ones(part.shape, dtype=torch.bool)) for part in held_out.split(4)]
    found = measure(backbone, batches, tuple(range(1, depth)), 0.98)
    shares = found.agreement_per_layer
    result = {
        "tokens": found.tokens,
        "loss": found.loss,
        "accuracy": float((found.choices == held_out[:, 1:].flatten()).double().mean()),
        "oracle_mean_depth": found.oracle_depth,
        "loss_per_layer": [round(value, 4) for value in found.loss_per_layer],
        "agreement_per_layer": [round(value, 4) for value in shares],
        "agreement_at_quarters": [round(shares[round(depth * q) - 1], 4) for q in (0.25, 0.5, 0.75)],
    }
    if bytes_per_token:
        result["bits_per_byte"] = found.loss / math.log(2) / bytes_per_token
    return result


def table(result: dict[str, Any]) -> str:
    """The measurement as text: one line per layer, then the summary."""
    depth = len(result["loss_per_layer"])
    rows = zip(result["loss_per_layer"], result["agreement_per_layer"], strict=True)
    lines = [f"{i:5d}  {i / depth:5.3f}  {loss:5.3f}  {same:9.4f}" for i, (loss, same) in enumerate(rows, 1)]
    quarters = " ".join(f"{x:.3f}" for x in result["agreement_at_quarters"])
    bits = f"; bits per byte {result['bits_per_byte']:.4f}" if "bits_per_byte" in result else ""
    return "\n".join(
        [
            "layer  depth   loss  agreement",
            *lines,
            f"validation loss {result['loss']:.4f}{bits}; accuracy {result['accuracy']:.4f}; "
            f"{result['tokens']:,} tokens",
            f"agreement at 1/4, 1/2, 3/4 depth {quarters}; oracle mean depth {result['oracle_mean_depth']:.4f}",
        ]
    )


def windows(model_dir: Path, data: Path, tokens: int, length: int) -> tuple[Tensor, float]:
    """Held-out windows (W, length + 1) in the model's own tokens, spread over all sources; bytes per token."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    texts = [text for group in held_out_documents(data).values() for text in group]
    packed = torch.from_numpy(np.concatenate(encode(tokenizer, texts)).astype(np.int64))
    if len(packed) <= length:
        raise SystemExit(f"the held-out documents under {data} hold fewer than {length} tokens; lower --length")
    size = sum(len(text.encode()) for text in texts) / (len(packed) - len(texts))
    return spread(packed, tokens, length), size


def main() -> None:
    made = parser(__doc__)
    made.add_argument("model", type=Path, help="folder with config.json, model.safetensors, tokenizer.json")
    made.add_argument("--data", type=Path, required=True, help="folder laid out like DIR")
    made.add_argument("--tokens", type=float, default=100e3, help="held-out tokens to measure on")
    made.add_argument("--length", type=int, default=1024, help="window length")
    made.add_argument("--json", type=Path, help="also write the measurement to this file")
    args = parsed(made)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, local_files_only=True).eval()
    held_out, size = windows(args.model, args.data, int(args.tokens), args.length)
    result = validation(model, held_out, size)
    print(table(result))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
