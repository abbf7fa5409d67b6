"""What a backbone's exits are worth on held-out tokens: loss and agreement per layer, oracle mean depth."""

from __future__ import annotations

import math
from typing import Any

import torch
from layers import Stack
from torch import Tensor

READOUT_SLICE = 4096  # tokens whose (n, V) logits are held at once


@torch.no_grad()
def measure(stack: Stack, windows: Tensor, batch: int, bytes_per_token: float | None = None) -> dict[str, Any]:
    """The layer table over `windows` (W, T + 1): inputs are [:, :-1], targets [:, 1:].

    Agreement: share of tokens at which the layer's argmax is the last layer's. Oracle depth: the first layer
    whose argmax is the last layer's, as a share of all layers.
    """
    device = stack.head.device
    depth = stack.depth
    losses = torch.zeros(depth, dtype=torch.float64, device=device)
    agreements = torch.zeros(depth, dtype=torch.float64, device=device)
    oracle = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.float64, device=device)
    head = stack.head.to(stack.dtype)
    for start in range(0, len(windows), batch):
        part = windows[start : start + batch].to(device).long()
        states = stack.states(part[:, :-1])
        flat = torch.stack([stack.normed(h).flatten(0, 1) for h in states])  # (L, N, d)
        targets = part[:, 1:].flatten()
        for at in range(0, len(targets), READOUT_SLICE):
            aim = targets[at : at + READOUT_SLICE]
            choices = []
            for layer in range(depth):
                logits = (flat[layer, at : at + READOUT_SLICE] @ head.T).float()
                losses[layer] += torch.nn.functional.cross_entropy(logits, aim, reduction="sum")
                choices.append(logits.argmax(-1))
            same = torch.stack(choices) == choices[-1]  # (L, n)
            agreements += same.sum(1)
            oracle += (same.int().argmax(0) + 1).sum() / depth
            correct += (choices[-1] == aim).sum()
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    loss = float(losses[-1] / tokens)
    share = (agreements / tokens).tolist()
    result = {
        "tokens": tokens,
        "loss": loss,
        "accuracy": float(correct / tokens),
        "oracle_mean_depth": float(oracle / tokens),
        "loss_per_layer": [round(x, 4) for x in (losses / tokens).tolist()],
        "agreement_per_layer": [round(x, 4) for x in share],
        "agreement_at_quarters": [round(share[round(depth * q) - 1], 4) for q in (0.25, 0.5, 0.75)],
    }
    if bytes_per_token:
        result["bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return result


def table(result: dict[str, Any]) -> str:
    """The measurement as text: one line per layer, then the summary."""
    depth = len(result["loss_per_layer"])
    lines = ["layer  depth   loss  agreement"]
    rows = zip(result["loss_per_layer"], result["agreement_per_layer"], strict=True)
    lines += [f"{i:5d}  {i / depth:5.3f}  {loss:5.3f}  {same:9.4f}" for i, (loss, same) in enumerate(rows, 1)]
    quarters = " ".join(f"{x:.3f}" for x in result["agreement_at_quarters"])
    bits = f"; bits per byte {result['bits_per_byte']:.4f}" if "bits_per_byte" in result else ""
    lines += [
        f"validation loss {result['loss']:.4f}{bits}; accuracy {result['accuracy']:.4f}; {result['tokens']:,} tokens",
        f"agreement at 1/4, 1/2, 3/4 depth {quarters}; oracle mean depth {result['oracle_mean_depth']:.4f}",
    ]
    return "\n".join(lines)
