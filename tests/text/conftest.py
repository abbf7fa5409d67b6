"""A tiny model that answers, and prompts for it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dynamax_llm.testing import tiny_model
from dynamax_llm.text.prompts import Prompt
from dynamax_llm.text.settings import AnswerSettings
from tests.text.tokenizers import byte_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def model() -> PreTrainedModel:
    """Random weights; a tenth of the vocabulary ends an answer, so that answers differ in length."""
    made = tiny_model("llama", layers=2, vocab=100)
    made.generation_config.eos_token_id = list(range(1, 11))
    return made


def prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Different prompts of 2 to 20 characters."""
    rng = random.Random(seed)
    return [Prompt.of(f"{number} " + "abcdefgh"[: rng.randint(0, 8)] * rng.randint(1, 2)) for number in range(count)]


def few(**changes: Any) -> AnswerSettings:
    return AnswerSettings(**{"max_new_tokens": 12, "rows": 3, **changes})
