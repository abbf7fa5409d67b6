"""The shapes in signatures are really checked while tests run."""

from __future__ import annotations

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError

from dynamax_llm.exits.features import ExitFeatures, exit_features
from dynamax_llm.shapes import Scores
from tests.checking import checked


def test_a_wrong_axis_is_caught() -> None:
    h = torch.randn(2, 3, 8)
    assert exit_features(h, h, torch.randn(2, 3, 11), None).values.shape == (2, 3, 10)
    with pytest.raises(TypeCheckError):
        exit_features(h, h[:, :2], torch.randn(2, 3, 11), None)
    with pytest.raises(TypeCheckError):
        exit_features(h, h, torch.randn(2, 11), None)
    with pytest.raises(TypeCheckError):
        ExitFeatures(torch.randn(2, 3, 10), torch.zeros(2, 4, dtype=torch.int64))


def test_what_was_seen_is_not_checked_again_and_what_is_new_is() -> None:
    """Inputs that passed do not vouch for another output, nor one dtype for another."""
    outputs = [torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int64)]

    def turned(h: Scores) -> Scores:
        return outputs.pop(0)

    check = checked(turned, beartype)
    assert [check(torch.zeros(2, 3)).shape for _ in range(2)] == [(2, 3)] * 2
    for _ in range(2):
        with pytest.raises(TypeCheckError):
            check(torch.zeros(2, 3))
    with pytest.raises(TypeCheckError):
        check(torch.zeros(2, 3, dtype=torch.int64))
    assert outputs == []  # a wrong input is refused before the function is called
