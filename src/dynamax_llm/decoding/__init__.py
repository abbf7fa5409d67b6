"""Generation that runs as many layers as each token needs.

generate       ``EarlyExit``, the ``custom_generate`` of Hugging Face's ``generate``
session        rows that are admitted, advance together, and are released
decoder        one token per row, over any engine
sampler        how tokens are chosen and rows end

Imported when used: thresholds can be checked without PyTorch.
"""

from typing import TYPE_CHECKING

from dynamax_llm.decoding.thresholds import Thresholds
from dynamax_llm.lazy import lazy

if TYPE_CHECKING:
    from dynamax_llm.decoding.generate import EarlyExit, EarlyExitOutput
    from dynamax_llm.decoding.rows import Event, RowSettings
    from dynamax_llm.decoding.session import Session
    from dynamax_llm.decoding.trace import Trace
    from dynamax_llm.decoding.verification import Verification

__all__ = [
    "EarlyExit",
    "EarlyExitOutput",
    "Event",
    "RowSettings",
    "Session",
    "Thresholds",
    "Trace",
    "Verification",
]

_HOMES = {
    "EarlyExit": "generate",
    "EarlyExitOutput": "generate",
    "Event": "rows",
    "RowSettings": "rows",
    "Session": "session",
    "Trace": "trace",
    "Verification": "verification",
}
__getattr__ = lazy(__name__, _HOMES)
