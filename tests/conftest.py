"""Shared by all tests: offline, one thread a worker, and jaxtyping-style shape checks where tests ask for them."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Kernels of the GPU engine run in Triton's interpreter here; on a machine with a GPU tests run the real thing.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from jaxtyping import install_import_hook

from tests.checking import check_once_per_shape, patch_triton_once

#: Rooms whose shapes are checked on every call. Must come before anything imports them.
CHECKED = (
    "dynamax_llm.backbones",
    "dynamax_llm.exits.features",
    "dynamax_llm.exits.readouts.base",
    "dynamax_llm.decoding.decoder",
    "dynamax_llm.engines.eager",
    "dynamax_llm.traces.teacher_forced",
)
check_once_per_shape()
install_import_hook(CHECKED, "beartype.beartype")
if os.environ.get("TRITON_INTERPRET") == "1":
    patch_triton_once()

import pytest

torch.set_num_threads(1)  # tiny models: threads only add noise


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """Half of the suite's time would go into looking for garbage among the modules of torch and transformers."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
