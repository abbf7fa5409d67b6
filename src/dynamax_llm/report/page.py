"""The page: ``page.html.j2`` filled from a document; a section without data says so. Text from data is escaped."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from dynamax_llm.evaluation.harness.results import BackboneFacts, Cell, Evaluation, Example, TaskFacts
from dynamax_llm.report import figures, numbers, select
from dynamax_llm.report.palette import DARK, DEPTHS, LIGHT, step, variables
from dynamax_llm.report.plots import Plot, inline
from dynamax_llm.report.verdict import sentences, verdicts

#: Characters shown of a prompt, its end; few-shot prompts are thousands of characters long.
PROMPT = 420
_CONSTANTS = {"CLOSE": select.CLOSE, "DASH": numbers.DASH, "PROMPT": PROMPT, "QUIET": select.QUIET}
_FORMATS = (numbers.number, numbers.difference, numbers.percent, numbers.times, numbers.share, numbers.spread)


def page(document: Evaluation, keep: Callable[[Plot], None]) -> str:
    """The whole HTML document; ``keep`` is called with every plot in it, in order."""
    names: set[str] = set()

    def figure(plot: Plot) -> Markup:
        alternatives = (f"{plot.name}-{count}" if count else plot.name for count in itertools.count())
        named = replace(plot, name=next(name for name in alternatives if name not in names))
        names.add(named.name)
        keep(named)
        return Markup("<figure>") + Markup(inline(named)) + Markup("</figure>")

    roles = select.colour_roles(document)
    functions = [*_FORMATS, figure, select.label, select.metric_name, sentences, visible, threshold, brief]
    names_of = {function.__name__: function for function in functions}
    names_of["role"] = lambda setting: roles.get((setting.family, setting.kind), "ink")
    names_of["setting_of"] = lambda part: select.setting_of(document, part)
    environment = Environment(
        loader=FunctionLoader(_file), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= names_of
    environment.globals |= names_of | _CONSTANTS
    script = _file("page.js")
    return environment.get_template("page.html.j2").render(
        document=document,
        overview=_overview(document),
        verdicts=verdicts(document),
        panels=[_panel(document, *pair) for pair in select.pairs(document)],
        examples=[texts for backbone in document.backbones if (texts := _texts(document, backbone))["examples"]],
        curves={item.name: plots for item in document.backbones if (plots := _curves(document, item))},
        promises={name: _promises(name, group) for name, group in document.promises.items() if group},
        layers={item.name: item.n_layers for item in document.backbones},
        style=Markup(_styles()),
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _overview(document: Evaluation) -> dict[str, str]:
    samples = sorted({task.samples for task in document.tasks})
    models = []
    for item in document.backbones:
        millions = item.parameters / 1e6
        size = f"{millions / 1e3:.1f} B" if millions >= 1e3 else f"{millions:.1f} M"
        models.append(f"{item.name} ({item.n_layers} layers, {size})")
    return {
        "backbones": ", ".join(models) or numbers.DASH,
        "tasks": ", ".join(f"{task.name} ({task.shots}-shot)" for task in document.tasks) or numbers.DASH,
        "samples per task": " to ".join(map(str, dict.fromkeys((*samples[:1], *samples[-1:])))) or numbers.DASH,
        "settings": str(sum(map(len, document.settings.values()))),
    }


def _panel(document: Evaluation, backbone: BackboneFacts, task: TaskFacts, cells: list[Cell]) -> dict[str, Any]:
    """One backbone on one task: its cells, their metrics (the primary one first), and the figures of both."""
    metrics = {name for cell in cells for name in cell.metrics}
    return {
        "backbone": backbone,
        "task": task,
        "cells": cells,
        "metrics": sorted(metrics, key=lambda name: (name != task.primary, name)),
        "unscored": figures.unscored(task, cells),
        "fronts": figures.fronts(document, backbone, task, cells),
        "histogram": figures.histogram(document, backbone, task, cells),
    }


def _texts(document: Evaluation, backbone: BackboneFacts) -> dict[str, Any]:
    """The examples of one backbone that are worth reading, and the number of those that are not shown."""
    examples: list[Example] = [item for item in document.examples if item.backbone == backbone.name]
    shown, first = select.chosen(document, examples), select.first_depth(document, backbone)
    return {
        "backbone": backbone,
        "examples": shown,
        "left_out": len(examples) - len(shown),
        "depths": sorted({token.layers for item in shown for token in item.tokens}),
        "step": lambda layers: step(layers, first, backbone.n_layers),
    }


def _curves(document: Evaluation, backbone: BackboneFacts) -> list[Plot]:
    """Reliability plots of a backbone, one per family of heads."""
    own = sorted((item for item in document.reliability if item.backbone == backbone.name), key=lambda c: c.layer)
    families = dict.fromkeys(item.family for item in document.reliability if item.backbone == backbone.name)
    return [
        figures.reliability(document, backbone, family, [item for item in own if item.family == family])
        for family in families
    ]


def _promises(backbone: str, group: tuple[dict[str, Any], ...]) -> list[tuple[dict[str, Any], Plot | None]]:
    named = ((f"{backbone} {item.get('text')} {index}", item) for index, item in enumerate(group, start=1))
    return [(item, figures.evidence(name, item)) for name, item in named]


def visible(text: str) -> str:
    """A token with its spaces and line ends made visible; ∅ for an empty one."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "∅"


def threshold(value: float | None) -> str:
    """A threshold, "never" for None."""
    return "never" if value is None else numbers.share(value)


def brief(digest: object) -> str:
    """The beginning of a long digest."""
    text = str(digest or numbers.DASH)
    return text if len(text) <= 14 else f"{text[:12]}…"


def _styles() -> str:
    dark = f"color-scheme:dark;{variables(DARK)}"
    tints = "".join(f".t.d{index}{{background:var(--t{index})}}" for index in range(DEPTHS))
    return (
        f":root{{color-scheme:light;{variables(LIGHT)}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}"
        f"@media screen{{:root[data-theme=dark]{{{dark}}}}}\n{_file('page.css')}\n{tints}"
    )


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
