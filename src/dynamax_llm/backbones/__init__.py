"""Stock Hugging Face causal LMs, driven layer by layer. ``adapt(model)`` wraps one; ``FAMILIES`` lists what can be."""

from __future__ import annotations

from typing import Any

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
from dynamax_llm.backbones.mamba1 import FalconMambaBackbone, Mamba1Backbone
from dynamax_llm.errors import UnsupportedModelError, UsageError
from dynamax_llm.registry import Registry

#: Hugging Face's model_type to the adapter that drives it.
FAMILIES: Registry[type[Backbone]] = Registry(
    "model type",
    {
        "bamba": HybridBackbone,
        "falcon_h1": FalconH1Backbone,
        "falcon_mamba": FalconMambaBackbone,
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
    """The Backbone that drives ``model``, a causal LM or a peft or ``torch.compile`` wrapper of one.

    Raises UnsupportedModelError, naming the supported types, and UsageError for a model that computes more than its
    layers do (see ``Backbone.check_stock``).
    """
    stock = _unwrapped(model)
    check_supported(getattr(stock.config, "model_type", None))
    backbone = FAMILIES[stock.config.model_type](stock)
    backbone.check_stock()
    return backbone


def _unwrapped(model: Any) -> Any:
    """The causal LM inside a compiled module or a PeftModel. Raises UsageError for soft prompts and prefixes."""
    model = getattr(model, "_orig_mod", model)
    if not hasattr(model, "get_base_model"):
        return model
    config = model.active_peft_config
    if config.is_prompt_learning:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise UsageError(
            f"the model is adapted by {kind}, which adds virtual tokens outside the layers that layer-by-layer "
            "decoding runs. Use an adapter of the layers' own modules, such as LoRA, or the model without it."
        )
    return model.get_base_model()


def check_supported(model_type: str | None) -> None:
    """Raise UnsupportedModelError unless there is an adapter for this Hugging Face model type."""
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {model_type!r} has no adapter. Supported: {', '.join(FAMILIES)}. "
            "Use a model of one of these families."
        )


__all__ = ["FAMILIES", "Backbone", "Context", "Costs", "LayerCost", "StackedCache", "adapt", "check_supported"]
