"""Before any training: is early exit worth it on this model and text?

One frozen full-depth pass (``collect``), then arithmetic: what an oracle, the margin rule and a small fitted estimator
(``estimator``) would do at the exits, and what that would save; and what trained blocks and a trained draft would do
(``estimate``), the draft at costs timed here (``costs``). Nothing is trained but regressions. In that pass states are
intact, as under ``defer``. Under ``propagate`` later tokens read approximate states, and the same agreement costs more
depth: on a part of the text the margin rule is decoded so, and the share of its saving that is left is taken to hold
for a trained head too.

Shapes: E exits, L layers, N tokens scanned.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.trace import TokenCosts
from dynamax_llm.engines.plan import POLICIES, ExitPlan, StatePolicy
from dynamax_llm.errors import DataError
from dynamax_llm.evaluation.common import FREE_MEASURE
from dynamax_llm.evaluation.common.documents import Interval
from dynamax_llm.evaluation.common.provenance import backbone_facts, run_facts
from dynamax_llm.evaluation.compare.heads import HeadComparison, HeadSetting
from dynamax_llm.evaluation.scan.collect import Chunk, Depths, ScannedTokens, gather, packed, read
from dynamax_llm.evaluation.scan.costs import draft_taps
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
    verdict,
)
from dynamax_llm.evaluation.scan.estimator import FOLDS, cross_fitted
from dynamax_llm.evaluation.scan.modes import block_layers, modes_of
from dynamax_llm.evaluation.scan.settings import ScanSettings
from dynamax_llm.evaluation.scan.text import text_to_scan
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.confidence.measures import measure
from dynamax_llm.exits.config import DEFAULT_EXITS, ExitConfig, place_exits
from dynamax_llm.exits.features import ExitFeatures
from dynamax_llm.exits.readouts.base import Readout, build_readout
from dynamax_llm.text.batches import pad
from dynamax_llm.text.sources import Source
from dynamax_llm.traces.curves import sweep

#: Agreements at which estimators are placed.
TARGETS = (0.95, 0.98, 0.99)
MARGIN = "softmax_margin"
#: Tokens decoded under propagate, seven times over: enough for a ratio, and a third of the time of a scan.
DRIFT_TOKENS = 500
#: An estimator without cost: what is counted with it are layers, states and the token's own readout.
_FREE = measure(FREE_MEASURE)


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
    """Whether exits are worth training on this backbone and text; see the module and ``document.Scan``.

    ``name`` and ``command`` are noted in the document. Raises ExitPlacementError, UsageError, DataError for text that
    cannot be read or is too little, BackboneError for a model whose values are not finite.
    """
    settings, started = settings or ScanSettings(), time.monotonic()
    config = ExitConfig(place_exits(exits, backbone.n_layers), backbone.n_layers, candidates=settings.candidates)
    readout = build_readout(backbone, config)
    text, prompts = text_to_scan(backbone, tokenizer, source, settings)
    sequence = settings.sequence if settings.answers is None else max(settings.sequence, settings.max_new_tokens + 256)
    chunks = gather(text, tokenizer, settings, min(sequence, backbone.max_positions() or sequence))
    documents = len({chunk.document for chunk in chunks})
    if documents < FOLDS:  # too few to stand apart: their chunks do
        chunks = [replace(chunk, document=index) for index, chunk in enumerate(chunks)]
    if len(chunks) < 2:
        raise DataError(
            f"data {source.spec!r} has {sum(chunk.scanned for chunk in chunks)} tokens in {documents} documents: too "
            "little to estimate from. Give at least two documents, and better some thousand tokens."
        )
    taps = draft_taps(backbone)
    scanned = read(backbone, readout, chunks, settings, Depths(block_layers(backbone.n_layers), taps))
    data = Data(
        source=source.spec,
        documents=documents,
        prompts=prompts,
        tokens=scanned.labels.shape[1],
        groups=len({chunk.document for chunk in chunks}),
        grouped_by="chunk" if documents < FOLDS else "document",
    )
    decoded = _margin_under_propagate(backbone, config, chunks, settings)
    return _Analysis(backbone, readout, scanned).document(
        decoded,
        backbone=backbone_facts(name or str(backbone.config.name_or_path or backbone.model_type), backbone),
        data=data,
        modes=modes_of(backbone, scanned.kept, TARGETS),
        run=run_facts(command, time.monotonic() - started),
    )


def _margin_under_propagate(
    backbone: Backbone, config: ExitConfig, chunks: Sequence[Chunk], settings: ScanSettings
) -> tuple[float, float, int]:
    """The margin rule's mean depth at VERDICT_AT with states intact and decoded under ``propagate``, and the number of
    tokens of these, prompts included."""
    tokens = documents = 0
    for chunk in chunks:
        if tokens >= DRIFT_TOKENS and chunk.document >= documents:
            break
        tokens, documents = tokens + len(chunk.ids), max(documents, chunk.document + 1)
    part = [chunk for chunk in chunks if chunk.document < documents]
    batches = [pad([chunk.ids for chunk in group]) for group in packed(part, settings.batch_tokens)]
    plain = Exits.of(backbone, replace(config, head=None))
    comparison = HeadComparison(backbone, batches, prompt_length=1)
    found = comparison.evaluate(HeadSetting(MARGIN, plain, MARGIN), target=VERDICT_AT)
    assert found.intact is not None
    return found.intact.at(VERDICT_AT).value, found.propagate.at(VERDICT_AT).value, tokens


def _first(leaves: Tensor) -> Tensor:
    """Where each token leaves first: the index (N,) of the first True of leaves (E, N), E if there is none."""
    return torch.cat((leaves, torch.ones(1, leaves.shape[1], dtype=torch.bool))).int().argmax(0)


class _Analysis:
    """What the tokens of a scan imply."""

    def __init__(self, backbone: Backbone, readout: Readout, scanned: ScannedTokens) -> None:
        self.scanned, self.readout, self.costs = scanned, readout, backbone.costs()
        self.places, self.n_layers = readout.config.layers, backbone.n_layers
        self.layer_macs = self.costs.depth(self.n_layers) / self.n_layers
        self.labels = scanned.labels  # (E, N)
        self.policies = [
            policy
            for policy in POLICIES.values()
            if not policy.exact_output and set(backbone.kinds) <= set(policy.kinds)
        ]
        with torch.device("meta"):  # only its costs are used
            self.head = ExitHeads(readout.config, backbone.width)

    def document(self, decoded: tuple[float, float, int], **facts: Any) -> Scan:
        """The whole document; ``decoded`` is ``_margin_under_propagate``'s, ``facts`` the parts known before."""
        features, agrees = self.scanned.features, self.scanned.agrees
        group = self.scanned.group[self.scanned.sampled]
        margin = measure(MARGIN).confidence(0, features, ExitFeatures(features, None), None)[0]
        fitted = cross_fitted(features, self.labels, self.scanned.group)
        margin_points, fitted_points = self._points(MARGIN, margin), self._points("fitted", fitted)
        predicted = tuple(
            min(pair, key=lambda point: point.depth.value) for pair in zip(fitted_points, margin_points, strict=True)
        )
        central = predicted[TARGETS.index(VERDICT_AT)]
        drift = self._drift(decoded, margin if central.rule == MARGIN else fitted, central)
        oracle = Oracle(
            every_layer=self._depth(_first(agrees), tuple(range(1, self.n_layers)), group),
            exits=self._depth(_first(self.labels), self.places),
        )
        settled = agrees.cummax(0).values
        layers = enumerate(zip(agrees, settled, strict=True), start=1)

        def mean(values: Tensor) -> Interval:
            return self.scanned.mean(values, group)

        return Scan(
            exits=self.places,
            candidates=self.readout.config.candidates,
            layers=tuple(Layer(depth=at, agreement=mean(own), settled=mean(any_)) for at, (own, any_) in layers),
            oracle=oracle,
            points=(*margin_points, *fitted_points),
            predicted=predicted,
            reaches=self._reaches(margin_points, predicted),
            break_even=tuple(self._break_even(policy, central) for policy in self.policies if not policy.exact_state),
            checks=tuple(self._check(index, place) for index, place in enumerate(self.places)),
            disturbed=drift,
            verdict=verdict(central.depth.value, oracle.exits.value, drift),
            **facts,
        )

    def _points(self, rule: str, confidence: Tensor) -> tuple[Point, ...]:
        """Where this rule's confidences (E, N) reach each target."""
        curve = sweep(confidence, self.labels, self.places, self.n_layers)
        right = torch.cat((self.labels, torch.ones(1, self.labels.shape[1], dtype=torch.bool)))
        points = []
        for target in TARGETS:
            threshold = curve.depth_at(target)[1]
            left = _first(confidence.double() >= threshold)
            points.append(
                Point(
                    rule=rule,
                    target=target,
                    threshold=None if threshold == float("inf") else threshold,
                    depth=self._depth(left, self.places),
                    agreement=self.scanned.mean(right.gather(0, left[None])[0]),
                    left=self._counts(left, self.places),
                    checks=float((left + 1).clamp(max=len(self.places)).double().mean()),
                )
            )
        return tuple(points)

    def _reaches(self, margin: Sequence[Point], predicted: Sequence[Point]) -> tuple[Reach, ...]:
        layers = tuple(range(1, self.n_layers))
        rules: list[tuple[str, float | None, tuple[int, ...], Sequence[int], ConfidenceEstimator]] = [
            ("oracle at every layer", None, layers, self._counts(_first(self.scanned.agrees), layers), _FREE),
            ("oracle", None, self.places, self._counts(_first(self.labels), self.places), _FREE),
            *((MARGIN, point.target, self.places, point.left, measure(MARGIN)) for point in margin),
            *(("predicted", point.target, self.places, point.left, self.head) for point in predicted),
        ]
        return tuple(self._reach(policy, *rule) for policy in self.policies for rule in rules)

    def _reach(
        self,
        policy: StatePolicy,
        rule: str,
        target: float | None,
        places: tuple[int, ...],
        left: Sequence[int],
        estimator: ConfidenceEstimator,
    ) -> Reach:
        """``left``: tokens by place, full depth last."""
        by_exit = self._by_exit(policy, places, estimator)
        shares = [count / sum(left) for count in left]
        depth = sum(share * place for share, place in zip(shares, (*places, self.n_layers), strict=True))
        return Reach(
            policy=policy.name,
            rule=rule,
            target=target,
            counted_reduction=1.0 - sum(s * cost for s, cost in zip(shares, by_exit, strict=True)) / self.costs.total,
            pass_reduction=1.0 - depth / self.n_layers,
        )

    def _by_exit(self, policy: StatePolicy, places: tuple[int, ...], estimator: ConfidenceEstimator) -> tuple[int, ...]:
        """Multiply-accumulates of a token by exit. Under an exact state every layer runs sooner or later."""
        costs = TokenCosts.of(self.costs, ExitPlan(places, estimator, self.readout, policy))
        whole = self.costs.depth(self.n_layers)
        return tuple(whole + check for check in costs.checks) if policy.exact_state else costs.by_exit

    def _break_even(self, policy: StatePolicy, point: Point) -> BreakEven:
        by_exit, tokens = self._by_exit(policy, self.places, _FREE), sum(point.left)
        mean_macs = sum(count * cost for count, cost in zip(point.left, by_exit, strict=True)) / tokens
        macs = max(self.costs.total - mean_macs, 0.0) / point.checks
        return BreakEven(policy=policy.name, macs=macs, of_layer=macs / self.layer_macs)

    def _check(self, index: int, place: int) -> Check:
        macs = self.readout.read_macs(index) + self.head.macs(index)
        return Check(depth=place, macs=macs, of_layer=macs / self.layer_macs)

    def _drift(self, decoded: tuple[float, float, int], best: Tensor, point: Point) -> Drift:
        """What ``propagate`` leaves of the margin rule's saving, and of the predicted one if the share is the same.

        ``best`` are the confidences (E, N) of the rule that predicts ``point``.
        """
        intact, depth, tokens = decoded
        kept = min(max((1.0 - depth) / (1.0 - intact), 0.0), 1.0) if intact < 1.0 else 1.0
        expected = 1.0 - kept * (1.0 - point.depth.value)
        curve = sweep(best, self.labels, self.places, self.n_layers)
        threshold = curve.thresholds[int((curve.depth - expected * self.n_layers).abs().argmin())]
        left = self._counts(_first(best.double() >= threshold), self.places)
        reach = self._reach(POLICIES["propagate"], "predicted", None, self.places, left, self.head)
        return Drift(
            tokens=tokens,
            margin_intact=intact,
            margin=depth,
            kept=kept,
            predicted=expected,
            counted_reduction=reach.counted_reduction,
        )

    def _depth(self, left: Tensor, places: tuple[int, ...], group: Tensor | None = None) -> Interval:
        """Mean depth, as a share, of tokens (N,), or those of ``group`` (M,), that left at place ``left``."""
        depths = torch.tensor([*places, self.n_layers], dtype=torch.float64) / self.n_layers
        return self.scanned.mean(depths[left], group)

    @staticmethod
    def _counts(left: Tensor, places: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens by place, full depth last."""
        return tuple(torch.bincount(left, minlength=len(places) + 1).tolist())
