"""Running the Python blocks of a page of the documents."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

DOCS = Path(__file__).resolve().parents[2] / "docs"


@cache
def executed(name: str) -> SimpleNamespace:
    """What the Python blocks of docs/``name`` define, run once in order in one module."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(encoding="utf-8"), re.M | re.S)
    assert blocks and all(block.count("\n") < 80 for block in blocks)
    names: dict = {"__name__": name}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    return SimpleNamespace(**names)
