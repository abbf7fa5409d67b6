"""The one pass of a scan: text of many documents, read out at the exits, and at every layer for a part of the tokens.

A layer's readout costs as much as a fifth of a small model, so layers that are no exits are read at about
``layer_tokens`` tokens, evenly spaced. Logits exist for one slice of one layer at a time; kept are 40 bytes per token
and exit, and h at a few depths of at most FORETOLD tokens, for ``estimate``.

Shapes: B rows, T tokens, E exits, L layers, N tokens scanned, n of them in a batch, M read at every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.errors import BackboneError
from dynamax_llm.evaluation.common.bootstrap import weighted
from dynamax_llm.evaluation.common.documents import Interval
from dynamax_llm.evaluation.scan.settings import ScanSettings
from dynamax_llm.exits.features import ExitFeatures
from dynamax_llm.exits.readouts.base import Readout, tokens_at_once
from dynamax_llm.progress import TokenBar
from dynamax_llm.text.answer_source import AnswerSource
from dynamax_llm.text.batches import SHORTEST, Answered, Batch, Split, pad
from dynamax_llm.text.sources import Source
from dynamax_llm.traces.labels import argmax

#: No document gives more than this share of the tokens while there are others: one book is not a sample of text.
LARGEST_SHARE = 1 / 20
#: Blocks and a draft are estimated from about this many tokens.
FORETOLD = 5000

#: Of the progress bar.
TITLE = "scanning"


@dataclass(frozen=True)
class Chunk:
    """A run of tokens of one document; the first ``prompt`` of them are a prompt, which is read and not scanned."""

    document: int
    ids: list[int]
    prompt: int = 0

    @property
    def scanned(self) -> int:
        """How many of its tokens are scanned: all, or those before a token of the answer."""
        return len(self.ids) - self.prompt


@dataclass(frozen=True)
class Kept:
    """What ``estimate`` reads of the first tokens, on the CPU."""

    target: Tensor  # (n,) int64: the full model's token
    top: Tensor  # (n,) float32: its probability
    row: Tensor  # (n,) int64: the chunk; tokens of one chunk follow each other
    final: Tensor  # (n, d) float32: what the LM head reads
    exits: tuple[Tensor, ...]  # per block (n, d) float32: h there
    draft: Tensor  # (n, (1 + taps) d) float32: the token's embedding, and the taps' h at the token before


@dataclass(frozen=True)
class ScannedTokens:
    """What the pass gave for N tokens, on the CPU."""

    labels: Tensor  # (E, N) bool: the exit's own argmax is the full model's
    features: Tensor  # (E, N, F) float32
    group: Tensor  # (N,) int64
    agrees: Tensor  # (L - 1, M) bool: the same at every layer
    sampled: Tensor  # (M,) int64: the tokens that ``agrees`` is of
    kept: Kept

    def mean(self, values: Tensor, group: Tensor | None = None) -> Interval:
        """Mean of values over tokens (N,), or those of ``group`` (M,); its interval over groups."""
        group = self.group if group is None else group
        sums = torch.zeros(int(self.group.max()) + 1, dtype=torch.float64)
        counts = sums.clone().index_add_(0, group, torch.ones(len(group), dtype=torch.float64))
        return weighted(sums.index_add_(0, group, values.double()).tolist(), counts.tolist())


def gather(source: Source | AnswerSource, tokenizer: Any, settings: ScanSettings, sequence: int) -> list[Chunk]:
    """Chunks of at most ``sequence`` tokens, ``settings.tokens`` scanned in all or what there is, of many documents if
    it can. What a long document has beyond its share is used only if the text ends early.
    """
    split = Split(source, tokenizer, True, settings.held_out, sequence, settings.batch_tokens, settings.seed)
    fair = max(sequence, int(settings.tokens * LARGEST_SHARE))
    taken: list[Chunk] = []
    spare: list[Chunk] = []
    taken_tokens = spare_tokens = 0
    for index, document in enumerate(split.documents(epoch=0)):
        answered = isinstance(document, Answered)
        ids = document.ids[:sequence] if answered else tokenizer(document, verbose=False)["input_ids"]
        prompt = document.prompt if answered else 0
        for start in range(0, min(len(ids), settings.tokens + prompt), sequence):
            chunk = Chunk(index, ids[start : start + sequence], prompt)
            if chunk.scanned < SHORTEST:
                continue
            if start + len(chunk.ids) <= fair:
                taken.append(chunk)
                taken_tokens += chunk.scanned
            elif spare_tokens < settings.tokens:
                spare.append(chunk)
                spare_tokens += chunk.scanned
        if taken_tokens >= settings.tokens:
            break
    while spare and taken_tokens < settings.tokens:
        taken.append(spare.pop(0))
        taken_tokens += taken[-1].scanned
    order = {document: place for place, document in enumerate(dict.fromkeys(chunk.document for chunk in taken))}
    return [Chunk(order[chunk.document], chunk.ids, chunk.prompt) for chunk in taken]


@dataclass(frozen=True)
class Depths:
    """Where h is kept for ``estimate``: at the exits of blocks, and at the taps of a draft."""

    blocks: tuple[int, ...]
    taps: tuple[int, ...]


@torch.no_grad()
def read(
    backbone: Backbone, readout: Readout, chunks: Sequence[Chunk], settings: ScanSettings, depths: Depths
) -> ScannedTokens:
    """Run the chunks through every layer and read them out."""
    reader = _Reader(backbone, readout, depths, max(1, sum(c.scanned for c in chunks) // settings.layer_tokens))
    parts: list[list[Tensor]] = []
    done = 0
    with TokenBar(sum(chunk.scanned for chunk in chunks), 0, settings.quiet, title=TITLE) as bar:
        for part in packed(chunks, settings.batch_tokens):
            parts.append(reader.batch(part))
            done += parts[-1][1].shape[1]
            bar.show(done, lambda: (TITLE, ""))
    labels, features, agrees, group, sampled = zip(*parts, strict=True)
    starts = torch.tensor([0, *(part.shape[1] for part in labels)]).cumsum(0)[:-1]
    places = [place + start for place, start in zip(sampled, starts, strict=True)]
    return ScannedTokens(
        torch.cat(labels, 1),
        torch.cat(features, 1),
        torch.cat(group),
        torch.cat(agrees, 1),
        torch.cat(places),
        reader.kept(),
    )


def batch_of(part: Sequence[Chunk]) -> tuple[Batch, Tensor]:
    """Chunks as one batch, and which of its positions (B, T) are scanned."""
    batch = pad([chunk.ids for chunk in part])
    prompts, lengths = (
        torch.tensor(column)[:, None] for column in ([c.prompt for c in part], [len(c.ids) for c in part])
    )
    place = torch.arange(batch.ids.shape[1])
    answered = (place >= prompts - 1) & (place < lengths - 1)
    return batch, torch.where(prompts > 0, answered, batch.mask)


class _Reader:
    """Reads batches, and keeps of the first ones what ``estimate`` reads."""

    def __init__(self, backbone: Backbone, readout: Readout, depths: Depths, stride: int) -> None:
        self.backbone, self.readout, self.depths, self.stride = backbone, readout, depths, stride
        self._kept: list[list[Tensor]] = []
        self._tokens = self._rows = 0

    def batch(self, part: Sequence[Chunk]) -> list[Tensor]:
        """Labels (E, n), statistics (E, n, F), agreement of every layer (L - 1, m), groups (n,), places (m,)."""
        backbone, readout, layers = self.backbone, self.readout, self.readout.config.layers
        batch, wanted = batch_of(part)
        keep = {*self.depths.blocks, *self.depths.taps} if self._tokens < FORETOLD else set()
        mask = wanted.to(backbone.device)
        sampled = torch.arange(int(wanted.sum()))[:: self.stride]
        tokens: list[Tensor] = []
        exits: list[Tensor] = []
        statistics: list[Tensor] = []
        states: dict[int, Tensor] = {}
        features: ExitFeatures | None = None
        run = backbone.hidden_states(batch.ids)
        _, embedded = next(run)
        before = last = embedded
        for depth, last in run:
            if depth in keep:
                states[depth] = last
            if depth in layers:
                packed_h, packed_before = (each[mask].unsqueeze(0) for each in (last, before.to(last.device)))
                exit = layers.index(depth)
                features, argmaxes = readout.features(exit, packed_h, packed_before, features)
                statistics.append(features.values[0].cpu())
                exits.append(argmaxes[0].cpu())
                tokens.append(exits[-1][sampled])
            elif depth < backbone.n_layers:
                tokens.append(argmax(backbone, last[mask][sampled.to(last.device)]).cpu())
            before = last
        stacked = torch.stack(statistics)
        if not bool(stacked.isfinite().all()):
            raise BackboneError(
                f"{backbone.model_type} gives values that are not numbers in "
                f"{str(backbone.dtype).removeprefix('torch.')}. Try `dtype` float32; if it still does, the weights are "
                "damaged."
            )
        target, top = _leading(backbone, last[mask.to(last.device)])
        if keep:
            self._keep(wanted, embedded, states, last, target, top)
        groups = torch.tensor([chunk.document for chunk in part])[:, None].expand(wanted.shape)[wanted]
        return [torch.stack(exits) == target, stacked, torch.stack(tokens) == target[sampled], groups, sampled]

    def _keep(
        self, wanted: Tensor, embedded: Tensor, states: dict[int, Tensor], final: Tensor, target: Tensor, top: Tensor
    ) -> None:
        def at(h: Tensor, shift: int = 0) -> Tensor:
            h = pad_tensor(h, (0, 0, shift, 0))[:, : wanted.shape[1]]
            return h[wanted.to(h.device)].float().cpu()

        rows = self._rows + torch.arange(len(wanted))[:, None].expand(wanted.shape)[wanted]
        normed = self.backbone.final_norm(final)
        blocks = [at(states[depth]) for depth in self.depths.blocks]
        draft = torch.cat([rms(each) for each in (at(embedded), *(at(states[tap], 1) for tap in self.depths.taps))], 1)
        self._kept.append([target, top, rows, at(normed), draft, *blocks])
        self._tokens, self._rows = self._tokens + len(target), self._rows + len(wanted)

    def kept(self) -> Kept:
        """All that was kept."""
        target, top, row, final, draft, *blocks = (torch.cat(each) for each in zip(*self._kept, strict=True))
        return Kept(target, top, row, final, tuple(blocks), draft)


def rms(x: Tensor) -> Tensor:
    """x at unit root mean square along its last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def _leading(backbone: Backbone, h: Tensor) -> tuple[Tensor, Tensor]:
    """The full model's tokens (n,) and their probabilities from its last h (n, d), on the CPU."""
    found = [backbone.readout(part.unsqueeze(0))[0].softmax(-1).max(-1) for part in h.split(tokens_at_once(backbone))]
    return torch.cat([each.indices for each in found]).cpu(), torch.cat([each.values for each in found]).float().cpu()


def packed(chunks: Sequence[Chunk], batch_tokens: int) -> list[list[Chunk]]:
    """Chunks of similar length together, no group with more cells than ``batch_tokens``."""
    groups: list[list[Chunk]] = []
    for chunk in sorted(chunks, key=lambda chunk: len(chunk.ids)):
        if not groups or (len(groups[-1]) + 1) * len(chunk.ids) > batch_tokens:
            groups.append([])
        groups[-1].append(chunk)
    return groups
