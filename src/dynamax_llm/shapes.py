"""Names for the tensors that pass between rooms, with their axes. Tests check them at run time (tests/conftest.py)."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

Ids = Int[Tensor, "batch tokens"]
Flags = Bool[Tensor, "batch tokens"]
Hidden = Float[Tensor, "batch tokens width"]
Logits = Float[Tensor, "batch tokens choices"]  # over the vocabulary, or over candidates
Scores = Float[Tensor, "batch tokens"]
Statistics = Float[Tensor, "batch tokens statistics"]
Choices = Int[Tensor, "batch tokens choices"]
NextLogits = Float[Tensor, "batch choices"]
RowIds = Int[Tensor, " batch"]
RowFlags = Bool[Tensor, " batch"]
