"""Fakes for your tests and ours: tiny random backbones of every family, and a scripted judge.

model = tiny_model("mamba2", layers=5)          # stock class, odd sizes, seconds to run
judge = ScriptedJudge(torch.tensor([[0, 9, 1]]))  # one row: first exit, full depth, second exit
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Mamba2Config, MistralConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from dynamax_llm.backbones import adapt
from dynamax_llm.exits.confidence import Judge, Signals, State
from dynamax_llm.registry import Registry

_ATTENTION = {
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,  # grouped heads
    "head_dim": 10,  # not hidden_size / heads
    "max_position_embeddings": 512,
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
#: model_type to (config class, sizes): odd on purpose, so that a transposed axis cannot hide.
TINY: Registry[tuple[type, dict[str, Any]]] = Registry(
    "tiny model",
    {
        "llama": (LlamaConfig, {**_ATTENTION, "initializer_range": 0.3}),
        "mamba2": (Mamba2Config, _MAMBA2),
        "mistral": (MistralConfig, {**_ATTENTION, "sliding_window": None, "initializer_range": 0.3}),
    },
)


def tiny_model(model_type: str, *, layers: int = 5, vocab: int = 61, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A stock model of this family with random float32 weights, in eval mode; ``sizes`` override the config."""
    config_class, defaults = TINY.lookup(model_type)
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


class ScriptedJudge(Judge):
    """Leaves where it is told, with confidence 1; use a threshold in (0, 1].

    ``pattern`` (B, S) holds the exit index each row takes at each decode step; any other number never leaves.
    """

    needs_logits = False

    def __init__(self, pattern: Tensor) -> None:
        self.pattern, self.step = pattern, 0

    def confidence(
        self, exit: int, h: Tensor, signals: Signals, state: State | None, padding: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        if h.shape[1] == 1:
            taken = self.pattern[:, [self._tick(exit)]]
        else:  # a teacher-forced text: the pattern covers its last positions
            taken = torch.cat(
                (self.pattern.new_full((len(h), h.shape[1] - self.pattern.shape[1]), -1), self.pattern), 1
            )
        return (taken == exit).float(), state

    def _tick(self, exit: int) -> int:
        """The step being decoded: exit 0 is asked once per token."""
        self.step += exit == 0
        return self.step - 1

    def macs(self, exit: int) -> int:
        return 0


@torch.no_grad()
def zero_tail(model: nn.Module, depth: int) -> nn.Module:
    """Make the layers after ``depth`` add nothing: stopping there then gives exactly the full model's output, at the
    full model's cost. Zeroes every projection that writes into the residual stream; changes ``model`` in place."""
    for layer in adapt(model).layers[depth:]:
        for name, parameter in layer.named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "out_proj")):
                parameter.zero_()
    return model
