"""Small enough to train in a second: a byte tokenizer, a corpus of patterned text, tiny backbones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.testing import tiny_model


class ByteTokenizer:
    """Bytes as ids 1 to 60; the one call that training makes of a tokenizer."""

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [byte % 60 + 1 for byte in text.encode()]}


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


def sentences(count: int, seed: int = 0) -> list[str]:
    """Documents of 20 to 60 words from a small vocabulary."""
    rng = random.Random(seed)
    words = ["exit", "layer", "mamba", "state", "token", "depth", "head", "a", "the", "of"]
    return [f"{index} " + " ".join(rng.choices(words, k=rng.randint(20, 60))) for index in range(count)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", sentences(200))


@pytest.fixture
def backbone() -> Callable[[str], Backbone]:
    return lambda family="mistral": adapt(tiny_model(family))
