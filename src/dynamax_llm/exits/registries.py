"""The kinds of readouts, exit heads and confidence measures, by name; open to kinds of your own.

READOUTS.register("mine", MyReadout)
HEADS.register("mine", MyBank)
MEASURES.register("mine", Measure("mine", formula))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamax_llm.registry import Registry

if TYPE_CHECKING:
    from dynamax_llm.exits.confidence.bank import Bank
    from dynamax_llm.exits.confidence.measures import Measure
    from dynamax_llm.exits.readouts.base import Readout

READOUTS: Registry[type[Readout]] = Registry("readout")
HEADS: Registry[type[Bank]] = Registry("head")
MEASURES: Registry[Measure] = Registry("confidence measure")
