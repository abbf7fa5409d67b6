"""Before any training: is early exit worth it on this model and text?

One frozen full-depth pass. At every layer the hidden state is read out (final norm and LM head) and its argmax
compared with the last layer's; at the exits the statistics that a judge would see are kept, 40 bytes a token and exit.
Everything else is arithmetic on those: nothing is trained but a logistic regression, nothing is decoded. States are
intact, as under ``defer``; under ``propagate``, ``copy`` and ``stale`` later tokens read approximate states, so that the
same agreement costs more depth than a scan says.

Shapes: B rows, T tokens, E exits, L layers, N tokens scanned, G groups (documents).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.state import POLICIES, StatePolicy
from dynamax_llm.decoding.trace import TokenCosts
from dynamax_llm.errors import BackboneError, DataError, UsageError
from dynamax_llm.evaluation.bootstrap import weighted
from dynamax_llm.evaluation.facts import backbone_facts, run_facts
from dynamax_llm.evaluation.foresight import FOLDS, cross_fitted
from dynamax_llm.evaluation.results import Interval
from dynamax_llm.evaluation.scanned import (
    VERDICT_AT,
    BreakEven,
    Check,
    Data,
    Layer,
    Oracle,
    Point,
    Reach,
    Scan,
    Verdict,
    judged,
)
from dynamax_llm.exits.confidence import Judge, Signals, measure
from dynamax_llm.exits.config import DEFAULT_EXITS, ExitConfig, place_exits
from dynamax_llm.exits.heads import ExitHeads
from dynamax_llm.exits.readout import Readout
from dynamax_llm.training.curves import sweep
from dynamax_llm.training.data import SHORTEST, Batch, Split, pad
from dynamax_llm.training.harvest import argmax
from dynamax_llm.training.progress import TokenBar
from dynamax_llm.training.sources import Source

#: Agreements at which judges are placed.
TARGETS = (0.95, 0.98, 0.99)
#: No document gives more than this share of the tokens while there are others: one book is no sample of text.
LARGEST_SHARE = 1 / 20
MARGIN = "softmax_margin"


@dataclass(frozen=True)
class ScanSettings:
    """How much text, and how it is cut. Raises UsageError, naming the setting, for a value out of bounds."""

    tokens: int = 20_000
    sequence: int = 512  # tokens of a chunk
    batch_tokens: int = 4096  # tokens of a pass, padding included
    candidates: int = 64  # what later exits look at, as in ExitConfig
    held_out: float = 1.0  # share of the documents read: those that training with this share holds out
    seed: int = 0
    quiet: bool = False  # no progress bar

    def __post_init__(self) -> None:
        checks = (
            ("tokens", self.tokens >= 1, "at least 1"),
            ("sequence", self.sequence >= SHORTEST, f"at least {SHORTEST} tokens"),
            ("batch_tokens", self.batch_tokens >= self.sequence, f"at least one chunk of {self.sequence} tokens"),
            ("held_out", 0 < self.held_out <= 1, "above 0 and at most 1"),
        )
        for name, fine, allowed in checks:
            if not fine:
                raise UsageError(f"scan setting {name} = {getattr(self, name)!r}: give {allowed}.")


@dataclass(frozen=True)
class Chunk:
    """A run of tokens of one document."""

    document: int
    ids: list[int]


@dataclass(frozen=True)
class Seen:
    """What the pass showed of N tokens, on the CPU."""

    agrees: Tensor  # (L - 1, N) bool: the layer's own argmax is the full model's
    signals: Tensor  # (E, N, F) float32
    group: Tensor  # (N,) int64

    def mean(self, values: Tensor) -> Interval:
        """Mean of values (N,) over tokens, its interval over groups."""
        sums = torch.zeros(int(self.group.max()) + 1, dtype=torch.float64)
        counts = sums.clone().index_add_(0, self.group, torch.ones(len(self.group), dtype=torch.float64))
        return weighted(sums.index_add_(0, self.group, values.double()).tolist(), counts.tolist())


def scan(
    backbone: Backbone,
    tokenizer: Any,
    source: Source,
    exits: str | tuple[str | int | float, ...] = DEFAULT_EXITS,
    settings: ScanSettings | None = None,
    *,
    name: str | None = None,
    command: str = "dynamax_llm.scan",
) -> Scan:
    """Whether exits are worth training on this backbone and text; see the module and ``scanned.Scan``.

    ``name`` and ``command`` are noted in the document. Raises ExitPlacement, UsageError, DataError for text that
    cannot be read or is too little, BackboneError for a model whose numbers are none.
    """
    settings, started = settings or ScanSettings(), time.monotonic()
    config = ExitConfig(place_exits(exits, backbone.n_layers), backbone.n_layers, candidates=settings.candidates)
    readout = Readout(backbone, config)
    chunks = gather(source, tokenizer, settings, min(settings.sequence, backbone.max_positions() or settings.sequence))
    documents = len({chunk.document for chunk in chunks})
    if documents < FOLDS:  # too few to stand apart: chunks stand in for them
        chunks = [Chunk(index, chunk.ids) for index, chunk in enumerate(chunks)]
    if len(chunks) < 2:
        raise DataError(
            f"data {source.spec!r} has {sum(len(chunk.ids) for chunk in chunks)} tokens in {documents} documents: too "
            "little to judge by. Give at least two documents, and better some thousand tokens."
        )
    seen = look(backbone, readout, chunks, settings)
    facts = backbone_facts(name or str(backbone.config.name_or_path or backbone.model_type), backbone)
    return _Scanned(backbone, readout, seen).document(
        backbone=facts,
        data=Data(
            source=source.spec,
            documents=documents,
            tokens=seen.agrees.shape[1],
            groups=len({chunk.document for chunk in chunks}),
            grouped_by="chunk" if documents < FOLDS else "document",
        ),
        run=run_facts(command, time.monotonic() - started),
    )


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
def look(backbone: Backbone, readout: Readout, chunks: Sequence[Chunk], settings: ScanSettings) -> Seen:
    """Run the chunks through every layer and read each layer out. Logits exist for one slice of one layer at a time."""
    places = readout.config.layers
    agrees: list[Tensor] = []
    signals: list[Tensor] = []
    groups: list[Tensor] = []
    total = sum(len(chunk.ids) for chunk in chunks)
    with TokenBar(total, 0, settings.quiet) as bar:
        for part in _packed(chunks, settings.batch_tokens):
            batch = pad([chunk.ids for chunk in part])
            said, statistics = _read_layers(backbone, readout, places, batch)
            agrees.append(said[:-1] == said[-1])
            signals.append(statistics)
            group = torch.tensor([chunk.document for chunk in part])
            groups.append(group[:, None].expand(batch.mask.shape)[batch.mask])
            bar.show(sum(map(len, groups)), "scanning", "")
    return Seen(torch.cat(agrees, dim=1), torch.cat(signals, dim=1), torch.cat(groups))


def _read_layers(backbone: Backbone, readout: Readout, places: tuple[int, ...], batch: Batch) -> tuple[Tensor, Tensor]:
    """Argmax (L, n) after every layer, and statistics (E, n, F) at the exits, of the n tokens of a batch."""
    h = backbone.embed(batch.ids.to(backbone.device))
    ctx = backbone.context(h)
    said, statistics = [], []
    seen: Signals | None = None
    for index in range(backbone.n_layers):
        before, h = h, backbone.layer(index, h, None, ctx)
        mask = batch.mask.to(h.device)
        if index + 1 in places:
            packed, packed_before = (part[mask].unsqueeze(0) for part in (h, before.to(h.device)))
            seen, tokens = readout.signals(places.index(index + 1), packed, packed_before, seen)
            statistics.append(seen.values[0].cpu())
            said.append(tokens[0].cpu())
        else:
            said.append(argmax(backbone, h[mask]).cpu())
    found = torch.stack(statistics)
    if not bool(found.isfinite().all()):
        raise BackboneError(
            f"{backbone.model_type} gives values that are no numbers in {str(backbone.dtype).removeprefix('torch.')}. "
            "Try --dtype float32; if it still does, the weights are damaged."
        )
    return torch.stack(said), found


def _packed(chunks: Sequence[Chunk], batch_tokens: int) -> list[list[Chunk]]:
    """Chunks of similar length together, no group with more cells than ``batch_tokens``."""
    groups: list[list[Chunk]] = []
    for chunk in sorted(chunks, key=lambda chunk: len(chunk.ids)):
        if not groups or (len(groups[-1]) + 1) * len(chunk.ids) > batch_tokens:
            groups.append([])
        groups[-1].append(chunk)
    return groups


class _Scanned:
    """From what was seen to what it means."""

    def __init__(self, backbone: Backbone, readout: Readout, seen: Seen) -> None:
        self.seen, self.readout, self.costs = seen, readout, backbone.costs()
        self.places, self.n_layers = readout.config.layers, backbone.n_layers
        self.labels = seen.agrees[[place - 1 for place in self.places]]  # (E, N)
        self.policies = [policy for name, policy in POLICIES.items() if not policy.exact_output]
        self.policies = [policy for policy in self.policies if set(backbone.kinds) <= set(policy.kinds)]
        with torch.device("meta"):  # only its costs are asked for
            self.head = ExitHeads(readout.config, backbone.width)

    def document(self, **facts: Any) -> Scan:
        """The whole document; ``facts`` are what is known without looking."""
        seen = self.seen
        margin = measure(MARGIN).confidence(0, seen.signals, Signals(seen.signals, None), None)[0]
        points = self._points(MARGIN, margin)
        fitted = self._points("fitted", cross_fitted(seen.signals, self.labels, seen.group))
        predicted = tuple(min(pair, key=lambda point: point.depth.value) for pair in zip(fitted, points, strict=True))
        reaches = self._reaches(points, predicted)
        central = predicted[TARGETS.index(VERDICT_AT)]
        oracle = Oracle(
            every_layer=self._depth(self._first(seen.agrees), tuple(range(1, self.n_layers))),
            exits=self._depth(self._first(self.labels), self.places),
        )
        settled = seen.agrees.cummax(0).values
        return Scan(
            exits=self.places,
            candidates=self.readout.config.candidates,
            layers=tuple(
                Layer(depth=depth, agreement=seen.mean(agrees), settled=seen.mean(known))
                for depth, (agrees, known) in enumerate(zip(seen.agrees, settled, strict=True), start=1)
            ),
            oracle=oracle,
            points=(*points, *fitted),
            predicted=predicted,
            reaches=reaches,
            break_even=tuple(self._break_even(policy, central) for policy in self.policies if not policy.exact_state),
            checks=tuple(self._check(index, place) for index, place in enumerate(self.places)),
            verdict=self._verdict(central, oracle, reaches),
            **facts,
        )

    def _points(self, rule: str, confidence: Tensor) -> tuple[Point, ...]:
        """Where this rule's confidences (E, N) reach each target."""
        curve = sweep(confidence, self.labels, self.places, self.n_layers)
        always = torch.cat((self.labels, torch.ones(1, self.labels.shape[1], dtype=torch.bool)))
        found = []
        for target in TARGETS:
            threshold = curve.depth_at(target)[1]
            left = self._first(confidence.double() >= threshold)
            found.append(
                Point(
                    rule=rule,
                    target=target,
                    threshold=None if threshold == float("inf") else threshold,
                    depth=self._depth(left, self.places),
                    agreement=self.seen.mean(always.gather(0, left[None])[0]),
                    left=tuple(torch.bincount(left, minlength=len(self.places) + 1).tolist()),
                    checks=float((left + 1).clamp(max=len(self.places)).double().mean()),
                )
            )
        return tuple(found)

    def _reaches(self, margin: Sequence[Point], predicted: Sequence[Point]) -> tuple[Reach, ...]:
        everywhere = tuple(range(1, self.n_layers))
        every = torch.bincount(self._first(self.seen.agrees), minlength=self.n_layers)
        exits = torch.bincount(self._first(self.labels), minlength=len(self.places) + 1)
        return tuple(
            reach
            for policy in self.policies
            for reach in (
                self._reach(policy, "oracle at every layer", None, everywhere, every.tolist(), _FREE),
                self._reach(policy, "oracle", None, self.places, exits.tolist(), _FREE),
                *(self._reach(policy, MARGIN, p.target, self.places, p.left, measure(MARGIN)) for p in margin),
                *(self._reach(policy, "predicted", p.target, self.places, p.left, self.head) for p in predicted),
            )
        )

    def _reach(
        self,
        policy: StatePolicy,
        rule: str,
        target: float | None,
        places: tuple[int, ...],
        left: Sequence[int],
        judge: Judge,
    ) -> Reach:
        """``left`` tokens by place. Under an exact state every layer runs for every token sooner or later."""
        by_exit = self._by_exit(policy, places, judge)
        shares = [count / sum(left) for count in left]
        saved = 1.0 - sum(share * cost for share, cost in zip(shares, by_exit, strict=True)) / self.costs.total
        depth = sum(share * place for share, place in zip(shares, (*places, self.n_layers), strict=True))
        return Reach(
            policy=policy.name,
            rule=rule,
            target=target,
            counted_reduction=saved,
            pass_reduction=1.0 - depth / self.n_layers,
        )

    def _by_exit(self, policy: StatePolicy, places: tuple[int, ...], judge: Judge) -> tuple[int, ...]:
        costs = TokenCosts.of(self.costs, places, len(places), judge, policy, self.readout)
        whole = self.costs.depth(self.n_layers)
        return tuple(whole + check for check in costs.checks) if policy.exact_state else costs.by_exit

    def _break_even(self, policy: StatePolicy, point: Point) -> BreakEven:
        by_exit, tokens = self._by_exit(policy, self.places, _FREE), sum(point.left)
        spent = sum(count * cost for count, cost in zip(point.left, by_exit, strict=True)) / tokens
        macs = max(self.costs.total - spent, 0.0) / point.checks
        return BreakEven(policy=policy.name, macs=macs, of_layer=macs / self._layer)

    def _check(self, index: int, place: int) -> Check:
        macs = self.readout.look_macs(index) + self.head.macs(index)
        return Check(depth=place, macs=macs, of_layer=macs / self._layer)

    def _verdict(self, point: Point, oracle: Oracle, reaches: Sequence[Reach]) -> Verdict:
        ours = [reach for reach in reaches if (reach.rule, reach.target) == ("predicted", point.target)]
        best = max(ours, key=lambda reach: reach.counted_reduction)
        return judged(point.depth.value, oracle.exits.value, best.counted_reduction, best.policy)

    def _depth(self, left: Tensor, places: tuple[int, ...]) -> Interval:
        """Mean depth, as a share, of tokens that left at place ``left`` (N,)."""
        depths = torch.tensor([*places, self.n_layers], dtype=torch.float64) / self.n_layers
        return self.seen.mean(depths[left])

    @property
    def _layer(self) -> float:
        return self.costs.depth(self.n_layers) / self.n_layers

    @staticmethod
    def _first(leaves: Tensor) -> Tensor:
        """Where each token leaves first: the index (N,) of the first True of leaves (E, N), E if there is none."""
        return torch.cat((leaves, torch.ones(1, leaves.shape[1], dtype=torch.bool))).int().argmax(0)


#: A judge that knows without looking: what is counted with it are layers, states and the token's own readout.
_FREE = measure("state_similarity")
