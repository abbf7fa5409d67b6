"""A batch's real tokens side by side, and back.

Shapes: B rows, T tokens, n real (unpadded) tokens of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax_llm.exits.features import ExitFeatures


@dataclass(frozen=True)
class Packing:
    """A batch's real tokens side by side, and back. Where they lie is found on the CPU: no device is waited for."""

    mask: Tensor  # (B, T) bool, True at tokens
    places: Tensor | None  # (n,) of the real tokens among all B T; None where all are real

    @classmethod
    def of(cls, mask: Tensor, device: torch.device) -> Packing:
        """For a mask (B, T) on the CPU, and values on ``device``."""
        places = None if bool(mask.all()) else mask.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
        return cls(mask.to(device, non_blocking=True), places)

    def pack(self, values: Tensor) -> Tensor:
        """The real tokens (n, ...) of values (B, T, ...)."""
        rows = values.flatten(0, 1)
        return rows if self.places is None else rows[self.places]

    def unpack(self, values: Tensor) -> Tensor:
        """Inverse of ``pack``, zero at pads."""
        if self.places is not None:
            values = values.new_zeros(self.mask.numel(), *values.shape[1:]).index_copy_(0, self.places, values)
        return values.unflatten(0, self.mask.shape)

    def unpack_features(self, features: ExitFeatures) -> ExitFeatures:
        """What heads read of features (1, n, ...), as (B, T, ...)."""
        token, rows = (None if part is None else self.unpack(part[0]) for part in (features.token, features.rows))
        return ExitFeatures(self.unpack(features.values[0]), token, rows=rows)
