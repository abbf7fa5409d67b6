"""What every law is tried on: families, tied and untied heads, 5 and 7 layers, odd sizes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.decoding.decoder import ExitPlan
from dynamax_llm.decoding.state import POLICIES
from dynamax_llm.exits.confidence import Judge
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.heads import ExitHeads
from dynamax_llm.exits.readout import Lens, Readout
from dynamax_llm.testing import ScriptedJudge, tiny_model

CASES = [
    pytest.param((family, layers, tied), id=f"{family}-{layers}-{'tied' if tied else 'untied'}")
    for family in ("mistral", "llama", "mamba2")
    for layers, tied in ((5, False), (7, True))
]


@dataclass(frozen=True)
class Case:
    backbone: Backbone
    exits: tuple[int, ...]

    def plan(self, judge: Judge | None, policy: str = "propagate", readout: str = "head", tail: int = 1) -> ExitPlan:
        config = ExitConfig(self.exits, self.backbone.n_layers, head=None, readout=readout, tail_layers=tail)
        lens = None
        if readout == "lens":
            lens = Lens(len(self.exits), self.backbone.width, 3)
            torch.nn.init.normal_(lens.up[0], std=0.1)
        return ExitPlan(self.exits, judge, Readout(self.backbone, config, lens), POLICIES[policy])

    def cheap_policy(self) -> str:
        """The policy of this family that leaves skipped state alone."""
        return "copy" if "attention" in self.backbone.kinds else "stale"


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    family, layers, tied = request.param
    model = tiny_model(family, layers=layers, tie_word_embeddings=tied)
    return Case(adapt(model), (2, 3) if layers == 5 else (1, 4, 6))


def pattern(batch: int, steps: int, n_exits: int, seed: int = 0) -> Tensor:
    """Random exits per row and step, full depth among them."""
    return torch.randint(0, n_exits + 1, (batch, steps), generator=torch.Generator().manual_seed(seed))


def scripted(batch: int, steps: int, n_exits: int, seed: int = 0) -> ScriptedJudge:
    return ScriptedJudge(pattern(batch, steps, n_exits, seed))


def left_padding(batch: int, length: int) -> Tensor:
    """Row r starts with r pads."""
    return (torch.arange(length) >= torch.arange(batch).unsqueeze(1)).long()


def random_heads(case: Case, kind: str, candidates: int) -> ExitHeads:
    """Heads with strong random opinions, of either sign."""
    heads = ExitHeads(
        ExitConfig(case.exits, case.backbone.n_layers, head=kind, candidates=candidates), case.backbone.width
    )
    with torch.no_grad():
        for name, parameter in heads.named_parameters():
            if name.endswith(("out", "weight")):
                parameter.normal_(std=2.0)
    return heads.eval()
