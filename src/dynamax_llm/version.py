"""The version of the installed package and the name of the processor, read without importing anything heavy."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path


def installed_version() -> str:
    """The version of the installed distribution ``dynamax-llm``; "source tree" where it is not installed."""
    try:
        return metadata.version("dynamax-llm")
    except metadata.PackageNotFoundError:
        return "source tree"


def processor_name() -> str:
    """The processor's model, else what the platform calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
