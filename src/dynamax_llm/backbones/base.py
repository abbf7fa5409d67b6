"""The interface to a stock causal LM of any family, run layer by layer.

A Backbone wraps a loaded Hugging Face model and never changes it: no subclassing, no patched forward, no copied
modelling code. Engines call ``embed``, ``context``, ``layer`` and ``readout``; ``update_state`` is the state-only
twin of ``layer`` for a token that left at an exit, and ``update_states`` is its stacked form for many layers at once.

Shapes: B batch, T tokens, d width, V vocabulary. Layers are indexed from 0; *depth* counts layers run, from 1.
"""

from __future__ import annotations

import abc
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dynamax_llm.backbones.cache import StackedCache
from dynamax_llm.backbones.stacking import dense_weight, is_plain_linear
from dynamax_llm.backbones.stock import Layers
from dynamax_llm.errors import UsageError
from dynamax_llm.shapes import Choices, Hidden, Ids, Logits


@dataclass(frozen=True)
class Context:
    """What one forward over T tokens shares between layers; built once per call by ``Backbone.context``."""

    positions: Tensor | None = None  # (B or 1, T) int64
    mask: Any = None  # attention mask (a tensor or a BlockMask) as the model's attention implementation wants it
    window_mask: Any = None  # the same for layers that attend to a sliding window only
    padding: Tensor | None = None  # (B, T) 1 = token, 0 = pad: the recurrent layers' mask, None if nothing is padded
    rotary: tuple[Tensor, Tensor] | None = None  # (cos, sin), each (B or 1, T, rotary dims of a head)
    embedded: Tensor | None = None  # (B, T, d) embeddings of these tokens, for layers that read them again


@dataclass(frozen=True)
class LayerCost:
    """Multiply-accumulates per token: of the whole layer, and of its state update alone."""

    layer: int
    state: int


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates per token of a backbone's weights; attention over the cache is not counted."""

    layers: tuple[LayerCost, ...]
    readout: int  # final norm + LM head
    total: int = field(init=False)  # a full-depth token

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", sum(cost.layer for cost in self.layers) + self.readout)

    def depth(self, layers_run: int) -> int:
        """Cost of the first ``layers_run`` layers."""
        return sum(cost.layer for cost in self.layers[:layers_run])

    def skipped(self, first: int, stop: int) -> int:
        """Cost of updating the state of layers ``first`` to ``stop - 1`` without running them."""
        return sum(cost.state for cost in self.layers[first:stop])


class Backbone(abc.ABC):
    """A stock causal LM, driven layer by layer."""

    #: False where the stock layer silently restarts the recurrence in a multi-token step from a cached state (Mamba-1
    #: mixers). ``layer`` then takes such a step token by token: always right, but no cheaper than single steps.
    can_continue_multi_token: bool = True
    #: True if some layers read the tokens' embeddings besides h: ``context`` then wants ``embedded`` for any run of
    #: layers that does not start at the first.
    needs_embedding: bool = False
    #: True if stock passes over several tokens clamp Mamba-2's dt where single steps do not: a whole text in one pass
    #: then leaves slightly different states and logits than a prompt and single steps, in the stock model as much as
    #: here. Passes that continue a state give what single steps give (``mixers.prepare``).
    clamps_dt: bool = False
    #: True if layers read token positions (rotary embeddings).
    needs_positions: bool = False

    def __init__(self, model: Any) -> None:
        #: The stock causal LM; what its parts are called depends on the family.
        self.model = model
        self.config = model.config
        self.layers: Layers = self._find_layers()
        self.n_layers = len(self.layers)
        self.width = int(self.config.hidden_size)
        self.vocab_size = int(self.config.vocab_size)
        #: What each layer remembers: "attention", "mamba", "hybrid" (both) or "none".
        self.kinds: tuple[str, ...] = self._find_kinds()
        #: What an engine has made ready for this backbone, the latest last; it lives as long as the backbone does.
        self.machines: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where token ids go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.model.dtype

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the architecture."""
        return self.config.model_type

    @abc.abstractmethod
    def _find_layers(self) -> Layers:
        """The stock model's list of decoder layers."""

    @abc.abstractmethod
    def _find_kinds(self) -> tuple[str, ...]:
        """What each layer remembers, one of ``cache.KINDS`` per layer."""

    def embed(self, ids: Ids) -> Hidden:
        """Token ids (B, T) to hidden states (B, T, d)."""
        return self.model.get_input_embeddings()(ids)

    @abc.abstractmethod
    def context(
        self, h: Tensor, *, past: int = 0, padding: Tensor | None = None, embedded: Tensor | None = None
    ) -> Context:
        """What any run of layers shares for the T tokens of ``h`` that follow ``past`` slots.

        ``padding`` is (B, past + T), 1 = token and 0 = a slot that holds none (left padding, or a token that was
        taken back), or None if every slot of every row holds a token. ``past`` is the engine's count, not the cache's.
        ``embedded`` (B, T, d) is what ``embed`` gave for these tokens, None if that is h itself; only a backbone with
        ``needs_embedding`` reads it.
        """

    @abc.abstractmethod
    def layer(self, index: int, h: Tensor, cache: StackedCache | None, ctx: Context) -> Tensor:
        """Run layer ``index`` (from 0) on h (B, T, d), advancing its state in ``cache``; returns (B, T, d)."""

    def hidden_states(self, ids: Ids, padding: Tensor | None = None) -> Iterator[tuple[int, Hidden]]:
        """Run whole texts ids (B, T) without a cache: (depth, h) for the embeddings, depth 0, and after every layer.

        ``padding`` (B, T) is 1 at tokens and 0 at pads; right pads need none.
        """
        h = self.embed(ids.to(self.device, non_blocking=True))
        yield 0, h
        ctx = self.context(h, padding=padding)
        for index in range(self.n_layers):
            h = self.layer(index, h, None, ctx)
            yield index + 1, h

    @abc.abstractmethod
    def update_state(self, index: int, h: Tensor, cache: StackedCache, ctx: Context) -> None:
        """Leave in ``cache`` exactly what ``layer`` would leave, without computing its output."""

    def update_states(self, first: int, stop: int, h: Tensor, cache: StackedCache, ctx: Context) -> None:
        """``update_state`` for layers ``first`` to ``stop - 1``, all reading the same h."""
        for index in range(first, stop):
            self.update_state(index, h, cache, ctx)

    def state_projection(self, index: int, h: Tensor) -> Tensor:
        """What the state of layer ``index`` is made of, (..., R) from h (..., d): the products of its normed input
        that enter it, or where a family does not name them h at unit root mean square."""
        return nn.functional.rms_norm(h, h.shape[-1:])

    def check_stock(self) -> None:
        """Raise UsageError if the model computes more than its layers do, which driving the layers would leave out.

        That is a causal LM with a ``forward`` or a ``prepare_inputs_for_generation`` of its own, or a hook on the
        causal LM or on the model inside it. Hooks on layers, norms, embedding and head are followed.
        """
        model, name = self.model, type(self.model).__name__
        stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self.config), type(model))
        placed = hasattr(model, "_hf_hook") or hasattr(model, "_original_forward")  # accelerate's own forward
        for method in ("forward", "prepare_inputs_for_generation"):
            expected = getattr(stock, method, None)
            if getattr(type(model), method, None) is not expected:
                raise UsageError(
                    f"{name} has a {method} of its own, which layer-by-layer decoding does not run. "
                    f"Use {stock.__name__}, or register an adapter for it under a model type of its own."
                )
            bound = vars(model).get(method)
            if bound is not None and getattr(bound, "__func__", None) is not expected and not placed:
                raise UsageError(
                    f"{method} of this {name} was replaced (prompt tuning and prefix tuning of peft do that), and "
                    "layer-by-layer decoding does not run it. Use the model without it."
                )
        for module in (model, getattr(model, "base_model", model)):
            if module._forward_hooks or module._forward_pre_hooks:
                raise UsageError(
                    f"{type(module).__name__} has a forward hook, which layer-by-layer decoding does not run. "
                    "Remove it, or put it on a layer, a norm, the embedding or the head."
                )

    def refresh(self) -> None:
        """Notice weights that were replaced or changed since the last generation; called once before each."""

    @abc.abstractmethod
    def final_norm(self, h: Tensor) -> Tensor:
        """The norm between the last layer and the LM head, cast to the head's dtype."""

    def readout(self, h: Hidden) -> Logits:
        """Hidden states (B, T, d) to float32 logits (B, T, V) through final norm and LM head."""
        return self._scale(self.model.get_output_embeddings()(self.final_norm(h))).float()

    def readout_of(self, h: Hidden, tokens: Choices) -> Logits:
        """Float32 logits (B, T, K) of ``tokens`` (B, T, K) alone, from h (B, T, d)."""
        head = self.model.get_output_embeddings()
        if tokens.numel() >= self.vocab_size or not is_plain_linear(head):
            return self.readout(h).gather(-1, tokens)
        rows = self.output_rows(tokens)  # (B, T, K, d)
        logits = torch.matmul(rows, self.final_norm(h).unsqueeze(-1)).squeeze(-1)
        return self._scale(logits if head.bias is None else logits + head.bias[tokens]).float()

    def readout_through(self, h: Hidden, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """Float32 logits (B, T, K) from h (B, T, d) through final norm and ``rows`` (K, d) of the LM head."""
        return self._scale(nn.functional.linear(self.final_norm(h), rows, bias)).float()

    def output_rows(self, tokens: Tensor) -> Tensor:
        """The LM head's rows (..., d) of ``tokens`` (...)."""
        return dense_weight(self.model.get_output_embeddings())[tokens]

    def _scale(self, logits: Tensor) -> Tensor:
        """What the stock model does to the LM head's output, elementwise; nothing in most families."""
        return logits

    def new_cache(self, rows: int | None = None) -> StackedCache:
        """An empty cache for this backbone; ``rows`` is needed only where ``put_row`` fills it."""
        return StackedCache(self.kinds, [next(layer.parameters()).device for layer in self.layers], rows)

    @abc.abstractmethod
    def costs(self) -> Costs:
        """Multiply-accumulates per token, counted from the weight shapes."""

    def max_positions(self) -> int | None:
        """The longest context the model was built for, or None if it has no limit."""
        limit: Any = getattr(self.config, "max_position_embeddings", None) if self.needs_positions else None
        return None if limit is None else int(limit)


class PastLength:
    """Given to Hugging Face's mask functions in place of a cache: how many slots precede the queries."""

    is_compileable = False

    def __init__(self, past: int) -> None:
        self.past = past

    def get_query_offset(self, layer_idx: int) -> int:
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.past + query_length, 0


def linear_macs(*modules: Any) -> int:
    """Multiply-accumulates per token of linear modules: the products of their sizes."""
    return sum(int(module.in_features) * int(module.out_features) for module in modules)


def weight_macs(modules: Iterable[nn.Module], experts_per_token: int = 0) -> int:
    """Multiply-accumulates per token of all weights that these modules own themselves (not those of their children).

    Counts linear and convolution modules whole, routers (a bare ``weight`` matrix) whole, and of stacked experts
    (bare three-dimensional parameters) the ``experts_per_token`` that one token goes through.
    """
    total = 0
    for module in modules:
        if isinstance(module, nn.Conv1d):
            total += module.weight.numel()
            continue
        if hasattr(module, "in_features") and not any(hasattr(part, "in_features") for part in module.children()):
            total += linear_macs(module)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                total += experts_per_token * parameter[0].numel()
            elif parameter.dim() == 2 and name == "weight":
                total += parameter.numel()
    return total
