"""The version of the installed package, read without importing anything heavy."""

from __future__ import annotations

from importlib import metadata


def installed_version() -> str:
    """The version of the installed distribution ``dynamax-llm``; "source tree" where it is not installed."""
    try:
        return metadata.version("dynamax-llm")
    except metadata.PackageNotFoundError:
        return "source tree"
