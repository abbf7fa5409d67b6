"""Drafts for tests: random exits of depth 0, scripted proposals, and states that are checked as they come."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.decoder import Decoder
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.readouts.draft import DraftReadout, DraftWeights
from dynamax_llm.exits.state import State

#: Sizes of the blocks here: grouped heads, and a window shorter than most texts.
SIZES = {"block_heads": 4, "block_kv_heads": 2, "block_head_width": 6, "block_inner": 20, "block_window": 9}


def draft_config(backbone: Backbone, block: str = "transformer", vocabulary: int = 0, **options) -> ExitConfig:
    """A draft with every option that follows from the backbone filled in."""
    options = {"head": None, "readout": "draft", "block": block, "vocabulary": vocabulary, **SIZES, **options}
    return DraftReadout.fitted(ExitConfig.from_options((), backbone.n_layers, **options), backbone)


def draft_weights(config: ExitConfig, backbone: Backbone, seed: int = 0) -> DraftWeights:
    """Random weights, and random tokens to speak."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = DraftReadout.new_weights(config, backbone.width)
        with torch.no_grad():
            for parameter in weights.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        if weights.tokens is not None:
            weights.tokens = torch.randperm(backbone.vocab_size)[: len(weights.tokens)].sort().values
    return weights.requires_grad_(False)


def draft_exits(backbone: Backbone, block: str = "transformer", vocabulary: int = 0, seed: int = 0, **options) -> Exits:
    """Exits of a draft with random weights, for a confidence measure."""
    config = draft_config(backbone, block, vocabulary, **options)
    return Exits.of(backbone, config, None, draft_weights(config, backbone, seed))


def same_state(found: State, expected: State, tolerance: float) -> None:
    """States that later tokens cannot tell apart: of attention, slots without a token may hold anything."""
    assert len(found) == len(expected)
    masks = [part for part in expected if part.dtype == torch.bool]
    for part, other in zip(found, expected, strict=True):
        if not part.is_floating_point():
            assert torch.equal(part, other)
            continue
        if masks and part.shape[:2] == masks[0].shape:
            seen = masks[0].unflatten(-1, (-1, 1, 1))
            part, other = part * seen, other * seen
        assert part.shape == other.shape and part.dtype == other.dtype
        scale = max(1.0, float(other.float().abs().max()))
        assert float((part.float() - other.float()).abs().max()) < tolerance * scale


@contextmanager
def ended_rows_known() -> Iterator[None]:
    """Within it, decoders tell scripted drafts which rows have ended as each window begins."""
    original = Decoder.step

    def step(self, ids, thresholds, idle=None):
        if not self.drafted and isinstance(self.plan.readout, ScriptedDraft):
            readout = self.plan.readout
            readout.ended = [False] * len(readout.texts) if idle is None else idle.tolist()
        return original(self, ids, thresholds, idle)

    Decoder.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        Decoder.step = original  # type: ignore[method-assign]


class ScriptedDraft(DraftReadout):
    """A draft whose proposals follow known texts and a script of lies; its state is the real one.

    ``texts``: of every row its own tokens, pads left out, up to its end. At place p of a row it proposes the text's
    next token, or another where ``lies[row][p]``, with a probability that ``sureness[row][p]`` decides. Every state is
    compared with that of one ``observe`` over the text so far; ``seen`` counts what windows were like.
    """

    def __init__(self, backbone: Backbone, exits: Exits, texts: Sequence[Sequence[int]], window: int) -> None:
        super().__init__(backbone, exits.config, exits.readout_weights)
        self.texts, self.window, self.seen = [list(text) for text in texts], window, Counter[str]()
        self.lies = [[False] * len(text) for text in texts]
        self.sureness = [[9.0] * len(text) for text in texts]
        self._read = [self._whole(text) for text in self.texts]
        self._place = torch.zeros(len(texts), dtype=torch.int64)
        self.ended = [False] * len(texts)  # before the present window: such rows read on beyond their text

    def script(self, rng: random.Random, honest: float) -> None:
        """Lies and sureness at random: a share ``honest`` of the proposals is the text's."""
        self.lies = [[rng.random() >= honest for _ in text] for text in self.texts]
        self.sureness = [[rng.choice((3.0, 5.0, 9.0, 9.0)) for _ in text] for text in self.texts]

    def _whole(self, text: Sequence[int]) -> dict[int, Tensor]:
        """The embeddings and the tapped h of a whole text, from one pass of the backbone."""
        wanted = (0, *self.taps)
        with torch.no_grad():
            return {depth: h for depth, h in self.backbone.hidden_states(torch.tensor([text])) if depth in wanted}

    def initial_state(self, batch: int, device="cpu") -> list[State]:
        return [(*super().initial_state(batch, device)[0], torch.zeros(batch, dtype=torch.int64))]

    def transform(self, exit: int, h: Tensor, state: State | None = None, padding: Tensor | None = None):
        *own, count = state
        moved, after = super().transform(exit, h, tuple(own), padding)
        self._place = count
        return moved, (*after, count + 1)

    def scores(self, exit: int, moved: Tensor) -> Tensor:
        spoken = list(range(self.backbone.vocab_size)) if self.vocabulary is None else self.vocabulary.tolist()
        scores = torch.arange(len(spoken)).mul(-0.01).expand(len(moved), 1, -1).clone()
        for row, place in enumerate(self._place.tolist()):
            text = self.texts[row]
            token = text[place + 1] if place + 1 < len(text) else 1
            if place < len(text) and self.lies[row][place]:
                token = (token + 7) % self.backbone.vocab_size
            column = spoken.index(token) if token in spoken else 0
            scores[row, 0, column] = self.sureness[row][place] if place < len(text) else 3.0
        return scores

    def observe(self, embedded, tapped, states, padding=None, counts=None) -> list[State]:
        *own, count = states[0]
        (after,) = super().observe(embedded, tapped, [tuple(own)], padding, counts)
        if counts is not None:
            added = counts
        else:
            added = torch.full_like(count, embedded.shape[1]) if padding is None else padding.sum(1)
        for row, length in enumerate((count + added).tolist()):
            if length < len(self.texts[row]) and not (self.ended[row] and int(count[row])):
                self._check(row, length, after)
                if int(count[row]):
                    self._note(embedded.shape[1], int(added[row]))
        return [(*after, count + added)]

    def _check(self, row: int, length: int, state: State) -> None:
        """The state of one row is that of one pass over its first ``length`` tokens."""
        read = {depth: h[:, :length] for depth, h in self._read[row].items()}
        start = super().initial_state(1)
        (expected,) = super().observe(read[0], [read[tap] for tap in self.taps], start)
        same_state(tuple(part[[row]] for part in state), expected, 5e-4)
        self.seen["states"] += 1

    def _note(self, width: int, kept: int) -> None:
        self.seen["rounds without a draft"] += width == 1
        self.seen["full windows"] += width == self.window > 1
        self.seen["long chains"] += kept >= 6
        self.seen["early rejections"] += kept <= 2 < width
