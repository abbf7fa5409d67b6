"""The primitives of decoding: run layers, update skipped state, read out. Engines own the cache and the positions."""

from dynamax_llm.engines.eager import EagerEngine

__all__ = ["EagerEngine"]
