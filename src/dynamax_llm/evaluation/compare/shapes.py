"""What the same exits would cost at another size: traces measured on a small backbone, costs of a large shape.

A small model's LM head is a fifth of its weights, a 7B model's a fiftieth, so a check that eats the saving on one is
cheap on the other. A projection answers that and nothing else: it assumes that tokens leave at the same shares of the
depth, which only the large model itself can show.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache

import torch
from transformers import AutoModelForCausalLM, Mamba2Config, MistralConfig, PreTrainedConfig

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.decoding.trace import TokenCosts
from dynamax_llm.engines.plan import POLICIES, ExitPlan
from dynamax_llm.evaluation.compare.heads import Candidate, Outcome
from dynamax_llm.exits.heads import ExitHeads
from dynamax_llm.exits.readout import Readout
from dynamax_llm.registry import Registry

#: Shapes of the paper's two backbones, from their published configurations.
SHAPES: Registry[PreTrainedConfig] = Registry(
    "model shape",
    {
        "mistral-7b": MistralConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=32768,
            sliding_window=None,
        ),
        "codestral-mamba-7b": Mamba2Config(
            hidden_size=4096,
            num_hidden_layers=64,
            num_heads=128,
            head_dim=64,
            expand=2,
            n_groups=8,
            state_size=128,
            vocab_size=32768,
            tie_word_embeddings=False,
        ),
    },
)


@lru_cache
def shape(name: str) -> Backbone:
    """A backbone of this shape without memory or weights: good for counting, nothing else."""
    with torch.device("meta"):
        return adapt(AutoModelForCausalLM.from_config(SHAPES.lookup(name)))


def token_costs(name: str, candidate: Candidate) -> TokenCosts:
    """Cost of a token by exit if this candidate's exits, at the same shares of the depth, sat on the named shape."""
    backbone, config = shape(name), candidate.exits.config
    layers = tuple(round(layer * backbone.n_layers / config.n_layers) for layer in config.layers)
    scaled = dataclasses.replace(config, layers=layers, n_layers=backbone.n_layers, readout="head")
    estimator = candidate.estimator
    if candidate.measure is None:
        with torch.device("meta"):
            estimator = ExitHeads(scaled, backbone.width)
    readout = Readout(backbone, scaled)
    return TokenCosts.of(backbone.costs(), ExitPlan(layers, estimator, readout, POLICIES["propagate"]))


def projected(name: str, candidate: Candidate, points: Sequence[Outcome]) -> list[Outcome]:
    """The same points with the counted reduction they would have at the named shape."""
    costs = token_costs(name, candidate)
    found = []
    for point in points:
        spent = sum(n * cost for n, cost in zip(point.exit_counts, costs.by_exit, strict=True))
        saved = 1.0 - spent / (sum(point.exit_counts) * costs.full)
        found.append(Outcome(point.threshold, point.agreement, point.depth, saved, point.exit_counts))
    return found
