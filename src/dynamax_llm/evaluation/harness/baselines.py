"""The paper's baseline: layer pruning, the n layers before the last removed (arXiv 2504.20922).

The pruned model is a stock model of its own, with its own modules and configuration and the backbone's weights: no
weight is copied, and the backbone is not changed.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel

from dynamax_llm.backbones import adapt
from dynamax_llm.errors import UsageError


def pruned(model: PreTrainedModel, removed: int) -> PreTrainedModel:
    """``model`` without the ``removed`` layers before its last one; it shares every weight with ``model``.

    Raises UsageError unless 1 <= removed <= L - 2, or if the family's configuration fixes which layer is of what kind
    by a rule that a shorter stack would break.
    """
    whole = adapt(model)
    n_layers = whole.n_layers
    if not 1 <= removed <= n_layers - 2:
        raise UsageError(
            f"pruning {removed} layers of {n_layers}: at least the first and the last layer stay, so give 1 to "
            f"{n_layers - 2}."
        )
    kept = [*range(n_layers - 1 - removed), n_layers - 1]
    # Whatever the memo names is taken over as it is: all parameters and buffers, nothing else.
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shorter = copy.deepcopy(model, shared)
    stack = adapt(shorter).layers
    for index in reversed(range(n_layers)):
        if index not in kept:
            del stack[index]
    for index, layer in enumerate(stack):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    _trim(shorter.config, n_layers, kept)
    if _kinds(shorter.config) != [[kinds[index] for index in kept] for kinds in _kinds(model.config)]:
        raise UsageError(
            f"layers of {whole.model_type!r} cannot be pruned: its configuration derives kinds from positions. "
            "Leave the pruned baseline out (see `baselines`)."
        )
    return shorter.eval()


def _trim(config: Any, n_layers: int, kept: list[int]) -> None:
    """Make the configuration one of the kept layers: their number, and every list with one entry per layer."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == n_layers:
            setattr(config, name, [value[index] for index in kept])
    if isinstance(getattr(config, "attn_layer_indices", None), list):
        config.attn_layer_indices = [new for new, old in enumerate(kept) if old in config.attn_layer_indices]
    if getattr(config, "num_hidden_layers", None) != len(kept):
        config.num_hidden_layers = len(kept)


def _kinds(config: Any) -> list[list[str]]:
    """The configuration's lists of layer kinds; in some families they follow from a rule of positions."""
    lists = (getattr(config, name, None) for name in ("layer_types", "layers_block_type"))
    return [list(item) for item in lists if item is not None]
