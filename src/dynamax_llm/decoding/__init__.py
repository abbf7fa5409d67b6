"""Generation that runs as many layers as each token needs."""

from typing import TYPE_CHECKING

from dynamax_llm.decoding.thresholds import Thresholds
from dynamax_llm.lazy import lazy

if TYPE_CHECKING:
    from dynamax_llm.decoding.loop import EarlyExit, EarlyExitOutput
    from dynamax_llm.decoding.state import POLICIES
    from dynamax_llm.decoding.trace import Trace
    from dynamax_llm.decoding.verify import Verification

__all__ = ["POLICIES", "EarlyExit", "EarlyExitOutput", "Thresholds", "Trace", "Verification"]

_HOMES = {
    "POLICIES": "state",
    "EarlyExit": "loop",
    "EarlyExitOutput": "loop",
    "Trace": "trace",
    "Verification": "verify",
}
__getattr__ = lazy(__name__, _HOMES)
