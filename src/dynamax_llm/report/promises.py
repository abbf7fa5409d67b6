"""Promises in plain words, the tests they passed, what they do not say, and how they fare on other text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynamax_llm.evaluation.harness.results import BackboneFacts, Shift
from dynamax_llm.report.markup import Markup, join, scrolling, tag
from dynamax_llm.report.numbers import DASH, PERCENT, is_number, number, percent, share, spread

Promise = Mapping[str, Any]

#: What a measure is about, by the measure's name; ``risk:…`` is treated apart.
_ABOUT = {
    "agreement": "the share of tokens that equal the full model's, given the same prefix, is at least {bound}",
    "consistency": "the ROUGE-L of the text to the full model's own text is at least {bound}",
}
#: Where p-values come from, by the method's name; conformal risk control has none and is worded apart.
_BOUNDS = {"ltt": "p-values by betting", "ltt-hb": "Hoeffding-Bentkus p-values"}
_SILENT = {
    "agreement": "nor of a free generation, which drifts after its first difference",
    "consistency": "nor of tokens one by one: two texts may share most words and still differ where it matters",
}


def in_words(promise: Promise) -> str:
    """What is guaranteed, to whom, and how surely."""
    measure, bound, unit = str(promise.get("measure", "")), promise.get("bound"), promise.get("unit", "samples")
    about = _ABOUT.get(measure, "the measure stays within {bound}")
    if measure.startswith("risk:"):
        about = f"the full model's {measure.removeprefix('risk:')} falls by at most {{bound}}"
    about = about.replace("{bound}", number(bound))
    drawn = f"{promise.get('n', DASH)} {unit} of {_source(promise)}"
    if promise.get("method") == "crc":
        return (
            f"On average over draws of the {drawn} and of one more {_one(str(unit))}, {about}. This is conformal risk "
            "control: an expectation, with no confidence attached to the one draw that was made."
        )
    return (
        f"With {_sure(promise.get('confidence'))} confidence over the draw of the {drawn}, {about}, on average over "
        f"{unit} of that kind of text (Learn-then-Test, {_BOUNDS.get(str(promise.get('method')), DASH)})."
    )


def not_said(promise: Promise) -> str:
    """The limits of a promise, so that nobody reads more into it."""
    measure = str(promise.get("measure", ""))
    silent = _SILENT.get(measure, "nor of what the metric does not see")
    return (
        f"It speaks of an average, not of every text, {silent}. It holds for text like that it was calibrated on, for "
        f"this backbone, judge, readout {promise.get('readout', DASH)}, state policy {promise.get('policy', DASH)} "
        f"and window {promise.get('window', DASH)}. It says nothing about time."
    )


def card(promise: Promise, figure: Markup | None) -> Markup:
    """One promise with its evidence."""
    thresholds = promise.get("thresholds") or ()
    shown = ", ".join("never" if value is None else share(value) for value in thresholds) or DASH
    facts = {
        "chosen λ": number(promise.get("parameter")),
        "thresholds per exit": shown,
        "estimator": promise.get("estimator", promise.get("judge", DASH)),
        "estimate": number(promise.get("estimate")),
        "p-value": number(promise.get("p_value"), 4),
        "mean depth": percent(promise.get("mean_depth")),
        "calibrated on": f"{promise.get('n', DASH)} {promise.get('unit', '')} (path: {promise.get('n_path', DASH)})",
        "data": f"{_source(promise)} · sha256 {_brief(_data(promise).get('sha256'))}",
        "backbone": _brief(promise.get("fingerprint")),
        "made": f"DYNAMAX {promise.get('dynamax', DASH)}, {str(promise.get('date', DASH))[:10]}",
    }
    closed = bool(thresholds) and all(value is None for value in thresholds)
    return tag(
        "article",
        tag("h4", tag("code", str(promise.get("text", "promise")))),
        tag("p", in_words(promise), class_="lead"),
        tag("p", "It is kept by never leaving early: no threshold passed the test.", class_="lead") if closed else None,
        tag("p", tag("b", "What it does not say. "), not_said(promise)),
        tag(
            "dl",
            [tag("div", tag("dt", key), tag("dd", str(value))) for key, value in facts.items()],
            class_="facts-list",
        ),
        tag("div", figure, _evidence(promise), class_="beside"),
        class_="promise",
    )


def _evidence(promise: Promise) -> Markup | None:
    steps = [item for item in promise.get("evidence") or () if isinstance(item, Mapping)]
    if not steps:
        return tag("p", "The record holds no evidence of the path tested.")
    rows = []
    for item in steps:
        chosen = item.get("parameter") == promise.get("parameter")
        verdict = "chosen" if chosen else "passed" if item.get("kept") else "not passed"
        values = (
            number(item.get("estimate")),
            number(item.get("p_value"), 4),
            percent(item.get("mean_depth")),
            ("● " if item.get("kept") else "○ ") + verdict,
        )
        cells = [tag("th", number(item.get("parameter")), scope="row"), *(tag("td", value) for value in values)]
        rows.append(tag("tr", cells, class_="chosen" if chosen else None))
    expected, tested = promise.get("method") == "crc", "; testing stops at the first that does not pass"
    heads = ("λ", "estimate", "p-value", "mean depth", "test")
    return scrolling(
        f"evidence for {promise.get('text')}",
        tag(
            "table",
            tag("caption", "The path, from safe to risky", None if expected else tested),
            tag("thead", tag("tr", [tag("th", text, scope="col") for text in heads])),
            tag("tbody", rows),
        ),
    )


def shifts(found: Sequence[Shift], backbones: Sequence[BackboneFacts]) -> Markup:
    """Promises on text of another kind than they were calibrated on: kept or broken, in numbers."""
    layers = {item.name: item.n_layers for item in backbones}
    rows = [_shift(item, layers.get(item.backbone)) for item in found]
    broken = sum(not item.kept for item in found)
    heads = ("backbone", "promise", "calibrated on", "measured on")
    figures = ("samples", "measured", "mean depth", "there")
    summary = (
        f"{len(found)} measurements of promises on text of a named kind: {len(found) - broken} within the bound, "
        f"{broken} outside it. A promise is about the text it was calibrated on; elsewhere it may break, and this "
        "shows whether it did."
    )
    return join(
        [
            tag("p", summary),
            scrolling(
                "promises on other text",
                tag(
                    "table",
                    tag("caption", "Promises on other text"),
                    tag(
                        "thead",
                        tag(
                            "tr",
                            [tag("th", text, scope="col", class_="words") for text in heads],
                            [tag("th", text, scope="col") for text in figures],
                        ),
                    ),
                    tag("tbody", rows),
                ),
            ),
        ]
    )


def _shift(item: Shift, n_layers: int | None) -> Markup:
    depth = f"{item.mean_depth * n_layers:.1f} of {n_layers}" if n_layers else ""
    return tag(
        "tr",
        tag("th", item.backbone, scope="row"),
        tag("td", tag("code", item.promise), class_="words"),
        tag("td", item.calibrated_on, class_="words"),
        tag("td", item.measured_on, class_="words"),
        tag("td", item.samples),
        tag("td", number(item.value.value), tag("small", spread(item.value))),
        tag("td", percent(item.mean_depth), tag("small", depth)),
        tag("td", "✓ kept" if item.kept else "✗ broken", class_="good" if item.kept else "bad"),
    )


def _sure(confidence: Any) -> str:
    return f"{100 * confidence:g}{PERCENT}" if is_number(confidence) else "unstated"


def _data(promise: Promise) -> Mapping[str, Any]:
    data = promise.get("data")
    return data if isinstance(data, Mapping) else {}


def _source(promise: Promise) -> str:
    return str(_data(promise).get("source") or "text of an unnamed source")


def _one(unit: str) -> str:
    return unit.removesuffix("s")


def _brief(digest: Any) -> str:
    text = str(digest or DASH)
    return text if len(text) <= 14 else f"{text[:12]}…"
