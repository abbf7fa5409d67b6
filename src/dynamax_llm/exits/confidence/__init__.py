"""How sure an exit is: fixed measures (``measures``) and exit heads (``heads``, one file a kind), all of ``base``."""

from dynamax_llm.exits.confidence.linear import LinearBank
from dynamax_llm.exits.confidence.mamba import MambaBank
from dynamax_llm.exits.confidence.measures import measure
from dynamax_llm.exits.confidence.mlp import MlpBank
from dynamax_llm.exits.confidence.transformer import TransformerBank
from dynamax_llm.exits.registries import HEADS

__all__ = ["measure"]

HEADS.register("linear", LinearBank)
HEADS.register("mlp", MlpBank)
HEADS.register("transformer", TransformerBank)
HEADS.register("mamba", MambaBank)
