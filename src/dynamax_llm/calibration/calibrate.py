"""From a promise in words to its record: draw sequences, learn the path on some, test along it on the others.

    documents ── one sequence each, shuffled ──┬── path split: path of thresholds, and where on it to begin
                                               └── the others: tested from safe to risky until the first is refused

Where the test begins depends on the path split alone, so the order of the tests is fixed before their losses are seen.
What comes out is proved under the state policy, readout and judge in use, for sequences drawn as these were.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from dynamax_llm.backbones import Backbone
from dynamax_llm.calibration.bounds import rejected
from dynamax_llm.calibration.fit import fit_path
from dynamax_llm.calibration.path import Point
from dynamax_llm.calibration.prompts import Drawn, Item, draw, draw_questions
from dynamax_llm.calibration.proof import Proof
from dynamax_llm.calibration.risks import (
    AgreementRisk,
    Measured,
    Risk,
    TextRisk,
    check_policy,
    inconsistency,
    shortfall,
)
from dynamax_llm.calibration.settings import CalibrationSettings, PromiseSettings
from dynamax_llm.decoding.loop import EarlyExit
from dynamax_llm.decoding.state import POLICIES
from dynamax_llm.errors import PromiseError, UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.promise import METHODS, Promise, Target, digest
from dynamax_llm.text.sources import Source
from dynamax_llm.version import installed_version

#: λ of the points that are looked at: two per cent of what could be saved at all apart.
PARAMETERS = tuple(step / 50 for step in range(1, 51))
#: Tests begin where the path split could lose this many times as much and the limit would still be kept.
SPARE = 2.0


@dataclass(frozen=True)
class Request:
    """What is asked of a calibration, checked. Raises UsageError, PolicyMismatchError, PromiseError."""

    target: Target
    confidence: float | None
    method: str
    policy: str
    window: int
    measure: str | None

    @classmethod
    def of(cls, promise: str, confidence: float, method: str, policy: str, window: int, measure: str | None) -> Request:
        """``confidence`` has no meaning under "crc" and is dropped there."""
        if method not in METHODS:
            raise UsageError(f"unknown method {method!r}. Available: {', '.join(METHODS)}.")
        if not 0.0 < confidence < 1.0:
            raise UsageError(f"confidence {confidence!r}: give a share between 0 and 1, both excluded; 0.95, say.")
        POLICIES.lookup(policy)
        check_policy(policy)
        target = Target.parse(promise)
        return cls(target, None if method == "crc" else confidence, method, policy, window, measure)

    def check_count(self, count: int, settings: CalibrationSettings, given: str) -> None:
        """Raise PromiseError unless ``count`` sequences could prove this promise if none of them lost anything."""
        n, needed = count - settings.split(count), self.proof.prompts_needed()
        if needed is None or n >= needed:
            return
        sure = "in expectation (crc)" if self.confidence is None else f"with {100 * self.confidence:.4g} % confidence"
        raise PromiseError(
            f"{given}: {n} beside the {settings.split(count)} that the path is learnt on, too few to promise "
            f"{self.target.text} {sure} even if none lost anything. That takes {needed}, so at least "
            f"{settings.asked(needed)} prompts in all, and more where exits cost something. Give more, or promise less."
        )

    @property
    def proof(self) -> Proof:
        """What the losses are held against."""
        return Proof(self.method, self.target.limit, self.confidence)

    @property
    def how(self) -> dict[str, Any]:
        """EarlyExit's options."""
        return {"policy": self.policy, "window": self.window, "measure": self.measure}


@torch.no_grad()
def calibrate(
    backbone: Backbone,
    tokenizer: Any,
    exits: Exits,
    source: Source,
    promise: str,
    *,
    confidence: float = PromiseSettings.confidence,
    policy: str = PromiseSettings.policy,
    window: int = PromiseSettings.window,
    measure: str | None = None,
    method: str = PromiseSettings.method,
    settings: CalibrationSettings | None = None,
    on_test: Callable[[dict[str, Any]], None] | None = None,
) -> Promise:
    """The record of a promise that holds, with the riskiest thresholds on the path that were proved to keep it.

    ``source`` holds documents, for a risk questions with answers. ``measure`` judges instead of the trained head.
    ``method`` "ltt" promises with ``confidence`` over draws of the sequences (Learn then Test, fixed sequence, p-values
    by betting), "ltt-hb" too (p-values of Hoeffding and Bentkus, larger where losses vary little), "crc" in
    expectation only (conformal risk control). ``on_test`` is called with every test made. Nothing is saved:
    ``exits.keep(promise).save(folder)`` does that.

    Raises PromiseError if there are too few sequences to promise anything, saying how many would do, or if nothing
    keeps the promise; UsageError and PolicyMismatchError for what cannot be asked; DataError, ArtifactMismatchError.
    """
    settings = settings or CalibrationSettings()
    request = Request.of(promise, confidence, method, policy, window, measure)
    request.check_count(settings.prompts, settings, f"{settings.prompts} prompts")
    POLICIES.lookup(policy).check(backbone, exits.readout(backbone))
    exits.check_backbone(backbone)
    _check_length(backbone, settings)
    drawn = _draw(request.target, source, tokenizer, settings)
    request.check_count(len(drawn.items), settings, f"data {source.spec!r} gives {len(drawn.items)} prompts")
    items, n_path = drawn.items, settings.split(len(drawn.items))
    parts = (items[:n_path], items[n_path:])
    path_risk, risk = (_risk(request.target, backbone, tokenizer, part, settings) for part in parts)
    score = _full_score(exits, request, risk)
    path = fit_path(exits, path_risk, request.target.limit, request.how, PARAMETERS)
    evidence = _evidence(request, _tests(exits, request, path.points, path_risk, risk), on_test)
    return Promise(
        text=request.target.text,
        measure=request.target.measure,
        bound=request.target.bound,
        confidence=request.confidence,
        method=method,
        n=len(risk.items),
        n_path=n_path,
        unit="sequences",
        **_riskiest(evidence),
        policy=policy,
        window=window,
        readout=exits.config.readout,
        estimator=measure or str(exits.config.head),
        data={**_facts(source, drawn, settings, path.family), **score},
        fingerprint=digest(exits.fingerprint),
        dynamax=installed_version(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        evidence=tuple(evidence),
    )


def _evidence(
    request: Request,
    tests: Iterator[tuple[dict[str, Any], torch.Tensor]],
    on_test: Callable[[dict[str, Any]], None] | None,
) -> list[dict[str, Any]]:
    """The tests made, each given to ``on_test``. Raises PromiseError if the first of them fails."""
    evidence: list[dict[str, Any]] = []
    for test, losses in tests:
        if not (evidence or test["kept"]):
            raise _not_kept(request, test, losses)
        evidence.append(test)
        if on_test is not None:
            on_test(test)
    return evidence


def _riskiest(evidence: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the promise records of the last test that was passed."""
    best = [test for test in evidence if test["kept"]][-1]
    figures = {name: best[name] for name in ("parameter", "estimate", "p_value", "mean_depth")}
    return {**figures, "thresholds": tuple(best["thresholds"])}


def _full_score(exits: Exits, request: Request, risk: Risk) -> dict[str, float]:
    """The full model's mean score, of a risk alone. Raises PromiseError if no text could lose more than the limit."""
    target = request.target
    if not (isinstance(risk, TextRisk) and target.measure.startswith("risk:")):
        return {}
    score = risk.of_silence(EarlyExit(exits, threshold="never", **request.how))
    if score <= target.limit:
        raise PromiseError(
            f"{target.text} says nothing on these {len(risk.items)} prompts: the full model's own mean "
            f"{target.measure.removeprefix('risk:')} is {score:.4f} there, so that an empty answer would keep it. Give "
            "prompts that this model can answer, or a smaller bound. Nothing was saved."
        )
    return {"full_score": score}


def _tests(
    exits: Exits, request: Request, points: Sequence[Point], path_risk: Risk, risk: Risk
) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """The tests from safe to risky, the first that fails included, each with its losses."""
    proof = request.proof

    @functools.cache
    def safe(place: int) -> bool:
        losses = SPARE * _measure(exits, request, points[place], path_risk).losses
        return proof.keeps(np.resize(losses.clamp(max=1.0).numpy(), len(risk.items)))

    low, high = 0, len(points)  # everything below ``low`` is taken for safe, ``high`` and above for not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if safe(middle) else (low, middle)
    start = max(low - 1, 0)
    # The path split may be wrong about ``start``, and nothing counts after the first that fails: come near by halves.
    nearer = (start - (start >> halved) for halved in range(1, start.bit_length() + 1))
    order = [*dict.fromkeys((*nearer, start)), *range(start + 1, len(points))]
    worst: torch.Tensor | None = None  # per sequence, the greatest loss so far: what conformal risk control asks of

    def found() -> Iterator[tuple[tuple[Point, Measured], float]]:
        nonlocal worst
        for place in order:
            measured = _measure(exits, request, points[place], risk)
            worst = measured.losses if worst is None else torch.maximum(worst, measured.losses)
            held = worst if request.method == "crc" else measured.losses
            yield (points[place], measured), float(proof.value(held.numpy()[:, None])[0])

    for (point, measured), value, kept in rejected(found(), proof.level):
        p = None if request.method == "crc" else value
        yield {**_record(request.target, point, p, measured), "kept": kept}, measured.losses


def _measure(exits: Exits, request: Request, point: Point, risk: Risk) -> Measured:
    bars = ["never" if bar is None else bar for bar in point.thresholds]
    return risk.measure(EarlyExit(exits, threshold=bars, **request.how))


def _record(target: Target, point: Point, p: float | None, measured: Measured) -> dict[str, Any]:
    """One entry of the evidence; the estimate is what the promise names."""
    loss = float(measured.losses.mean())
    return {
        "parameter": round(point.parameter, 6),
        "thresholds": list(point.thresholds),
        "estimate": loss if target.measure.startswith("risk:") else 1.0 - loss,
        "p_value": p,
        "mean_depth": float(measured.depth.mean()),
    }


def _risk(
    target: Target, backbone: Backbone, tokenizer: Any, items: Sequence[Item], settings: CalibrationSettings
) -> Risk:
    if not target.of_texts:
        return AgreementRisk(backbone, tokenizer, items, settings.batch)
    loss = inconsistency if target.measure == "consistency" else shortfall(target.measure.removeprefix("risk:"))
    return TextRisk(backbone, tokenizer, items, settings.batch, settings.new_tokens, loss=loss)


def _draw(target: Target, source: Source, tokenizer: Any, settings: CalibrationSettings) -> Drawn:
    if target.measure.startswith("risk:"):
        return draw_questions(source, tokenizer, settings.prompts, settings.prompt_tokens, settings.seed)
    return draw(source, tokenizer, settings.prompts, settings.prompt_tokens, settings.new_tokens, settings.seed)


def _check_length(backbone: Backbone, settings: CalibrationSettings) -> None:
    length, limit = settings.prompt_tokens + settings.new_tokens, backbone.max_positions()
    if limit is not None and length > limit:
        raise UsageError(
            f"{settings.prompt_tokens} prompt and {settings.new_tokens} new tokens: {backbone.model_type} was built "
            f"for a context of {limit}. Lower `prompt_tokens` or `new_tokens`."
        )


def _facts(source: Source, drawn: Drawn, settings: CalibrationSettings, family: str) -> dict[str, Any]:
    """What the promise's data were; ``sha256`` is over the texts in their order."""
    kept = {name: value for name, value in dataclasses.asdict(settings).items() if name not in ("prompts", "batch")}
    facts = {"source": source.spec, "sha256": drawn.sha256, "tokens": drawn.tokens, "left_out": drawn.left_out}
    return {**facts, **kept, "path_family": family}


def _not_kept(request: Request, first: dict[str, Any], losses: torch.Tensor) -> PromiseError:
    """The refusal when the safest thresholds tried, with these losses, were not proved to keep the promise."""
    more, n = request.proof.prompts_needed(losses.numpy()), len(losses)
    seen = f"the safest thresholds tried, at {first['mean_depth']:.3f} of the depth, gave {first['estimate']:.4f}"
    way = (
        f"At such losses {more:,} prompts beside the path's would do: raise `prompts`; or promise less."
        if more is not None and more > n
        else "Promise less, use another policy (defer keeps state exact), or exits trained on such text."
    )
    return PromiseError(
        f"no threshold keeps {request.target.text} on these {n} prompts: {seen}. {way} Nothing was saved."
    )
