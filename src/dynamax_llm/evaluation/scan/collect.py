"""The one pass of a scan: text of many documents, every layer read out, what estimators would see kept.

Logits exist for one slice of one layer at a time, and of h only the layer at work, so memory depends on the batch; what
is kept is a bit per token and layer and 40 bytes per token and exit.

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
from dynamax_llm.evaluation.harness.results import Interval
from dynamax_llm.evaluation.scan.settings import ScanSettings
from dynamax_llm.exits.features import ExitFeatures
from dynamax_llm.exits.readout import Readout
from dynamax_llm.progress import TokenBar
from dynamax_llm.text.batches import SHORTEST, Batch, Split, pad
from dynamax_llm.text.sources import Source
from dynamax_llm.traces.labels import argmax

#: No document gives more than this share of the tokens while there are others: one book is no sample of text.
LARGEST_SHARE = 1 / 20


@dataclass(frozen=True)
class Chunk:
    """A run of tokens of one document."""

    document: int
    ids: list[int]


@dataclass(frozen=True)
class Seen:
    """What the pass showed of N tokens, on the CPU."""

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
    held, kept = 0, 0  # tokens in either
    for index, text in enumerate(split.documents(epoch=0)):
        ids = tokenizer(text, verbose=False)["input_ids"]
        for start in range(0, min(len(ids), settings.tokens), sequence):
            chunk = Chunk(index, ids[start : start + sequence])
            if len(chunk.ids) < SHORTEST:
                continue
            if start + len(chunk.ids) <= fair:
                taken.append(chunk)
                held += len(chunk.ids)
            elif kept < settings.tokens:
                spare.append(chunk)
                kept += len(chunk.ids)
        if held >= settings.tokens:
            break
    for chunk in spare:
        if held >= settings.tokens:
            break
        taken.append(chunk)
        held += len(chunk.ids)
    order = {document: place for place, document in enumerate(dict.fromkeys(chunk.document for chunk in taken))}
    return [Chunk(order[chunk.document], chunk.ids) for chunk in taken]


@torch.no_grad()
def read(backbone: Backbone, readout: Readout, chunks: Sequence[Chunk], settings: ScanSettings) -> Seen:
    """Run the chunks through every layer and read each layer out. Logits exist for one slice of one layer at a time."""
    places = readout.config.layers
    agrees: list[Tensor] = []
    features: list[Tensor] = []
    groups: list[Tensor] = []
    total = sum(len(chunk.ids) for chunk in chunks)
    with TokenBar(total, 0, settings.quiet) as bar:
        for part in packed(chunks, settings.batch_tokens):
            batch = pad([chunk.ids for chunk in part])
            said, statistics = _read_layers(backbone, readout, places, batch)
            agrees.append(said[:-1] == said[-1])
            features.append(statistics)
            group = torch.tensor([chunk.document for chunk in part])
            groups.append(group[:, None].expand(batch.mask.shape)[batch.mask])
            bar.show(sum(map(len, groups)), lambda: ("scanning", ""))
    return Seen(torch.cat(agrees, dim=1), torch.cat(features, dim=1), torch.cat(groups))


def _read_layers(backbone: Backbone, readout: Readout, places: tuple[int, ...], batch: Batch) -> tuple[Tensor, Tensor]:
    """Argmax (L, n) after every layer, and statistics (E, n, F) at the exits, of the n tokens of a batch."""
    h = backbone.embed(batch.ids.to(backbone.device))
    ctx = backbone.context(h)
    said, statistics = [], []
    seen: ExitFeatures | None = None
    for index in range(backbone.n_layers):
        before, h = h, backbone.layer(index, h, None, ctx)
        mask = batch.mask.to(h.device)
        if index + 1 in places:
            packed, packed_before = (part[mask].unsqueeze(0) for part in (h, before.to(h.device)))
            seen, tokens = readout.features(places.index(index + 1), packed, packed_before, seen)
            statistics.append(seen.values[0].cpu())
            said.append(tokens[0].cpu())
        else:
            said.append(argmax(backbone, h[mask]).cpu())
    found = torch.stack(statistics)
    if not bool(found.isfinite().all()):
        raise BackboneError(
            f"{backbone.model_type} gives values that are no numbers in {str(backbone.dtype).removeprefix('torch.')}. "
            "Try `dtype` float32; if it still does, the weights are damaged."
        )
    return torch.stack(said), found


def packed(chunks: Sequence[Chunk], batch_tokens: int) -> list[list[Chunk]]:
    """Chunks of similar length together, no group with more cells than ``batch_tokens``."""
    groups: list[list[Chunk]] = []
    for chunk in sorted(chunks, key=lambda chunk: len(chunk.ids)):
        if not groups or (len(groups[-1]) + 1) * len(chunk.ids) > batch_tokens:
            groups.append([])
        groups[-1].append(chunk)
    return groups
