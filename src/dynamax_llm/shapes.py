"""Names for the tensors that pass between rooms, with their axes. Tests check them at run time (tests/conftest.py).

jaxtyping, which the checks need, comes with the development tools; without it every name is a plain Tensor.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING or find_spec("jaxtyping") is not None:
    from jaxtyping import Bool, Float, Int
else:

    class _Shape:
        def __class_getitem__(cls, item: tuple[type, str]) -> Any:
            return item[0]

    Bool = Float = Int = _Shape

Ids = Int[Tensor, "batch tokens"]
Flags = Bool[Tensor, "batch tokens"]
Hidden = Float[Tensor, "batch tokens width"]
Logits = Float[Tensor, "batch tokens choices"]  # over the vocabulary, or over candidates
Spoken = Float[Tensor, "batch tokens spoken"]  # over the tokens that a readout speaks
Scores = Float[Tensor, "batch tokens"]
Statistics = Float[Tensor, "batch tokens statistics"]
Choices = Int[Tensor, "batch tokens choices"]
NextLogits = Float[Tensor, "batch choices"]
RowIds = Int[Tensor, " batch"]
RowFlags = Bool[Tensor, " batch"]
