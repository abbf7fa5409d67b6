"""What every law is tried on: families, tied and untied heads, 5 and 7 layers, odd sizes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.engines.plan import POLICIES, ExitPlan
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.features import ConfidenceEstimator
from dynamax_llm.exits.heads import ExitHeads
from dynamax_llm.exits.readout import Lens, Readout
from dynamax_llm.testing import ScriptedConfidence, tiny_model

#: Families whose every variant runs; the others run one each, so that the suite stays quick.
THOROUGH = ("mistral", "llama", "mamba2")
ONCE = {
    "bamba": (5, False),
    "falcon_h1": (5, False),
    "falcon_mamba": (7, False),
    "gemma": (7, False),
    "granitemoehybrid": (5, False),
    "jamba": (7, False),
    "mamba": (5, False),
    "nemotron_h": (7, False),
    "qwen2": (5, False),
    "qwen3": (7, False),
    "zamba2": (5, False),
}
VARIANTS = [(family, *variant) for family in THOROUGH for variant in ((5, False), (7, True))]
VARIANTS += [(family, *variant) for family, variant in ONCE.items()]
#: Hybrids have no policy that leaves skipped state alone: their layers do not agree on one.
HYBRIDS = ("bamba", "falcon_h1", "granitemoehybrid", "jamba", "nemotron_h", "zamba2")


def _params(variants: list[tuple[str, int, bool]]) -> list:
    return [pytest.param(v, id=f"{v[0]}-{v[1]}-{'tied' if v[2] else 'untied'}") for v in variants]


CASES = _params(VARIANTS)
CHEAP_CASES = _params([variant for variant in VARIANTS if variant[0] not in HYBRIDS])
#: One variant of each family, for the laws of exact state and output.
EACH = {"mistral": (5, False), "llama": (7, True), "mamba2": (7, True), **ONCE}
EACH_CASES = _params([(family, *variant) for family, variant in EACH.items()])
#: One of each kind of state: K/V, SSM, both in one layer, and layers of both kinds with steps one by one.
SOME_CASES = _params([(family, *EACH[family]) for family in ("mistral", "mamba2", "falcon_h1", "jamba")])
#: Learned heads see h and nothing of the family; one hybrid beside the thorough ones is enough.
HEAD_CASES = _params([variant for variant in VARIANTS if variant[0] in (*THOROUGH, "zamba2")])


@dataclass(frozen=True)
class Case:
    backbone: Backbone
    exits: tuple[int, ...]

    def plan(
        self, estimator: ConfidenceEstimator | None, policy: str = "propagate", readout: str = "head", tail: int = 1
    ) -> ExitPlan:
        config = ExitConfig(self.exits, self.backbone.n_layers, head=None, readout=readout, tail_layers=tail)
        lens = None
        if readout == "lens":
            lens = Lens(len(self.exits), self.backbone.width, 3)
            torch.nn.init.normal_(lens.up[0], std=0.1)
        return ExitPlan(self.exits, estimator, Readout(self.backbone, config, lens), POLICIES[policy])

    def cheap_policy(self) -> str:
        """The policy of this family that leaves skipped state alone; hybrids have none."""
        return "copy" if "attention" in self.backbone.kinds else "stale"


def make_case(family: str, layers: int, tied: bool) -> Case:
    model = tiny_model(family, layers=layers, tie_word_embeddings=tied)
    return Case(adapt(model), (2, 3) if layers == 5 else (1, 4, 6))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(*request.param)


@pytest.fixture(params=CHEAP_CASES)
def cheap_case(request: pytest.FixtureRequest) -> Case:
    """Of a family for which ``cheap_policy`` is defined."""
    return make_case(*request.param)


@pytest.fixture(params=SOME_CASES)
def some_case(request: pytest.FixtureRequest) -> Case:
    """For laws about the loop rather than the layers."""
    return make_case(*request.param)


@pytest.fixture(params=HEAD_CASES)
def head_case(request: pytest.FixtureRequest) -> Case:
    """For laws about learned heads."""
    return make_case(*request.param)


def pattern(batch: int, steps: int, n_exits: int, seed: int = 0) -> Tensor:
    """Random exits per row and step, full depth among them."""
    return torch.randint(0, n_exits + 1, (batch, steps), generator=torch.Generator().manual_seed(seed))


def scripted(batch: int, steps: int, n_exits: int, seed: int = 0) -> ScriptedConfidence:
    return ScriptedConfidence(pattern(batch, steps, n_exits, seed))


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
