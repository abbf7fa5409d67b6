"""What the GPU engine can take on, and why it cannot take on the rest."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import nn

from dynamax_llm.backbones import Backbone
from dynamax_llm.engines.cuda.tiles import LEAST_VECTORS
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.readouts.base import Readout

FAMILIES = ("llama", "mistral", "qwen2", "mamba2")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Rotary positions that do not depend on how long the text is.
ROTARY = ("default", "linear", "llama3", "yarn")


def obstacle(backbone: Backbone, estimator: ConfidenceEstimator, readout: Readout) -> str | None:
    """Why this engine cannot decode so; None if it can."""
    checks = (_place, _weights, _modules)
    for check in checks:
        found = check(backbone)
        if found is not None:
            return found
    if readout.config.readout != "head":
        return f"the readout {readout.config.readout!r} is not one it has; it has 'head'"
    if not estimator.on_device and backbone.device.type == "cuda":
        return f"{type(estimator).__name__} decides on the host, and the engine's programs run without it"
    return None


def _place(backbone: Backbone) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if backbone.model_type not in FAMILIES:
        return f"the family {backbone.model_type!r} is not one it has; it has {', '.join(FAMILIES)}"
    devices = {parameter.device for parameter in backbone.model.parameters()}
    if len(devices) > 1:
        return f"the weights lie on {len(devices)} devices, and it works on one"
    kind = devices.pop().type
    if kind != "cuda" and not (kind == "cpu" and interpreted):
        return f"the weights lie on {kind!r}, not on a CUDA device"
    if any(getattr(module, "_hf_hook", None) for module in backbone.model.modules()):
        return "the weights are offloaded by accelerate, and it reads them where they lie"
    return None


def _weights(backbone: Backbone) -> str | None:
    if backbone.dtype not in DTYPES:
        return f"the dtype {backbone.dtype} is not one it has; it has bfloat16, float16 and float32"
    layers = (module for layer in backbone.layers for module in layer.modules())
    linears = [module for module in layers if isinstance(module, nn.Linear) or hasattr(module, "in_features")]
    odd = [type(module).__name__ for module in linears if type(module) is not nn.Linear]
    if odd:
        return f"{odd[0]} is not a plain linear module: it reads bfloat16, float16 or float32 weights as they lie"
    weights = [*(linear.weight for linear in linears), backbone.model.get_output_embeddings().weight]
    if any(weight.dtype != backbone.dtype or not weight.is_contiguous() for weight in weights):
        return f"not all weights are contiguous {backbone.dtype}"
    if getattr(backbone.model.get_output_embeddings(), "bias", None) is not None:
        return "its LM head has a bias"
    return None


def _modules(backbone: Backbone) -> str | None:
    config, layer = backbone.config, backbone.layers[0]
    if backbone.model_type == "mamba2":
        mixer = layer.mixer
        parts = mixer.num_heads // mixer.n_groups
        if mixer.activation not in ("silu", "swish"):
            return f"the activation {mixer.activation!r} is not 'silu'"
        if parts & (parts - 1) or mixer.num_heads % mixer.n_groups:
            return f"{parts} heads a group is not a power of two"
        if mixer.head_dim & (mixer.head_dim - 1) or (parts * mixer.head_dim) % LEAST_VECTORS:
            return f"heads of {mixer.head_dim} channels, {parts} a group, do not fit its blocks"
        return None
    kind = getattr(backbone.model.model.rotary_emb, "rope_type", "default")
    if kind not in ROTARY:
        return f"the rotary positions {kind!r} are not ones it has; it has {', '.join(ROTARY)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"the activation {config.hidden_act!r} is not 'silu'"
    linears = (layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
    if any(linear.bias is not None for linear in linears):
        return "projections other than those of queries, keys and values have biases"
    return None
