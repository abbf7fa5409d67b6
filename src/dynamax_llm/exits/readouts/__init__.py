"""How an exit turns its hidden state into logits, one file a kind, all of ``base``."""

from dynamax_llm.exits.readouts.head import HeadReadout
from dynamax_llm.exits.readouts.lens import LensReadout
from dynamax_llm.exits.readouts.tail import TailReadout
from dynamax_llm.exits.registries import READOUTS

READOUTS.register("head", HeadReadout)
READOUTS.register("tail", TailReadout)
READOUTS.register("lens", LensReadout)
