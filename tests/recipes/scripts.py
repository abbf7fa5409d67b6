"""Recipes as modules: several have a script of the same name, so each is loaded under its whole path."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


@cache
def script(name: str) -> ModuleType:
    """The module of recipes/NAME.py, imported as it is when it is run: from its own folder."""
    path = ROOT / "recipes" / f"{name}.py"
    folders = [str(path.parent), str(ROOT / "recipes")]
    sys.path[:0] = folders
    try:
        spec = importlib.util.spec_from_file_location(f"recipe_{name.replace('/', '_')}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path[:2] = []
    return module
