"""Models of a named shape: with random weights, to measure speed, or without any, to count what exits would cost.

A small model's LM head is a fifth of its weights, a 7B model's a fiftieth, so a check that costs more than it saves on
one is cheap on the other. A projection counts that and nothing else: it assumes that tokens leave at the same shares
of the depth, which only the large model itself can show.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Mamba2Config, MistralConfig, PreTrainedConfig, PreTrainedModel

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.decoding.trace import TokenCosts
from dynamax_llm.engines.plan import POLICIES, ExitPlan
from dynamax_llm.errors import UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.readouts.base import build_readout
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
_TINY = {"num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 512, "initializer_range": 0.1}
#: Small ones for trying things out, and for exact comparisons in float32.
TINY_SHAPES: dict[str, PreTrainedConfig] = {
    "tiny-transformer": MistralConfig(
        **_TINY,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        sliding_window=None,
    ),
    "tiny-mamba": Mamba2Config(
        **_TINY, num_heads=8, head_dim=16, expand=2, n_groups=2, state_size=16, chunk_size=32, tie_word_embeddings=False
    ),
}
#: Parts of the names of projections that write into the residual stream.
_OUTPUTS = ("o_proj", "down_proj", "out_proj", "output_linear")
RANDOM_SHAPES: Registry[PreTrainedConfig] = Registry("model shape", {**SHAPES, **TINY_SHAPES})


def random_model(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16, *, seed: int = 0
) -> PreTrainedModel:
    """A stock model of this shape in eval mode, its weights drawn on ``device`` in ``dtype``; its texts never end.

    Raises UsageError for a shape that is not known.
    """
    config = copy.deepcopy(RANDOM_SHAPES.lookup(name))
    config.eos_token_id = None
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def zero_tail(model: PreTrainedModel, depth: int) -> PreTrainedModel:
    """Make the layers after ``depth`` add nothing: stopping there then gives exactly the full model's output, at the
    full model's cost. Zeroes every projection that writes into the residual stream; changes ``model`` in place.

    Raises UsageError, before anything is changed, for a family in which a layer still adds something.
    """
    backbone = adapt(model)
    changed: list[tuple[nn.Parameter, torch.Tensor]] = []
    for layer in backbone.layers[depth:]:
        for name, parameter in layer.named_parameters():
            if any(part in name for part in _OUTPUTS):
                changed.append((parameter, parameter.clone()))
                parameter.zero_()
    if backbone.device.type == "meta":
        return model
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1, 3, backbone.width, generator=generator).to(backbone.device, backbone.dtype)
    ctx = backbone.context(h)
    for index in range(depth, backbone.n_layers):
        if not torch.equal(backbone.layer(index, h, None, ctx), h):
            for parameter, value in changed:
                parameter.copy_(value)
            raise UsageError(
                f"layers of {backbone.model_type!r} cannot be made to add nothing: layer {index + 1} still changes its "
                f"input with {', '.join(_OUTPUTS)} zeroed. Give a model of another family."
            )
    return model


@lru_cache
def meta_backbone(name: str) -> Backbone:
    """A backbone of this shape without memory or weights: for counting."""
    with torch.device("meta"):
        return adapt(AutoModelForCausalLM.from_config(RANDOM_SHAPES.lookup(name)))


def costs_at_shape(name: str, exits: Exits, measure: str | None = None) -> TokenCosts:
    """Cost of a token by exit if these exits, at the same shares of the depth, sat on the named shape."""
    backbone, config = meta_backbone(name), exits.config
    layers = tuple(round(layer * backbone.n_layers / config.n_layers) for layer in config.layers)
    scaled = dataclasses.replace(config, layers=layers, n_layers=backbone.n_layers, readout="head")
    estimator = exits.estimator(measure)
    if measure is None:
        with torch.device("meta"):
            estimator = ExitHeads(scaled, backbone.width)
    plan = ExitPlan(layers, estimator, build_readout(backbone, scaled), POLICIES["propagate"])
    return TokenCosts.of(backbone.costs(), plan)


def projected_reduction(costs: TokenCosts, exit_counts: Sequence[int]) -> float:
    """Counted reduction of ``exit_counts`` tokens per exit, full depth last, at these costs."""
    spent = sum(count * cost for count, cost in zip(exit_counts, costs.by_exit, strict=True))
    return float(1.0 - spent / (sum(exit_counts) * costs.full))
