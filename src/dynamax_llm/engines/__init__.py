"""Primitives of decoding: run layers, update skipped state, let tokens wait and catch up."""

from dynamax_llm.engines.deferred import DeferredEngine, Ledger
from dynamax_llm.engines.eager import EagerEngine

__all__ = ["DeferredEngine", "EagerEngine", "Ledger"]
