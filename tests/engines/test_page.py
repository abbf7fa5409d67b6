"""docs/add-an-engine.md runs, and what it says holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dynamax_llm as dx
from dynamax_llm.backbones import adapt
from dynamax_llm.errors import UsageError
from dynamax_llm.testing import random_ids, tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "add-an-engine.md"


def test_an_engine_from_outside() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2 and sum(block.count("\n") for block in blocks) < 80
    exec("\n".join(blocks), {"__name__": "page"})
    model = tiny_model("llama")
    exits = dx.Exits.untrained(adapt(model), (1, 3))
    early = dx.EarlyExit(exits, measure="softmax_max", policy="defer", engine="counting")
    with pytest.raises(UsageError, match="it does not let tokens wait"):
        model.generate(random_ids(1, 6), max_new_tokens=2, custom_generate=early)
