"""The interface of everything that says how sure an exit is: fixed measures, exit heads, and your own."""

from __future__ import annotations

import abc

from torch import Tensor

from dynamax_llm.exits.features import ExitFeatures
from dynamax_llm.exits.state import State, Stateful


class ConfidenceEstimator(Stateful):
    """Estimates the probability that stopping at an exit gives the full model's token.

    ``macs`` counts one check of one token, without the readout.
    """

    #: True if the features must come from a readout at every exit that is checked.
    needs_logits: bool = True
    #: True if ``confidence`` reads its features; without, an engine need not make any.
    needs_features: bool = True
    #: True if ``confidence`` is a function of tensors alone, so that it can be part of a recorded program.
    on_device: bool = True

    @abc.abstractmethod
    def confidence(
        self, exit: int, h: Tensor, features: ExitFeatures, state: State | None, padding: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """Confidence (B, T) in [0, 1] at exit ``exit`` (from 0), and this exit's state after the T tokens.

        ``h`` is (B, T, d); for tokens that left earlier, h and features are those with which they left. ``padding``
        (B, T) is 0 at left pads.
        """
