"""Before any training: is early exit worth it on this model and text?

One frozen full-depth pass (``looked``), then arithmetic: what an oracle, the margin rule and a small fitted estimator
(``foresight``) would do at the exits, and what that would save. Nothing is trained but a logistic regression. In that
pass states are intact, as under ``defer``. Under ``propagate`` later tokens read approximate states, and the same
agreement costs more depth: on a part of the text the margin rule is decoded so, and how much of its saving is left is
taken to hold for a trained head too.

Shapes: E exits, L layers, N tokens scanned.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.state import POLICIES, StatePolicy
from dynamax_llm.decoding.trace import TokenCosts
from dynamax_llm.errors import DataError
from dynamax_llm.evaluation.common.provenance import backbone_facts, run_facts
from dynamax_llm.evaluation.compare.heads import HeadComparison, HeadSetting
from dynamax_llm.evaluation.harness.results import Interval
from dynamax_llm.evaluation.scan.collect import Chunk, ScanSettings, Seen, gather, packed, read
from dynamax_llm.evaluation.scan.document import (
    VERDICT_AT,
    BreakEven,
    Check,
    Data,
    Drift,
    Layer,
    Oracle,
    Point,
    Reach,
    Scan,
    judged,
)
from dynamax_llm.evaluation.scan.estimator import FOLDS, cross_fitted
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import DEFAULT_EXITS, ExitConfig, place_exits
from dynamax_llm.exits.features import ConfidenceEstimator, ExitFeatures, measure
from dynamax_llm.exits.heads import ExitHeads
from dynamax_llm.exits.readout import Readout
from dynamax_llm.text.batches import pad
from dynamax_llm.text.sources import Source
from dynamax_llm.traces.curves import sweep

#: Agreements at which estimators are placed.
TARGETS = (0.95, 0.98, 0.99)
MARGIN = "softmax_margin"
#: Tokens decoded under propagate, several times over: enough for a ratio.
DISTURBED_TOKENS = 5_000


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

    ``name`` and ``command`` are noted in the document. Raises ExitPlacementError, UsageError, DataError for text that
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
    seen = read(backbone, readout, chunks, settings)
    facts = backbone_facts(name or str(backbone.config.name_or_path or backbone.model_type), backbone)
    return _Scanned(backbone, readout, seen).document(
        _disturbed(backbone, config, chunks, settings),
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


def _disturbed(
    backbone: Backbone, config: ExitConfig, chunks: Sequence[Chunk], settings: ScanSettings
) -> tuple[float, int]:
    """The margin rule's mean depth at VERDICT_AT when decoded under ``propagate``, and how many documents were."""
    held, documents = 0, 0
    for chunk in chunks:
        if held >= DISTURBED_TOKENS and chunk.document >= documents:
            break
        held, documents = held + len(chunk.ids), max(documents, chunk.document + 1)
    part = [chunk for chunk in chunks if chunk.document < documents]
    batches = [pad([chunk.ids for chunk in group]) for group in packed(part, settings.batch_tokens)]
    plain = Exits.of(backbone, dataclasses.replace(config, head=None))
    comparison = HeadComparison(backbone, batches, prompt_length=1)
    found = comparison.evaluate(HeadSetting(MARGIN, plain, MARGIN), target=VERDICT_AT, intact=False)
    return found.propagate.at(VERDICT_AT).value, documents


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

    def document(self, decoded: tuple[float, int], **facts: Any) -> Scan:
        """The whole document; ``decoded`` is what ``_disturbed`` gave, ``facts`` what is known without looking."""
        seen = self.seen
        margin = measure(MARGIN).confidence(0, seen.features, ExitFeatures(seen.features, None), None)[0]
        points = self._points(MARGIN, margin)
        estimator = cross_fitted(seen.features, self.labels, seen.group)
        fitted = self._points("fitted", estimator)
        predicted = tuple(min(pair, key=lambda point: point.depth.value) for pair in zip(fitted, points, strict=True))
        reaches = self._reaches(points, predicted)
        central = predicted[TARGETS.index(VERDICT_AT)]
        best = margin if central.rule == MARGIN else estimator
        disturbed = self._disturbed(decoded, margin, best, central)
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
            disturbed=disturbed,
            verdict=judged(central.depth.value, oracle.exits.value, disturbed),
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
        estimator: ConfidenceEstimator,
    ) -> Reach:
        """``left`` tokens by place. Under an exact state every layer runs for every token sooner or later."""
        by_exit = self._by_exit(policy, places, estimator)
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

    def _by_exit(self, policy: StatePolicy, places: tuple[int, ...], estimator: ConfidenceEstimator) -> tuple[int, ...]:
        costs = TokenCosts.of(self.costs, places, len(places), estimator, policy, self.readout)
        whole = self.costs.depth(self.n_layers)
        return tuple(whole + check for check in costs.checks) if policy.exact_state else costs.by_exit

    def _break_even(self, policy: StatePolicy, point: Point) -> BreakEven:
        by_exit, tokens = self._by_exit(policy, self.places, _FREE), sum(point.left)
        spent = sum(count * cost for count, cost in zip(point.left, by_exit, strict=True)) / tokens
        macs = max(self.costs.total - spent, 0.0) / point.checks
        return BreakEven(policy=policy.name, macs=macs, of_layer=macs / self._layer)

    def _check(self, index: int, place: int) -> Check:
        macs = self.readout.read_macs(index) + self.head.macs(index)
        return Check(depth=place, macs=macs, of_layer=macs / self._layer)

    def _disturbed(self, decoded: tuple[float, int], margin: Tensor, best: Tensor, point: Point) -> Drift:
        """What ``propagate`` leaves of the margin rule's saving, and of the predicted one if the share is the same.

        ``best`` are the confidences (E, N) of the rule that predicts ``point``.
        """
        depth, documents = decoded
        part = self.seen.group < documents
        intact = sweep(margin[:, part], self.labels[:, part], self.places, self.n_layers).depth_at(VERDICT_AT)[0]
        intact /= self.n_layers
        kept = min(max((1.0 - depth) / (1.0 - intact), 0.0), 1.0) if intact < 1.0 else 1.0
        expected = 1.0 - kept * (1.0 - point.depth.value)
        curve = sweep(best, self.labels, self.places, self.n_layers)
        index = int((curve.depth - expected * self.n_layers).abs().argmin())
        left = torch.bincount(self._first(best.double() >= curve.thresholds[index]), minlength=len(self.places) + 1)
        reach = self._reach(POLICIES["propagate"], "predicted", None, self.places, left.tolist(), self.head)
        return Drift(
            tokens=int(part.sum()),
            margin_intact=intact,
            margin=depth,
            kept=kept,
            predicted=expected,
            counted_reduction=reach.counted_reduction,
        )

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


#: An estimator that knows without looking: what is counted with it are layers, states and the token's own readout.
_FREE = measure("state_similarity")
