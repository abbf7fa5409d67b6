"""Generation that runs as many layers as each token needs."""

from dynamax_llm.decoding.loop import EarlyExit, EarlyExitOutput
from dynamax_llm.decoding.state import POLICIES
from dynamax_llm.decoding.thresholds import Thresholds
from dynamax_llm.decoding.trace import Trace
from dynamax_llm.decoding.verify import Verification

__all__ = ["POLICIES", "EarlyExit", "EarlyExitOutput", "Thresholds", "Trace", "Verification"]
