"""Stock Hugging Face causal LMs, driven layer by layer. ``adapt(model)`` wraps one; ``FAMILIES`` lists what can be."""

from __future__ import annotations

from torch import nn

from dynamax_llm.backbones.attention import AttentionBackbone, GemmaBackbone, Qwen3Backbone
from dynamax_llm.backbones.base import Backbone, Context, Costs, LayerCost
from dynamax_llm.backbones.cache import StackedCache
from dynamax_llm.backbones.hybrid import (
    FalconH1Backbone,
    GraniteMoeHybridBackbone,
    HybridBackbone,
    JambaBackbone,
    NemotronHBackbone,
    Zamba2Backbone,
)
from dynamax_llm.backbones.mamba import Mamba2Backbone
from dynamax_llm.backbones.mamba1 import Mamba1Backbone
from dynamax_llm.errors import UnsupportedModelError
from dynamax_llm.registry import Registry

#: Hugging Face's model_type to the adapter that drives it.
FAMILIES: Registry[type[Backbone]] = Registry(
    "model type",
    {
        "bamba": HybridBackbone,
        "falcon_h1": FalconH1Backbone,
        "falcon_mamba": Mamba1Backbone,
        "gemma": GemmaBackbone,
        "granitemoehybrid": GraniteMoeHybridBackbone,
        "jamba": JambaBackbone,
        "llama": AttentionBackbone,
        "mamba": Mamba1Backbone,
        "mamba2": Mamba2Backbone,
        "mistral": AttentionBackbone,
        "nemotron_h": NemotronHBackbone,
        "qwen2": AttentionBackbone,
        "qwen3": Qwen3Backbone,
        "zamba2": Zamba2Backbone,
    },
)


def adapt(model: nn.Module) -> Backbone:
    """The Backbone that drives ``model``. Raises UnsupportedModelError, naming the supported types."""
    check_supported(getattr(model.config, "model_type", None))
    return FAMILIES[model.config.model_type](model)


def check_supported(model_type: str | None) -> None:
    """Raise UnsupportedModelError unless there is an adapter for this Hugging Face model type."""
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {model_type!r} has no adapter. Supported: {', '.join(FAMILIES)}. "
            "Use a model of one of these families."
        )


__all__ = ["FAMILIES", "Backbone", "Context", "Costs", "LayerCost", "StackedCache", "adapt", "check_supported"]
