"""What a generation cost, as counted while it ran."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Spent:
    """What decoding did after the prompt, as counted while it ran.

    ``passes``: readings of a layer's weights for the batch. The rest is None or 0 where each token pays for itself
    when it leaves: multiply-accumulates in layers, catch-up included; ``taken`` (S, B) where every decoded token left,
    those taken back included, -1 for rows that had ended; complete readouts beside those; bytes that waited at most;
    tokens, times layers, whose recurrent state was replayed.
    """

    passes: int
    layer_macs: int | None = None
    taken: Tensor | None = None
    readouts: int = 0
    window_bytes: int = 0
    replayed: int = 0
