"""Fakes for your tests and ours: tiny random backbones of every family, and a scripted estimator.

model = tiny_model("mamba2", layers=5)          # stock class, odd sizes, seconds to run
judge = ScriptedConfidence(torch.tensor([[0, 9, 1]]))  # one row: first exit, full depth, second exit
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BambaConfig,
    FalconH1Config,
    FalconMambaConfig,
    GemmaConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    NemotronHConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Zamba2Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from dynamax_llm.evaluation.common.random_models import zero_tail
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.features import ExitFeatures
from dynamax_llm.exits.state import State
from dynamax_llm.registry import Registry

__all__ = ["TINY", "ScriptedConfidence", "random_ids", "tiny_model", "zero_tail"]


def _cycle(*kinds: str) -> Callable[[int], list[str]]:
    """A config's list of layer kinds, for any number of layers."""
    return lambda layers: [kinds[index % len(kinds)] for index in range(layers)]


_ATTENTION = {
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,  # grouped heads
    "head_dim": 10,  # not hidden_size / heads
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
_MAMBA2 = {
    "hidden_size": 36,
    "expand": 2,
    "head_dim": 12,
    "num_heads": 6,
    "n_groups": 2,
    "state_size": 10,
    "conv_kernel": 4,
    "chunk_size": 8,
    "residual_in_fp32": True,
    "initializer_range": 0.3,
}
_MAMBA1 = {
    "hidden_size": 36,
    "expand": 2,
    "state_size": 10,
    "conv_kernel": 4,
    "time_step_rank": 5,
    "residual_in_fp32": True,
    "initializer_range": 0.3,
}
#: Mamba-2 mixers as most hybrids spell them.
_MIXER = {
    "mamba_n_heads": 6,
    "mamba_d_head": 12,
    "mamba_n_groups": 2,
    "mamba_d_state": 10,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
#: These families clamp dt at time_step_min in a parallel scan and not in a single step; with the stock 0.001 the two
#: would differ by more than the laws allow. The floor keeps dt, and with it the state, from vanishing.
_STEPS = {"time_step_min": 1e-6, "time_step_max": 1.0, "time_step_floor": 0.1}
#: Grouped products of experts want rows of whole 16 bytes, in half precision too; routing and scaling amplify rounding.
_EXPERTS = {"hidden_size": 40, "num_experts_per_tok": 2, "intermediate_size": 24, "initializer_range": 0.2}
_FALCON_H1 = {
    "embedding_multiplier": 1.7,
    "lm_head_multiplier": 0.6,
    "key_multiplier": 0.8,
    "attention_in_multiplier": 1.2,
    "attention_out_multiplier": 0.7,
    "ssm_in_multiplier": 1.3,
    "ssm_out_multiplier": 0.9,
    "ssm_multipliers": [1.1, 0.9, 1.2, 0.8, 0.7],
    "mlp_multipliers": [0.8, 1.2],
}
_GRANITE = {
    "embedding_multiplier": 1.7,
    "logits_scaling": 1.6,
    "residual_multiplier": 0.8,
    "attention_multiplier": 0.4,
    "position_embedding_type": "rope",
    "num_local_experts": 4,
    "mamba_n_heads": 10,
    "mamba_d_head": 8,
    "shared_intermediate_size": 28,
    "layer_types": _cycle("linear_attention", "full_attention", "linear_attention"),
}
_JAMBA = {
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "num_experts": 3,
    "mamba_d_state": 10,
    "mamba_d_conv": 4,
    "mamba_dt_rank": 5,
}
_NEMOTRON_H = {
    "layers_block_type": _cycle("linear_attention", "moe", "full_attention", "mlp"),
    "mamba_num_heads": 6,
    "mamba_head_dim": 12,
    "n_groups": 2,
    "ssm_state_size": 10,
    "chunk_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 20,
    "moe_latent_size": 16,
    "routed_scaling_factor": 1.5,
    "rescale_prenorm_residual": False,
    **_STEPS,
}
_ZAMBA2 = {
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # its two residual paths amplify rounding
    "layers_block_type": _cycle("linear_attention", "hybrid", "hybrid"),
    "num_mem_blocks": 2,  # some hybrid layers share one transformer
    "use_shared_attention_adapter": True,
    "adapter_rank": 5,
    "use_mem_rope": True,
    "n_mamba_heads": 6,
    "mamba_ngroups": 2,
    "mamba_d_state": 10,
    "chunk_size": 8,
    **_STEPS,
}
_WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 7,
    "layer_types": _cycle("full_attention", "sliding_attention"),
}
#: model_type to (config class, sizes): odd on purpose, so that a transposed axis cannot hide. A callable makes its
#: value of the number of layers.
TINY: Registry[tuple[type, dict[str, Any]]] = Registry(
    "tiny model",
    {
        "bamba": (BambaConfig, {**_ATTENTION, **_MIXER, "head_dim": 8, "attn_layer_indices": [1, 4]}),
        "falcon_h1": (
            FalconH1Config,
            {**_ATTENTION, **_MIXER, **_FALCON_H1, "mamba_d_ssm": 72, "mamba_rms_norm": True},
        ),
        "falcon_mamba": (FalconMambaConfig, _MAMBA1),
        "gemma": (GemmaConfig, _ATTENTION),
        "granitemoehybrid": (GraniteMoeHybridConfig, {**_ATTENTION, **_EXPERTS, **_MIXER, **_GRANITE}),
        "jamba": (JambaConfig, {**_ATTENTION, **_EXPERTS, **_JAMBA}),
        "llama": (LlamaConfig, _ATTENTION),
        "mamba": (MambaConfig, _MAMBA1),
        "mamba2": (Mamba2Config, _MAMBA2),
        "mistral": (MistralConfig, {**_ATTENTION, "sliding_window": None}),
        "nemotron_h": (NemotronHConfig, {**_ATTENTION, **_NEMOTRON_H}),
        "qwen2": (Qwen2Config, {**_ATTENTION, **_WINDOWS}),
        "qwen3": (Qwen3Config, {**_ATTENTION, "attention_bias": True}),
        "zamba2": (Zamba2Config, _ZAMBA2),
    },
)


def tiny_model(model_type: str, *, layers: int = 5, vocab: int = 61, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A stock model of this family with random float32 weights, in eval mode; ``sizes`` override the config."""
    config_class, defaults = TINY.lookup(model_type)
    defaults = {name: value(layers) if callable(value) else value for name, value in defaults.items()}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = config_class(**{**defaults, "num_hidden_layers": layers, "vocab_size": vocab, **special, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _disturb(model)
    return model.eval()


@torch.no_grad()
def _disturb(model: nn.Module) -> None:
    """Move norms and biases off their initial ones and zeros, so that a forgotten one changes the output."""
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith(("bias", ".D")):
            parameter.add_(0.2 * torch.randn_like(parameter))


def random_ids(batch: int, length: int, vocab: int = 61, seed: int = 0) -> Tensor:
    """Token ids (B, T), none of them the end-of-text token 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab, (batch, length), generator=generator)


class ScriptedConfidence(ConfidenceEstimator):
    """Confidence 1 at the exits of a given pattern and 0 elsewhere; use a threshold in (0, 1].

    ``pattern`` (B, S) holds the exit index each row takes at each decode step; any other number never leaves.
    """

    needs_logits = False
    on_device = False

    def __init__(self, pattern: Tensor) -> None:
        self.pattern, self.step = pattern, 0

    def confidence(
        self, exit: int, h: Tensor, features: ExitFeatures, state: State | None, padding: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        if h.shape[1] == 1:
            taken = self.pattern[:, [self._tick(exit)]]
        else:  # a teacher-forced text: the pattern covers its last positions
            taken = torch.cat(
                (self.pattern.new_full((len(h), h.shape[1] - self.pattern.shape[1]), -1), self.pattern), 1
            )
        return (taken == exit).float(), state

    def _tick(self, exit: int) -> int:
        """The step being decoded: exit 0 is evaluated once per token."""
        self.step += exit == 0
        return self.step - 1

    def macs(self, exit: int) -> int:
        return 0
