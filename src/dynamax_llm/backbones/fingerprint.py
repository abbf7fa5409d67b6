"""The identity of a backbone: a short JSON value that does not depend on the dtype the model is loaded in.

The weights hash covers every parameter's name, shape and a fixed sample of its values, rounded to bfloat16, so it
costs well under two seconds at 7B and is the same however the model is loaded: in float32, bfloat16 or float16. One
case is outside that promise: weights *stored* in float32 round differently on the way through float16.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from dynamax_llm.backbones.stacking import dense_weight
from dynamax_llm.errors import BackboneError

#: Per parameter: this many runs of this many consecutive values (consecutive, so that few memory pages are touched).
RUNS, RUN_LENGTH = 64, 64

#: Values below float16's smallest normal number are hashed as 0: float16 keeps them coarsely or not at all.
SMALLEST = 2.0**-14

#: Fields that fingerprints of version 0.1 cover (their ``config``); ``settings`` covers every field but IGNORED.
FIELDS = (
    "attention_bias", "attention_in_multiplier", "attention_multiplier", "attention_out_multiplier",
    "conv_kernel", "embedding_multiplier", "expand", "head_dim", "hidden_act", "hidden_size", "hybrid_layer_ids",
    "intermediate_size", "key_multiplier", "layer_norm_epsilon", "lm_head_multiplier", "logits_scaling",
    "mamba_d_conv", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_n_heads", "mlp_bias",
    "mlp_multipliers", "model_type", "n_groups", "num_attention_heads", "num_experts_per_tok", "num_heads",
    "num_hidden_layers", "num_key_value_heads", "residual_multiplier", "rms_norm_eps", "rope_parameters",
    "routed_scaling_factor", "sliding_window", "ssm_in_multiplier", "ssm_multipliers", "ssm_out_multiplier",
    "state_size", "tie_word_embeddings", "time_step_limit", "use_bias", "use_conv_bias", "vocab_size",
)  # fmt: skip

#: Fields that change no number the model computes: names, special tokens, training, and how it is run.
IGNORED = frozenset({
    "_name_or_path", "_attn_implementation", "_experts_implementation", "architectures", "attention_dropout",
    "attn_implementation", "auto_map", "bos_token_id", "chunk_size", "chunk_size_feed_forward", "dtype",
    "embd_pdrop", "eos_token_id", "finetuning_task", "gradient_checkpointing", "hidden_dropout",
    "hidden_dropout_prob", "id2label", "initializer_range", "is_encoder_decoder", "label2id", "mamba_chunk_size",
    "max_length", "name_or_path", "num_labels", "num_logits_to_keep", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "prefix", "pretraining_tp", "problem_type", "quantization_config",
    "rescale_prenorm_residual", "residual_dropout", "return_dict", "router_aux_loss_coef", "router_jitter_noise",
    "sep_token_id", "time_step_floor", "time_step_init_scheme", "time_step_max", "time_step_scale",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_associative_scan", "use_cache",
    "use_falcon_mambapy", "use_mamba_kernels", "use_mambapy",
})  # fmt: skip


def fingerprint(model: Any) -> dict[str, Any]:
    """JSON-ready identity of a loaded causal LM: its shape in words, a hash of its config, a hash of its weights.

    Raises BackboneError if a weight is not in memory (offloaded by a device_map) and so cannot be read.
    """
    config = model.config.to_dict()
    return {
        "model_type": config.get("model_type"),
        "layers": config.get("num_hidden_layers"),
        "width": config.get("hidden_size"),
        "vocab_size": config.get("vocab_size"),
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": _hash({key: config[key] for key in FIELDS if config.get(key) is not None}),
        "settings": _hash(_settings(model.config)),
        "weights": _hash_weights(model),
    }


def explain_mismatch(expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """What tells two fingerprints apart, in one clause, coarsest difference first; None if nothing does.

    The dtype a model was loaded in is not a difference, though it is named where it may be the cause of one. Where
    one of the two was taken by version 0.1, which had no ``settings``, these are not compared.
    """
    words = {
        "model_type": "model type",
        "layers": "number of layers",
        "width": "width",
        "vocab_size": "vocabulary size",
    }
    for key, word in words.items():
        if expected.get(key) != found.get(key):
            return f"the {word} is {found.get(key)}, not {expected.get(key)}"
    both = "settings" in expected and "settings" in found
    if any(expected.get(key) != found.get(key) for key in ("config", *(["settings"] if both else []))):
        return "the configuration differs (same type, depth and width, other head sizes, norms or rotary settings)"
    if expected.get("weights") != found.get("weights"):
        text = "the architecture is the same, the weights are not (another checkpoint, or fine-tuned since)"
        dtypes = {expected.get("dtype"), found.get("dtype")}
        if "float16" in dtypes and len(dtypes) > 1:
            text += "; or they are stored in float32 and were loaded once in float16, which rounds differently"
        return text
    return None


def _settings(config: Any) -> dict[str, Any]:
    """The fields that may change what the model computes and are not at the default of the configuration's class.

    Defaults are left out so that a field which a later transformers adds does not change the fingerprint.
    """
    given = _comparable(config)
    try:
        defaults = _comparable(type(config)())
    except Exception:  # a family from outside, whose configuration has no defaults
        defaults = {}
    if (given.get("rope_parameters") or {}).get("rope_type", "default") == "default":
        given.pop("max_position_embeddings", None)  # a limit only; other kinds of rotary positions compute with it
    return {key: value for key, value in given.items() if key not in IGNORED and value != defaults.get(key)}


def _comparable(config: Any) -> dict[str, Any]:
    """A configuration's fields as JSON gives them back: lists for tuples."""
    return json.loads(json.dumps(config.to_dict(), default=str))


def _hash(fields: dict[str, Any]) -> str:
    """sha256 over the canonical JSON of these fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def _hash_weights(model: nn.Module) -> str:
    """sha256 over name, shape and sampled values of every parameter, in the order of their names.

    Weights that a module keeps in packed form count as well, dequantised.
    """
    digest, weights = hashlib.sha256(), dict[str, Tensor](model.named_parameters())
    for name, module in model.named_modules():
        if callable(getattr(module, "weight", None)):
            weights[f"{name}.weight"] = dense_weight(module)
    for name, parameter in sorted(weights.items()):
        if parameter.device.type == "meta":
            raise BackboneError(
                f"the weight {name} is not in memory (offloaded), so this backbone cannot be recognised. "
                "Load it with a device_map that keeps every layer on a CPU or GPU."
            )
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(_sample_of(model, name, parameter.detach()).numpy().tobytes())
    return digest.hexdigest()


def _sample_of(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """``_sample``, of the dequantised values if the tensor's class cannot be indexed. Raises BackboneError."""
    try:
        return _sample(tensor)
    except Exception:  # each quantisation library raises its own
        return _sample(dense_weight(model.get_submodule(name.rpartition(".")[0])).detach())


def _sample(tensor: Tensor) -> Tensor:
    """A tensor's values at ``_places``, rounded to bfloat16, as int16 bits on the CPU."""
    # Multi-dimensional indexing reads a view in place, where flattening it would copy the whole weight.
    index = torch.unravel_index(_places(tensor.numel(), tensor.device), tensor.shape)
    rounded = (tensor[index] if tensor.dim() else tensor.reshape(1)).to(torch.bfloat16)
    return torch.where(rounded.abs() < SMALLEST, 0.0, rounded).to(torch.bfloat16).cpu().view(torch.int16)


def _places(count: int, device: torch.device | None = None) -> Tensor:
    """Flat indices of at most RUNS * RUN_LENGTH of ``count`` values: all of them, or scattered runs."""
    if count <= RUNS * RUN_LENGTH:
        return torch.arange(count, device=device)
    # Multiplying by Knuth's constant scatters the runs: evenly spaced ones would keep to a few columns.
    starts = torch.arange(RUNS, device=device) * 2654435761 % (count - RUN_LENGTH)
    return (starts.unsqueeze(1) + torch.arange(RUN_LENGTH, device=device)).flatten()
