"""The shapes in signatures are really checked while tests run."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from dynamax_llm.exits.features import ExitFeatures, exit_features


def test_a_wrong_axis_is_caught() -> None:
    h = torch.randn(2, 3, 8)
    assert exit_features(h, h, torch.randn(2, 3, 11), None).values.shape == (2, 3, 10)
    with pytest.raises(TypeCheckError):
        exit_features(h, h[:, :2], torch.randn(2, 3, 11), None)
    with pytest.raises(TypeCheckError):
        exit_features(h, h, torch.randn(2, 11), None)
    with pytest.raises(TypeCheckError):
        ExitFeatures(torch.randn(2, 3, 10), torch.zeros(2, 4, dtype=torch.int64))
