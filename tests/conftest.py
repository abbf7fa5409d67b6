"""Shared by all tests: offline, one thread a worker, and jaxtyping-style shape checks where tests ask for them."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

torch.set_num_threads(1)  # tiny models: threads only add noise


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
