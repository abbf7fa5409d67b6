"""The interface of readouts: how an exit turns its hidden state into logits, and into features for the decision.

A kind is a class of its own, registered in ``READOUTS``. What is common to all is here: h is transformed (by a lens, a
trained block, or not at all), then read by the backbone's final norm and LM head, all of the vocabulary or candidates.

Shapes: B batch, T tokens, d width, V vocabulary, E exits.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from dynamax_llm.backbones.base import Backbone
from dynamax_llm.exits.config import ExitConfig, ReadoutOptions
from dynamax_llm.exits.features import ExitFeatures, concatenate, exit_features, slice_features
from dynamax_llm.exits.registries import READOUTS
from dynamax_llm.exits.state import State, Stateful
from dynamax_llm.shapes import Hidden, Ids, Logits, Spoken

#: Logits made at once when a whole sequence is read out; bounds memory at 64 MiB a float32 copy.
LOGITS_AT_ONCE = 1 << 24
#: A GPU makes this many times more, because every slice costs launches there (measured: recipes/scale).
GPU_FACTOR = 4


class Readout(Stateful):
    """Logits and features at the exits of one backbone; the base of every kind."""

    #: The kind's own options, a dataclass; its fields are named as in ``ExitConfig.from_options``.
    Options: type[ReadoutOptions] = ReadoutOptions
    #: Name of what trains the weights (``training.phases.READOUT_LEARNERS``); None if there is nothing to train.
    learner: str | None = None
    #: True if the logits that the decision was taken from are those of the token: no second readout is needed.
    decision_is_output: bool = True
    #: True if heads read the transformed h in place of h.
    heads_read_output: bool = False
    #: True if it drafts from depth 0: a chain of tokens between two passes of the backbone. With a state it needs taps.
    drafts: bool = False
    #: The tokens it speaks (K,), ascending, where they are a part of the vocabulary; None: all.
    vocabulary: Tensor | None = None

    def __init__(self, backbone: Backbone, config: ExitConfig, weights: nn.Module | None = None) -> None:
        """``weights`` are what ``new_weights`` made, trained; required by kinds that have any."""
        with torch.device("meta"):
            expected = self.new_weights(config, backbone.width)
        assert (weights is None) == (expected is None), f"{config.readout} readout: weights {weights}"
        self.backbone, self.config, self.kind = backbone, config, config.readout
        #: Layers that the engine runs between leaving an exit and ``logits``.
        self.tail_layers = config.tail_layers
        self.weights = None if weights is None else weights.to(backbone.device)

    @classmethod
    def new_weights(cls, config: ExitConfig, width: int) -> nn.Module | None:
        """Untrained weights for a backbone of this width, saved with the exits; None if this kind has none."""
        return None

    @classmethod
    def fitted(cls, config: ExitConfig, backbone: Backbone) -> ExitConfig:
        """``config`` with every option that follows from the backbone filled in, before training.

        Raises UsageError for options that this backbone does not allow.
        """
        return config

    @classmethod
    def fault(cls, weights: nn.Module, vocab_size: int) -> str | None:
        """What is wrong with weights read from a file, for a model of ``vocab_size`` tokens; None if nothing is."""
        return None

    @property
    def taps(self) -> tuple[int, ...]:
        """Depths whose h ``observe`` reads; empty: it is never called."""
        return ()

    def observe(
        self,
        embedded: Tensor,
        tapped: Sequence[Tensor],
        states: list[State],
        padding: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> list[State]:
        """States after T tokens that every layer has read, in place of what was remembered while they were drafted.

        ``embedded`` (B, T, d), ``tapped`` h (B, T, d) after each of ``taps``, ``states`` those before the tokens.
        ``padding`` (B, T) is 0 at left pads of a prompt; of a window every row keeps its first ``counts`` (B,) tokens.
        """
        return states

    @abc.abstractmethod
    def transform(
        self, exit: int, h: Tensor, state: State | None = None, padding: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """h (B, T, d) as the LM head should read it at exit ``exit``, and this exit's state after the T tokens.

        ``state`` None begins a sequence; ``padding`` (B, T) is 0 at left pads.
        """

    def skip_code(self, exit: int, h: Tensor, moved: Tensor) -> Tensor | None:
        """What ``skip_input`` needs of tokens that leave, h and transformed h (B, T, d); None: layers read h itself."""
        return None

    def skip_input(self, exit: int, layer: int, h: Tensor, code: Tensor) -> Tensor:
        """What layer ``layer`` (from 0) reads of tokens (B, T, d) that left at exit ``exit``, under ``propagate``."""
        return h

    def skip_macs(self, exit: int) -> int:
        """Multiply-accumulates of ``skip_code`` and every ``skip_input`` of one token."""
        return 0

    def transform_macs(self, exit: int) -> int:
        """Multiply-accumulates of ``transform`` of one token."""
        return 0

    def scores(self, exit: int, moved: Hidden) -> Spoken:
        """Float32 logits of the tokens it speaks, (B, T, V) or (B, T, K), from transformed h."""
        return self.backbone.readout(moved)

    @final
    def logits(self, exit: int, moved: Hidden) -> Logits:
        """Float32 logits (B, T, V) of exit ``exit`` from transformed h; with a tail, from h after the tail."""
        return self.spread(self.scores(exit, moved))

    def spread(self, scores: Spoken) -> Logits:
        """Logits (B, T, V) from ``scores``: minus infinity for tokens that it does not speak."""
        if self.vocabulary is None:
            return scores
        whole = scores.new_full((*scores.shape[:-1], self.backbone.vocab_size), -torch.inf)
        whole[..., self.vocabulary] = scores
        return whole

    def read(
        self, exit: int, h: Hidden, h_before: Hidden, previous: ExitFeatures | None, moved: Hidden | None = None
    ) -> tuple[ExitFeatures, Logits | None]:
        """Features of h (B, 1, d) at exit ``exit``, and its logits (B, 1, V) if it read all and they may be output.

        ``moved`` is the transformed h; readouts without a state make it themselves. With ``config.candidates`` the
        first exit reads the whole vocabulary and the later ones only its candidates, so that a check there costs next
        to nothing (the idea of SpecEE, arXiv 2504.08850).
        """
        if moved is None:
            assert not self.recurrent, "a readout with a state needs h transformed from that state"
            moved = self.transform(exit, h)[0]
        if previous is not None and previous.candidates is not None:
            few = self.backbone.readout_of(moved, previous.candidates)
            return self._with_rows(exit_features(h, h_before, few, previous)), None
        scores = self.scores(exit, moved)
        features = self._features(h, h_before, scores, previous)
        return self._with_rows(features), self.spread(scores) if self.decision_is_output else None

    def features(
        self, exit: int, h: Hidden, h_before: Hidden, previous: ExitFeatures | None, moved: Hidden | None = None
    ) -> tuple[ExitFeatures, Ids]:
        """What ``read`` gives, over a whole sequence h (B, T, d), and the argmax (B, T) of all the logits.

        ``moved`` is the transformed h; None: transformed here, from the beginning of a sequence. In slices of T, so
        that memory stays bounded; every slice reads the whole vocabulary, for the argmax.
        """
        if moved is None and self.recurrent:
            moved = self.transform(exit, h)[0]
        step = max(1, tokens_at_once(self.backbone) // h.shape[0])
        parts, tokens = [], []
        for start in range(0, h.shape[1], step):
            run = slice(start, start + step)
            before = None if previous is None else slice_features(previous, run)
            scores = self.scores(exit, self.transform(exit, h[:, run])[0] if moved is None else moved[:, run])
            best = scores.argmax(-1)
            tokens.append(best if self.vocabulary is None else self.vocabulary[best])
            if before is not None and before.candidates is not None:
                scores = scores.gather(-1, self._columns(before.candidates))
            parts.append(self._with_rows(self._features(h[:, run], h_before[:, run], scores, before)))
        return parts[0] if len(parts) == 1 else concatenate(parts), torch.cat(tokens, dim=1)

    def _columns(self, tokens: Tensor) -> Tensor:
        """Where ``tokens``, all of which it speaks, are in ``scores``."""
        return tokens if self.vocabulary is None else torch.searchsorted(self.vocabulary, tokens.contiguous())

    def _features(self, h: Hidden, h_before: Hidden, scores: Logits, previous: ExitFeatures | None) -> ExitFeatures:
        """ExitFeatures of scores over all tokens it speaks, or over the candidates of the exits before."""
        pairs = self.config.shortlist == "pairs"
        return exit_features(h, h_before, scores, previous, self.config.candidates, pairs, self.vocabulary)

    def _with_rows(self, features: ExitFeatures) -> ExitFeatures:
        """With the LM head's rows of the leading token and its runner-up, if the heads read them."""
        if "tokens" not in self.config.inputs or features.token is None or features.rival is None:
            return features
        rows = self.backbone.output_rows(torch.stack((features.token, features.rival), dim=-1))  # (B, T, 2, d)
        return dataclasses.replace(features, rows=rows.flatten(-2))

    def macs(self, exit: int) -> int:
        """Multiply-accumulates of one readout of one token: LM head and ``transform``."""
        return self.head_macs() + self.transform_macs(exit)

    def head_macs(self) -> int:
        """Multiply-accumulates of ``scores`` of one token."""
        return self.backbone.costs().readout

    def reads_all(self, exit: int) -> bool:
        """Whether a check at exit ``exit`` reads the whole vocabulary."""
        return exit == 0 or not self.config.candidates

    def read_macs(self, exit: int) -> int:
        """Multiply-accumulates of one check's readout of one token."""
        if self.reads_all(exit):
            return self.macs(exit)
        few = min(self.config.candidates, self.backbone.vocab_size) * self.backbone.width
        return few + self.transform_macs(exit)


def build_readout(backbone: Backbone, config: ExitConfig, weights: nn.Module | None = None) -> Readout:
    """The readout that ``config`` names, on ``backbone``."""
    kind = READOUTS.lookup(config.readout)
    return kind(backbone, config, weights)


def tokens_at_once(backbone: Backbone) -> int:
    """How many tokens' logits may exist at once."""
    logits = LOGITS_AT_ONCE * (GPU_FACTOR if backbone.device.type == "cuda" else 1)
    return max(1, logits // backbone.vocab_size)
