"""Configurations of the two reference backbones, and of their tiny twins for smoke runs and tests."""

from __future__ import annotations

from typing import Any

from transformers import Mamba2Config, MistralConfig, PretrainedConfig

NAMES = {"transformer": "transformer-ee", "mamba": "mamba-ee"}
OBJECTIVES = ("multi-exit", "ordinary")
CONTEXT = 1024  # training sequence length


def name(kind: str, objective: str) -> str:
    """The folder a backbone of this kind is saved in: the shipped name, or <kind>-ordinary."""
    return NAMES[kind] if objective == "multi-exit" else f"{kind}-{objective}"


def config(kind: str, smoke: bool = False) -> PretrainedConfig:
    """The configuration of `kind`, 'transformer' or 'mamba'; `smoke` keeps the shape and shrinks every size."""
    if kind not in NAMES:
        raise ValueError(f"unknown backbone {kind!r}; allowed: {', '.join(NAMES)}")
    common: dict[str, Any] = {
        "vocab_size": 8192,
        "hidden_size": 32 if smoke else 192,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    if kind == "transformer":
        return MistralConfig(
            **common,
            num_hidden_layers=4 if smoke else 16,
            num_attention_heads=4 if smoke else 6,
            num_key_value_heads=2,
            head_dim=8 if smoke else 32,
            intermediate_size=64 if smoke else 512,
            max_position_embeddings=2048,
            sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    return Mamba2Config(
        **common,
        num_hidden_layers=4 if smoke else 24,
        num_heads=4 if smoke else 12,
        head_dim=16 if smoke else 32,
        state_size=8 if smoke else 64,
        n_groups=1,  # transformers before 5.23 norms several groups as one: with one group all versions agree
        expand=2,
        conv_kernel=4,
        chunk_size=128,
        use_bias=False,
        use_conv_bias=True,
        residual_in_fp32=True,
        initializer_range=0.06,  # about 1 / sqrt(192): unit-scale projections, unit-scale logits
        time_step_limit=(0.0, float("inf")),
    )
