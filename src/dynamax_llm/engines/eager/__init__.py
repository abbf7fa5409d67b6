"""Plain PyTorch on any device and any family: the reference that every faster engine must agree with.

exit_check   the estimator and the readout at the exits, for one token per row
session      what all eager sessions share: cache, prompt, rows
in_place     ``propagate``, ``copy``, ``stale``: skipped layers get a state at once
waiting      ``defer``, ``verify``: tokens wait and catch up; rollback with ``journal``
"""

from dynamax_llm.engines.eager.engine import EagerEngine

__all__ = ["EagerEngine"]
