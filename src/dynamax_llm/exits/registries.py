"""The kinds of readouts, their blocks, exit heads and confidence measures, by name; open to kinds of your own.

READOUTS.register("mine", MyReadout)
BLOCKS.register("mine", MyBlock)
HEADS.register("mine", MyBank)
MEASURES.register("mine", Measure("mine", formula))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamax_llm.registry import Registry

if TYPE_CHECKING:
    from dynamax_llm.exits.block_kinds.base import Block
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
        "block": f"{_EXITS}.readouts.block:BlockReadout",
        "draft": f"{_EXITS}.readouts.draft:DraftReadout",
    },
)
BLOCKS: Registry[type[Block]] = Registry(
    "block",
    homes={
        "transformer": f"{_EXITS}.block_kinds.transformer:TransformerBlock",
        "mamba": f"{_EXITS}.block_kinds.mamba:MambaBlock",
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
