"""Running the Python blocks of a page of the documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

from dynamax_llm.exits.registries import BLOCKS, HEADS, MEASURES, READOUTS

DOCS = Path(__file__).resolve().parents[2] / "docs"


REGISTRIES = (READOUTS, BLOCKS, HEADS, MEASURES)


@cache
def executed(name: str) -> tuple[ModuleType, list[dict]]:
    """What the Python blocks of docs/``name`` define, run once in order in one module, and what they registered.

    The registries are left as they were, for the other tests of this process.
    """
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(encoding="utf-8"), re.M | re.S)
    assert blocks and all(block.count("\n") < 80 for block in blocks)
    module, before = ModuleType(name), [dict(registry) for registry in REGISTRIES]
    for block in blocks:
        exec(compile(block, name, "exec", dont_inherit=True), module.__dict__)
    added = [
        {key: registry[key] for key in registry if key not in old}
        for registry, old in zip(REGISTRIES, before, strict=True)
    ]
    for registry, old in zip(REGISTRIES, before, strict=True):
        registry._entries = old
    return module, added


def page(name: str) -> ModuleType:
    """The module of a page."""
    return executed(name)[0]


@contextmanager
def registered(*names: str) -> Iterator[None]:
    """Within it, what these pages register is registered."""
    before = [dict(registry) for registry in REGISTRIES]
    for name in names:
        for registry, entries in zip(REGISTRIES, executed(name)[1], strict=True):
            for key, entry in entries.items():
                registry.register(key, entry)
    try:
        yield
    finally:
        for registry, old in zip(REGISTRIES, before, strict=True):
            registry._entries = old
