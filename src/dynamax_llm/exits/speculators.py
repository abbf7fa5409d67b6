"""A draft as an EAGLE-3 folder (arXiv 2503.01840) of the library ``speculators`` (vllm-project, 0.9).

    export_speculators(Exits.from_pretrained("draft"), model, "draft-eagle3", verifier="owner/name")

Which weights become which (d width, taps of the features side by side):

    fc_norm.I, fc                       tap_norm, mix
    layers.0.input_layernorm            the block's norm, its first half: of the embedding
    layers.0.hidden_norm                its second half: of the features; the residual stream begins there
    layers.0.self_attn, .mlp, …         the block
    norm, lm_head                       the backbone's final norm and the rows of its LM head that the draft speaks
    embed_tokens                        the backbone's embedding, which not every loader takes from the verifier
    d2t (K,), t2d (V,)                  the target's token less the draft's number of it; whether the draft speaks it

The conversion is exact for drafts with ``join="concatenate"`` and refused for others, because no EAGLE-3 layer computes
what they do. With ``join="matrix"`` the block norms the *mixture* of embedding and features, so queries, keys and
values are divided by a number that depends on both together, where EAGLE-3's are linear in the two normed vectors; the
embedding is part of the residual stream, where EAGLE-3's begins as the features alone; and the first token of a text,
which has no features before it, is a key, where EAGLE-3 has none for it. No matrix makes up for these.

Not carried over: confidence heads (the format has none), and the final norm's epsilon where it is not the block's
(the layer has one for all): that scales a token's logits by a common factor near 1 and never changes their order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dynamax_llm.backbones.base import Backbone
from dynamax_llm.errors import UnsupportedModelError, UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.block_kinds.base import EPSILON
from dynamax_llm.exits.block_kinds.transformer import TransformerBlock
from dynamax_llm.exits.files import prepare_folder, write_atomically
from dynamax_llm.exits.readouts.draft import DraftOptions, DraftWeights

CONFIG, WEIGHTS = "config.json", "model.safetensors"
#: Version of the library whose format this is.
VERSION = "0.9.0"
#: Backbones whose embedding, final norm and LM head are the plain ones that the format has.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def export_speculators(
    exits: Exits,
    model: Any,
    folder: str | Path,
    *,
    verifier: str | None = None,
    proposals: int = 4,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a draft of ``model`` as ``config.json`` and ``model.safetensors`` in a new folder; returns it.

    ``verifier`` is the name under which the program that loads the folder finds the model (default: the name it was
    loaded by), ``proposals`` how many tokens it drafts at a time, ``dtype`` of the weights by default the model's.

    Raises UsageError for exits that are no draft or one that the format cannot hold, ArtifactMismatchError for exits
    of another model, UnsupportedModelError for a family that the format does not know, ArtifactError for a folder that
    holds something or cannot be written.
    """
    options, weights = checked(exits)
    backbone = exits.drive(model)
    if backbone.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {backbone.model_type!r}: EAGLE-3 folders are for {', '.join(FAMILIES)} here, whose embedding, "
            "final norm and LM head the format can hold. Use the draft with EarlyExit(policy='verify')."
        )
    if getattr(backbone.model.get_output_embeddings(), "bias", None) is not None:
        raise UsageError("this model's LM head has a bias, and the format has none. Use EarlyExit(policy='verify').")
    if not isinstance(proposals, int) or proposals < 1:
        raise UsageError(f"proposals {proposals!r}: give the tokens drafted at a time, a whole number from 1.")
    name = verifier or str(backbone.model.config.name_or_path)
    if not name:
        raise UsageError("the model has no name of its own: give `verifier`, the folder or hub id to find it by.")
    chosen = backbone.dtype if dtype is None else dtype
    config = _config(backbone, options, weights, name, proposals, chosen)
    tensors = {key: _plain(value, chosen) for key, value in _tensors(backbone, weights).items()}
    target = prepare_folder(folder, ())
    write_atomically(target / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_atomically(target / CONFIG, json.dumps(config, indent=2).encode())
    return target


def checked(exits: Exits) -> tuple[DraftOptions, DraftWeights]:
    """Options and weights of a draft that the format can hold. Raises UsageError, saying what to train instead."""
    options, weights = exits.config.readout_options, exits.readout_weights
    if not isinstance(options, DraftOptions) or not isinstance(weights, DraftWeights):
        raise UsageError(
            f"exits with the readout {exits.config.readout!r}: only a draft can be exported, because the format has "
            "no exits inside a model. Train one: readout='draft', join='concatenate'."
        )
    if not isinstance(weights.block, TransformerBlock):
        raise UsageError(
            f"a draft with the block {options.block!r}: the format has transformer layers only. Train one with "
            "block='transformer', join='concatenate'."
        )
    if not options.paired:
        raise UsageError(
            f"a draft with join={options.join!r} has no exact form in EAGLE-3: its block norms the mixture of "
            "embedding and features and adds it to the residual stream, where EAGLE-3 norms both apart, reads them "
            "side by side and begins its stream with the features. Train one with join='concatenate'."
        )
    return options, weights


def _tensors(backbone: Backbone, weights: DraftWeights) -> dict[str, Tensor]:
    block = weights.block
    assert isinstance(block, TransformerBlock)
    embedding_norm, feature_norm = block.norm.chunk(2)
    norm: Any = backbone.model.model.norm
    layer = {
        "input_layernorm": embedding_norm,
        "hidden_norm": feature_norm,
        "self_attn.q_proj": block.query,
        "self_attn.k_proj": block.key,
        "self_attn.v_proj": block.value,
        "self_attn.o_proj": block.out,
        "post_attention_layernorm": block.feed_forward.norm,
        "mlp.gate_proj": block.feed_forward.gate,
        "mlp.up_proj": block.feed_forward.up,
        "mlp.down_proj": block.feed_forward.down,
    }
    found = {f"layers.0.{name}.weight": value for name, value in layer.items()}
    found |= {f"fc_norm.{tap}.weight": value for tap, value in enumerate(weights.tap_norm)}
    found |= {"fc.weight": weights.mix, "norm.weight": norm.weight}
    found["embed_tokens.weight"] = backbone.model.get_input_embeddings().weight
    tokens, vocab_size = weights.tokens, backbone.vocab_size
    if tokens is None or len(tokens) == vocab_size:
        return {**found, "lm_head.weight": backbone.output_rows(torch.arange(vocab_size, device=backbone.device))}
    tokens = tokens.cpu()
    spoken = torch.zeros(vocab_size, dtype=torch.bool)
    spoken[tokens] = True
    found["lm_head.weight"] = backbone.output_rows(tokens.to(backbone.device))
    return {**found, "d2t": tokens - torch.arange(len(tokens)), "t2d": spoken}


def _config(
    backbone: Backbone, options: DraftOptions, weights: DraftWeights, verifier: str, proposals: int, dtype: torch.dtype
) -> dict[str, Any]:
    shape, tokens = weights.block.shape, weights.tokens
    positions = backbone.max_positions() or shape.window
    whole = shape.window >= positions
    layer = {
        "model_type": "llama",
        "vocab_size": backbone.vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": 1,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "rms_norm_eps": EPSILON,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "layer_types": ["full_attention" if whole else "sliding_attention"],
        "sliding_window": None if whole else shape.window,
        "dtype": str(dtype).removeprefix("torch."),
    }
    proposal = {"proposal_type": "greedy", "speculative_tokens": proposals, "verifier_accept_k": 1}
    architectures = list(getattr(backbone.model.config, "architectures", None) or [type(backbone.model).__name__])
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": VERSION,
        "dtype": layer["dtype"],
        "draft_vocab_size": backbone.vocab_size if tokens is None else len(tokens),
        "target_hidden_size": backbone.width,
        "eagle_aux_hidden_state_layer_ids": list(options.taps),
        "norm_before_residual": True,
        "norm_before_fc": False,
        "fc_norm": True,
        "norm_output": False,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": verifier, "architectures": architectures},
        },
    }


def _plain(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of its own on the CPU; numbers in ``dtype``."""
    value = value.detach().cpu()
    return (value.to(dtype) if value.is_floating_point() else value).clone().contiguous()
