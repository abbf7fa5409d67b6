"""State policies: what becomes of the state of layers that a token skipped.

    propagate   every skipped layer updates its state from h_e: its own K/V projections, or its conv window and SSM
                cell. Approximate: later tokens read a state made from h_e instead of from that layer's true input.
    copy        attention only: the layer's previous entry is stored again. Approximate, and cheaper: later tokens
                attend to a repeated neighbour (keys keep the neighbour's position).
    stale       Mamba only: conv window and SSM state are left alone. Approximate, and free: the skipped layers never
                hear of the token.
    defer       exact state: h_e waits, and the skipped layers run over it when a token next goes deeper. What a token
                that left says is still its exit's.
    verify      exact output: ``defer``, and the catch-up pass also yields the full model's token after every waiting
                token; the first that differs is put right and what followed it is taken back.

A token that stays reads exact arithmetic on whatever state the policy left.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone, Context
from dynamax_llm.backbones.cache import KINDS
from dynamax_llm.engines import EagerEngine
from dynamax_llm.errors import PolicyMismatchError
from dynamax_llm.exits.readouts.base import Readout
from dynamax_llm.registry import Registry

#: Tokens per row that may wait, under the policies that let tokens wait.
DEFAULT_WINDOW = 16


class StatePolicy:
    """What happens to the state of the layers a token skips."""

    name: str
    #: Later tokens read the state that never leaving would have made.
    exact_state = False
    #: The tokens are the full model's.
    exact_output = False
    #: Kinds of layers this policy is defined for.
    kinds: tuple[str, ...] = KINDS
    #: Whether a skipped layer costs its state update.
    updates_state = False

    def check(self, backbone: Backbone, readout: Readout) -> None:
        """Raise PolicyMismatchError if the policy is not defined for this backbone's layers, or with this readout."""
        wrong = sorted(set(backbone.kinds) - set(self.kinds))
        if wrong:
            allowed = [name for name, policy in POLICIES.items() if set(backbone.kinds) <= set(policy.kinds)]
            raise PolicyMismatchError(
                f"state policy {self.name!r} is not defined for the {' and '.join(wrong)} layers of "
                f"{backbone.model_type!r}. Use {', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}."
            )
        if self.exact_state and readout.tail_layers:
            raise PolicyMismatchError(
                f"state policy {self.name!r} cannot be used with the readout 'tail': a token that leaves would run "
                f"the last layers at once, on h that never passed those between, and their state would not be exact. "
                "Use exits with the readout 'head' or 'lens', or the policy 'propagate'."
            )


class InPlace(StatePolicy, abc.ABC):
    """A policy that gives skipped layers a state at once; all are approximate."""

    @abc.abstractmethod
    def skip(self, engine: EagerEngine, first: int, stop: int, h: Tensor, ctx: Context) -> None:
        """Every row left with h (B, 1, d): account for layers ``first`` to ``stop - 1``."""

    def run(self, engine: EagerEngine, first: int, stop: int, h: Tensor, left: Tensor, ctx: Context) -> Tensor:
        """Some rows left (``left`` (B,) bool) and keep their h; the others run layers ``first`` to ``stop - 1``.

        The whole batch passes through each layer: at small batches a layer's cost is reading its weights, which the
        rows that stay pay anyway. A row that left is thereby updated from its own frozen h, which is ``propagate``;
        the other policies then put right what that row should have kept.
        """
        frozen = left.view(-1, 1, 1)
        engine.passes += stop - first
        for index in range(first, stop):
            kept = self.before(engine, index)
            h = torch.where(frozen, h, engine.backbone.layer(index, h, engine.cache, ctx))
            self.after(engine, index, left, kept)
        return h

    def before(self, engine: EagerEngine, index: int) -> tuple[Tensor, ...]:
        """What ``after`` needs to remember of layer ``index``."""
        return ()

    def after(self, engine: EagerEngine, index: int, left: Tensor, kept: tuple[Tensor, ...]) -> None:
        """Give the rows that left what this policy leaves them with."""


class Propagate(InPlace):
    """Skipped layers update their state from h_e."""

    name, updates_state = "propagate", True

    def skip(self, engine: EagerEngine, first: int, stop: int, h: Tensor, ctx: Context) -> None:
        engine.update_states(first, stop, h, ctx)


class Copy(InPlace):
    """Skipped attention layers repeat their newest K/V entry."""

    name, kinds = "copy", ("attention", "none")

    def skip(self, engine: EagerEngine, first: int, stop: int, h: Tensor, ctx: Context) -> None:
        engine.cache.repeat_last_kv(first, stop)

    def after(self, engine: EagerEngine, index: int, left: Tensor, kept: tuple[Tensor, ...]) -> None:
        engine.cache.replace_last_kv(index, left)


class Stale(InPlace):
    """Skipped Mamba layers keep the state they had."""

    name, kinds = "stale", ("mamba", "none")

    def skip(self, engine: EagerEngine, first: int, stop: int, h: Tensor, ctx: Context) -> None:
        return None

    def before(self, engine: EagerEngine, index: int) -> tuple[Tensor, ...]:
        return tuple(part[0].clone() for part in engine.cache.recurrent(index, index + 1))

    def after(self, engine: EagerEngine, index: int, left: Tensor, kept: tuple[Tensor, ...]) -> None:
        for part, old in zip(engine.cache.recurrent(index, index + 1), kept, strict=True):
            part[0, left] = old[left]


class Defer(StatePolicy):
    """Tokens that left wait until a deeper one takes them along; carried out by ``DeferredDecoder``."""

    name, exact_state = "defer", True


class Verify(StatePolicy):
    """``defer``, and every token is checked by the full model; carried out by ``VerifyingDecoder``."""

    name, exact_state, exact_output = "verify", True, True


POLICIES: Registry[StatePolicy] = Registry(
    "state policy", {policy.name: policy for policy in (Propagate(), Copy(), Stale(), Defer(), Verify())}
)
