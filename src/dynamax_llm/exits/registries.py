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

_EXITS = "dynamax_llm.exits"
READOUTS: Registry[type[Readout]] = Registry(
    "readout",
    homes={
        "head": f"{_EXITS}.readouts.head:HeadReadout",
        "tail": f"{_EXITS}.readouts.tail:TailReadout",
        "lens": f"{_EXITS}.readouts.lens:LensReadout",
    },
)
HEADS: Registry[type[Bank]] = Registry(
    "head",
    homes={
        "linear": f"{_EXITS}.confidence.linear:LinearBank",
        "mlp": f"{_EXITS}.confidence.mlp:MlpBank",
        "transformer": f"{_EXITS}.confidence.transformer:TransformerBank",
        "mamba": f"{_EXITS}.confidence.mamba:MambaBank",
    },
)
MEASURES: Registry[Measure] = Registry(
    "confidence measure",
    homes={
        name: f"{_EXITS}.confidence.measures:{name.upper()}"
        for name in ("softmax_max", "softmax_margin", "entropy", "state_similarity")
    },
)
