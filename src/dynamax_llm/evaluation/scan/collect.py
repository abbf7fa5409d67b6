"""The one pass of a scan: text of many documents, every layer read out, what estimators would read kept.

Logits exist for one slice of one layer at a time, and of h only the current layer, so memory depends on the batch; a
bit per token and layer and 40 bytes per token and exit are kept.

Shapes: B rows, T tokens, E exits, L layers, N tokens scanned, n real tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.errors import BackboneError
from dynamax_llm.evaluation.common.bootstrap import weighted
from dynamax_llm.evaluation.common.documents import Interval
from dynamax_llm.evaluation.scan.settings import ScanSettings
from dynamax_llm.exits.features import ExitFeatures
from dynamax_llm.exits.readouts.base import Readout
from dynamax_llm.progress import TokenBar
from dynamax_llm.text.batches import SHORTEST, Batch, Split, pad
from dynamax_llm.text.sources import Source
from dynamax_llm.traces.labels import argmax

#: No document gives more than this share of the tokens while there are others: one book is not a sample of text.
LARGEST_SHARE = 1 / 20


#: Of the progress bar.
TITLE = "scanning"


@dataclass(frozen=True)
class Chunk:
    """A run of tokens of one document."""

    document: int
    ids: list[int]


@dataclass(frozen=True)
class ScannedTokens:
    """What the pass gave for N tokens, on the CPU."""

    agrees: Tensor  # (L - 1, N) bool: the layer's own argmax is the full model's
    features: Tensor  # (E, N, F) float32
    group: Tensor  # (N,) int64

    def mean(self, values: Tensor) -> Interval:
        """Mean of values (N,) over tokens, its interval over groups."""
        sums = torch.zeros(int(self.group.max()) + 1, dtype=torch.float64)
        counts = sums.clone().index_add_(0, self.group, torch.ones(len(self.group), dtype=torch.float64))
        return weighted(sums.index_add_(0, self.group, values.double()).tolist(), counts.tolist())


def gather(source: Source, tokenizer: Any, settings: ScanSettings, sequence: int) -> list[Chunk]:
    """Chunks of at most ``sequence`` tokens, ``settings.tokens`` in all or what there is, of many documents if it can.

    What a long document has beyond its share is used only if the text ends early.
    """
    split = Split(source, tokenizer, True, settings.held_out, sequence, settings.batch_tokens, settings.seed)
    fair = max(sequence, int(settings.tokens * LARGEST_SHARE))
    taken: list[Chunk] = []
    spare: list[Chunk] = []
    taken_tokens = spare_tokens = 0
    for index, text in enumerate(split.documents(epoch=0)):
        ids = tokenizer(text, verbose=False)["input_ids"]
        for start in range(0, min(len(ids), settings.tokens), sequence):
            chunk = Chunk(index, ids[start : start + sequence])
            if len(chunk.ids) < SHORTEST:
                continue
            if start + len(chunk.ids) <= fair:
                taken.append(chunk)
                taken_tokens += len(chunk.ids)
            elif spare_tokens < settings.tokens:
                spare.append(chunk)
                spare_tokens += len(chunk.ids)
        if taken_tokens >= settings.tokens:
            break
    while spare and taken_tokens < settings.tokens:
        taken.append(spare.pop(0))
        taken_tokens += len(taken[-1].ids)
    order = {document: place for place, document in enumerate(dict.fromkeys(chunk.document for chunk in taken))}
    return [Chunk(order[chunk.document], chunk.ids) for chunk in taken]


@torch.no_grad()
def read(backbone: Backbone, readout: Readout, chunks: Sequence[Chunk], settings: ScanSettings) -> ScannedTokens:
    """Run the chunks through every layer and read each layer out."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    done = 0
    with TokenBar(sum(len(chunk.ids) for chunk in chunks), 0, settings.quiet, title=TITLE) as bar:
        for part in packed(chunks, settings.batch_tokens):
            batch = pad([chunk.ids for chunk in part])
            tokens, features = _read_layers(backbone, readout, batch)
            group = torch.tensor([chunk.document for chunk in part])
            parts.append((tokens[:-1] == tokens[-1], features, group[:, None].expand(batch.mask.shape)[batch.mask]))
            done += tokens.shape[1]
            bar.show(done, lambda: (TITLE, ""))
    agrees, features, groups = zip(*parts, strict=True)
    return ScannedTokens(torch.cat(agrees, dim=1), torch.cat(features, dim=1), torch.cat(groups))


def _read_layers(backbone: Backbone, readout: Readout, batch: Batch) -> tuple[Tensor, Tensor]:
    """Argmax (L, n) after every layer, and statistics (E, n, F) at the exits, of the n tokens of a batch."""
    tokens: list[Tensor] = []
    statistics: list[Tensor] = []
    features: ExitFeatures | None = None
    states = backbone.hidden_states(batch.ids)
    _, before = next(states)
    for depth, h in states:
        mask = batch.mask.to(h.device)
        if depth in readout.config.layers:
            packed_h, packed_before = (part[mask].unsqueeze(0) for part in (h, before.to(h.device)))
            exit = readout.config.layers.index(depth)
            features, argmaxes = readout.features(exit, packed_h, packed_before, features)
            statistics.append(features.values[0].cpu())
            tokens.append(argmaxes[0].cpu())
        else:
            tokens.append(argmax(backbone, h[mask]).cpu())
        before = h
    stacked = torch.stack(statistics)
    if not bool(stacked.isfinite().all()):
        raise BackboneError(
            f"{backbone.model_type} gives values that are not numbers in {str(backbone.dtype).removeprefix('torch.')}. "
            "Try `dtype` float32; if it still does, the weights are damaged."
        )
    return torch.stack(tokens), stacked


def packed(chunks: Sequence[Chunk], batch_tokens: int) -> list[list[Chunk]]:
    """Chunks of similar length together, no group with more cells than ``batch_tokens``."""
    groups: list[list[Chunk]] = []
    for chunk in sorted(chunks, key=lambda chunk: len(chunk.ids)):
        if not groups or (len(groups[-1]) + 1) * len(chunk.ids) > batch_tokens:
            groups.append([])
        groups[-1].append(chunk)
    return groups
