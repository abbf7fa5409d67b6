"""From a promise in words to its record: draw sequences, learn the path on some, test along it on the others.

    documents ── one sequence each, shuffled ──┬── path split: path of thresholds, and where on it to begin
                                               └── the others: tested from safe to risky until the first is refused

Where the test begins depends on the path split alone, so the order of the tests is fixed before their losses are
measured. The result holds under the state policy, readout and estimator in use, for sequences drawn as these were.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from dynamax_llm.backbones import Backbone
from dynamax_llm.calibration.fit import fit_path
from dynamax_llm.calibration.path import Point
from dynamax_llm.calibration.prompts import Drawn, Item, draw, draw_chats, draw_questions
from dynamax_llm.calibration.risk_test import ROUNDING, RiskTest
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
from dynamax_llm.decoding.generate import EarlyExit
from dynamax_llm.engines.plan import POLICIES
from dynamax_llm.errors import PromiseError, UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.promise import METHODS, Promise, Target, digest
from dynamax_llm.text.prompts import chat_ids
from dynamax_llm.text.sources import Source
from dynamax_llm.version import installed_version

#: λ of the points that are tested: steps of two per cent of what could be saved at all.
PARAMETERS = tuple(step / 50 for step in range(1, 51))
#: Tests begin where this many times the path split's losses would still be accepted.
SPARE = 2.0


@dataclass(frozen=True)
class Request:
    """The arguments of a calibration, checked. Raises UsageError, PolicyMismatchError, PromiseError."""

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
        """Raise PromiseError unless ``count`` sequences would do for this promise if every loss were 0."""
        n, needed = count - settings.split(count), self.test.prompts_needed()
        if needed is None or n >= needed:
            return
        sure = "in expectation (crc)" if self.confidence is None else f"with {100 * self.confidence:.4g} % confidence"
        raise PromiseError(
            f"{given}: {n} beside the {settings.split(count)} that the path is learnt on, too few to promise "
            f"{self.target.text} {sure} even if none lost anything. That takes {needed}, so at least "
            f"{settings.prompts_for(needed)} prompts in all, and more where exits cost something. Give more, or "
            "promise less."
        )

    @property
    def test(self) -> RiskTest:
        """The test that losses must pass."""
        return RiskTest(self.method, self.target.limit, self.confidence)

    @property
    def how(self) -> dict[str, Any]:
        """EarlyExit's options."""
        return {"policy": self.policy, "window": self.window, "measure": self.measure}

    @property
    def metric(self) -> str | None:
        """The metric of a ``risk``, None for other targets."""
        kind, _, metric = self.target.measure.partition(":")
        return metric if kind == "risk" else None


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
    """The record of a promise that holds, with the riskiest thresholds on the path that passed the test.

    ``source`` holds documents, for a risk questions with answers. ``measure`` replaces the trained head as estimator.
    ``method`` "ltt" promises with ``confidence`` over draws of the sequences (Learn then Test, fixed sequence, p-values
    by betting), "ltt-hb" too (p-values of Hoeffding and Bentkus, larger where losses vary little), "crc" in
    expectation only (conformal risk control). ``on_test`` is called with every test. Nothing is saved.

    Raises PromiseError, with the number needed, for too few sequences, or if no thresholds pass; UsageError and
    PolicyMismatchError for arguments out of bounds; DataError, ArtifactMismatchError.
    """
    settings = settings or CalibrationSettings()
    request = Request.of(promise, confidence, method, policy, window, measure)
    request.check_count(settings.prompts, settings, f"{settings.prompts} prompts")
    POLICIES.lookup(policy).check(backbone, exits.readout(backbone))
    exits.check_backbone(backbone)
    _check_length(backbone, settings)
    drawn = _draw(request, source, tokenizer, settings)
    request.check_count(len(drawn.items), settings, f"data {source.spec!r} gives {len(drawn.items)} prompts")
    n_path = settings.split(len(drawn.items))
    path_risk = _risk(request, backbone, tokenizer, exits, drawn.items[:n_path], settings)
    risk = _risk(request, backbone, tokenizer, exits, drawn.items[n_path:], settings)
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
        data={**_data(source, drawn, settings, path.family), **score},
        fingerprint=digest(exits.fingerprint),
        dynamax=installed_version(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        evidence=tuple(evidence),
        dtype=str(backbone.dtype).removeprefix("torch."),
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
    if not isinstance(risk, TextRisk) or request.metric is None:
        return {}
    score = risk.empty_answer_loss(EarlyExit(exits, threshold="never", **request.how))
    if score <= request.target.limit:
        raise PromiseError(
            f"{request.target.text} has no meaning on these {len(risk.items)} prompts: the full model's own mean "
            f"{request.metric} is {score:.4f} there, so that an empty answer would keep it. Give "
            "prompts that this model can answer, or a smaller bound. Nothing was saved."
        )
    return {"full_score": score}


def _tests(
    exits: Exits, request: Request, points: Sequence[Point], path_risk: Risk, risk: Risk
) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """The tests from safe to risky, the first that fails included, each with its losses."""
    test = request.test

    def unsafe(index: int) -> bool:
        losses = SPARE * _measure(exits, request, points[index], path_risk).losses
        return not test.controls(np.resize(losses.clamp(max=1.0).numpy(), len(risk.items)))

    start = max(bisect.bisect_left(range(len(points)), True, key=unsafe) - 1, 0)
    # The path split may be wrong about ``start``, and tests end at the first that fails: approach it by halves.
    nearer = (start - (start >> halved) for halved in range(1, start.bit_length() + 1))
    order = [*dict.fromkeys((*nearer, start)), *range(start + 1, len(points))]

    greatest: torch.Tensor | None = None  # per sequence, the greatest loss so far, which crc tests
    for index in order:
        result = _measure(exits, request, points[index], risk)
        greatest = result.losses if greatest is None else torch.maximum(greatest, result.losses)
        tested = greatest if request.method == "crc" else result.losses
        value = float(test.value(tested.numpy()[:, None])[0])
        accepted = value <= test.level + ROUNDING
        p = None if request.method == "crc" else value
        yield {**_record(request, points[index], p, result), "kept": accepted}, result.losses
        if not accepted:
            return


def _measure(exits: Exits, request: Request, point: Point, risk: Risk) -> Measured:
    thresholds = ["never" if value is None else value for value in point.thresholds]
    return risk.measure(EarlyExit(exits, threshold=thresholds, **request.how))


def _record(request: Request, point: Point, p: float | None, result: Measured) -> dict[str, Any]:
    """One entry of the evidence; the estimate is of what the promise names."""
    loss = float(result.losses.mean())
    return {
        "parameter": round(point.parameter, 6),
        "thresholds": list(point.thresholds),
        "estimate": loss if request.metric is not None else 1.0 - loss,
        "p_value": p,
        "mean_depth": float(result.depth.mean()),
    }


def _risk(
    request: Request,
    backbone: Backbone,
    tokenizer: Any,
    exits: Exits,
    items: Sequence[Item],
    settings: CalibrationSettings,
) -> Risk:
    if not request.target.of_texts:
        if settings.chat:
            never = EarlyExit(exits, threshold="never", measure=request.measure)
            text = TextRisk(backbone, tokenizer, items, settings.batch, settings.new_tokens, loss=inconsistency)
            items = text.answered(never)
        return AgreementRisk(backbone, tokenizer, items, settings.batch)
    loss = inconsistency if request.metric is None else shortfall(request.metric)
    return TextRisk(backbone, tokenizer, items, settings.batch, settings.new_tokens, loss=loss)


def _draw(request: Request, source: Source, tokenizer: Any, settings: CalibrationSettings) -> Drawn:
    size = (settings.prompts, settings.prompt_tokens)
    encode = functools.partial(chat_ids, tokenizer, system=settings.system) if settings.chat else None
    if request.metric is not None:
        return draw_questions(source, tokenizer, *size, settings.seed, encode)
    if encode is not None:
        return draw_chats(source, encode, *size, settings.seed)
    return draw(source, tokenizer, settings.prompts, settings.prompt_tokens, settings.new_tokens, settings.seed)


def _check_length(backbone: Backbone, settings: CalibrationSettings) -> None:
    length, limit = settings.prompt_tokens + settings.new_tokens, backbone.max_positions()
    if limit is not None and length > limit:
        raise UsageError(
            f"{settings.prompt_tokens} prompt and {settings.new_tokens} new tokens: {backbone.model_type} was built "
            f"for a context of {limit}. Lower `prompt_tokens` or `new_tokens`."
        )


def _data(source: Source, drawn: Drawn, settings: CalibrationSettings, family: str) -> dict[str, Any]:
    """The promise's record of its data; ``sha256`` is over the texts in their order."""
    of_data = {name: value for name, value in dataclasses.asdict(settings).items() if name not in ("prompts", "batch")}
    origin = {"source": source.spec, "sha256": drawn.sha256, "tokens": drawn.tokens, "left_out": drawn.left_out}
    return {**origin, **of_data, "path_family": family}


def _not_kept(request: Request, first: dict[str, Any], losses: torch.Tensor) -> PromiseError:
    """The error where the safest thresholds tried, with these losses, did not pass the test."""
    needed, n = request.test.prompts_needed(losses.numpy()), len(losses)
    advice = (
        f"At such losses {needed:,} prompts beside the path's would do: raise `prompts`; or promise less."
        if needed is not None and needed > n
        else "Promise less, use another policy (defer keeps state exact), or exits trained on such text."
    )
    return PromiseError(
        f"no threshold keeps {request.target.text} on these {n} prompts: the safest thresholds tried, at "
        f"{first['mean_depth']:.3f} of the depth, gave {first['estimate']:.4f}. {advice} Nothing was saved."
    )
