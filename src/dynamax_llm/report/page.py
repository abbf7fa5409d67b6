"""The page: sections in order, each of which says so when the document holds nothing for it."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from importlib import resources

from dynamax_llm.evaluation.harness.results import Evaluation
from dynamax_llm.report import words
from dynamax_llm.report.canvas import Plot, inline
from dynamax_llm.report.depths import evidence, histogram, reliability
from dynamax_llm.report.fronts import fronts
from dynamax_llm.report.markup import Child, Markup, slug, tag
from dynamax_llm.report.numbers import DASH, number, percent, times
from dynamax_llm.report.palette import DARK, DEPTHS, LIGHT, variables
from dynamax_llm.report.promises import card, shifts
from dynamax_llm.report.select import label, pairs
from dynamax_llm.report.tables import table
from dynamax_llm.report.texts import texts
from dynamax_llm.report.verdict import Verdict, caution, sentences, verdicts

#: Called for every figure: keeps it for the files and gives its place in the page.
Show = Callable[[Plot], Markup]


def page(document: Evaluation, keep: Callable[[Plot], None]) -> str:
    """The whole HTML document; ``keep`` is handed every plot that is in it."""

    names: set[str] = set()

    def show(plot: Plot) -> Markup:
        alike = (f"{plot.name}-{count}" if count else plot.name for count in itertools.count())
        own = replace(plot, name=next(name for name in alike if name not in names))
        names.add(own.name)
        keep(own)
        return tag("figure", inline(own))

    sections = {
        "Fronts": ("Quality against cost", _fronts(document, show)),
        "Tables": ("Every setting, every figure", _tables(document)),
        "Depth": ("Where tokens leave", _depths(document, show)),
        "Texts": ("Texts, token by token", _texts(document)),
        "Reliability": ("Is a head that says p right?", _reliability(document, show)),
        "Promises": ("Promises and their evidence", _promises(document, show)),
        "Measured": ("How each number was measured", words.measured()),
        "Runs": ("Runs", _runs(document)),
    }
    links = [tag("li", tag("a", name, href=f"#{slug(name)}")) for name in sections]
    body = [tag("section", tag("h2", title), content, id=slug(name)) for name, (title, content) in sections.items()]
    script = _file("page.js")
    toggle = tag("button", "Dark", id="theme", type="button", aria_pressed="false", title="Light or dark")
    return "<!doctype html>\n" + tag(
        "html",
        _head(document.title, script),
        tag(
            "body",
            tag("a", "To the report", href="#report", class_="jump"),
            tag("nav", tag("ul", links), toggle, aria_label="Sections"),
            tag("main", _header(document), body, id="report"),
            tag("div", id="tip", role="tooltip", hidden=True),
            tag("script", Markup(script)),
        ),
        lang="en",
    )


def _head(title: str, script: str) -> Markup:
    """Its policy lets the browser load nothing at all, and run one script: the page's own."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Markup(_styles())),
    )


def _styles() -> str:
    dark = f"color-scheme:dark;{variables(DARK)}"
    tints = "".join(f".t.d{step}{{background:var(--t{step})}}" for step in range(DEPTHS))
    return (
        f":root{{color-scheme:light;{variables(LIGHT)}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}"
        f"@media screen{{:root[data-theme=dark]{{{dark}}}}}\n{_file('page.css')}\n{tints}"
    )


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _header(document: Evaluation) -> Markup:
    found = verdicts(document)
    samples = sorted({task.samples for task in document.tasks})
    who = ", ".join(f"{item.name} ({item.n_layers} layers, {_size(item.parameters)})" for item in document.backbones)
    what = ", ".join(f"{task.name} ({task.shots}-shot)" for task in document.tasks)
    facts = {
        "backbones": who or DASH,
        "tasks": what or DASH,
        "samples per task": " to ".join(str(item) for item in dict.fromkeys((samples[0], samples[-1])))
        if samples
        else DASH,
        "settings": str(sum(len(items) for items in document.settings.values())),
    }
    verdict = [tag("p", " ".join(sentences(item))) for item in found]
    return tag(
        "header",
        tag("p", "DYNAMAX evaluation", class_="eyebrow"),
        tag("h1", document.title),
        tag("dl", [tag("div", tag("dt", key), tag("dd", value)) for key, value in facts.items()], class_="meta"),
        tag(
            "div",
            tag("h2", "Verdict"),
            verdict,
            tag("p", caution(found), class_="aside"),
            class_="verdict",
            id="verdict",
        ),
        tag("div", [_tiles(item) for item in found], class_="boards") if found else None,
        tag("div", [tag("p", note) for note in document.notes], class_="notes") if document.notes else None,
    )


def _tiles(found: Verdict) -> Markup:
    """A verdict's figures side by side: what was counted never without what the clock said."""
    reduction = " … ".join(percent(value) for value in found.reductions)
    clock = " … ".join(times(value) for value in found.speed_ups) if found.speed_ups else "nothing was timed"
    tiles = (
        ("agreement", number(found.agreement), f"lowest of {found.tasks} tasks" if found.tasks > 1 else "one task"),
        ("counted reduction", percent(found.reduction), reduction if found.tasks > 1 else "counted, not timed"),
        ("speed-up", times(found.speed_up), clock),
        (
            "mean depth",
            percent(found.depth),
            f"{found.depth * found.backbone.n_layers:.1f} of {found.backbone.n_layers}",
        ),
    )
    return tag(
        "section",
        tag("h3", found.backbone.name),
        tag("p", label(found.setting), class_="aside"),
        tag("dl", [tag("div", tag("dt", a), tag("dd", b, tag("small", c))) for a, b, c in tiles], class_="tiles"),
        class_="board",
        aria_label=f"best setting of {found.backbone.name}",
    )


def _fronts(document: Evaluation, show: Show) -> Child:
    parts: list[Child] = []
    for backbone, task, cells in pairs(document):
        plots = fronts(document, backbone, task, cells)
        parts.append(tag("h3", backbone.name, tag("span", " on "), task.name))
        if not any(cell.speed_up for cell in cells):
            parts.append(tag("p", "Nothing was timed here, so there is no front against wall clock.", class_="aside"))
        parts.append(tag("div", [show(plot) for plot in plots], class_="grid") if plots else _nothing("front to draw"))
    lead = (
        "Up and to the right is better. The star is the full model, the dotted line its quality. Whiskers are "
        "95\u00a0% intervals over samples, on a task's metric those of the paired difference to the full model. What "
        "is counted and what the clock said are different figures: a line may go far to the right in one and nowhere "
        "in the other. Baselines are drawn quieter, and frames around the rest: one that leaves its frame carries an "
        "arrow, and its numbers stand in the tables."
    )
    return [tag("p", lead), parts] if parts else _nothing("results")


def _tables(document: Evaluation) -> Child:
    parts = [
        (tag("h3", backbone.name, tag("span", " on "), task.name), table(document, backbone, task, cells))
        for backbone, task, cells in pairs(document)
    ]
    lead = "Press a column's name to sort by it. Under a value: its 95\u00a0% interval over samples."
    return [tag("p", lead), parts] if parts else _nothing("results")


def _depths(document: Evaluation, show: Show) -> Child:
    plots = [(backbone, histogram(document, backbone, task, cells)) for backbone, task, cells in pairs(document)]
    parts: list[Child] = []
    for backbone in document.backbones:
        own = [plot for owner, plot in plots if plot and owner.name == backbone.name]
        if own:
            parts += [tag("h3", backbone.name), tag("div", [show(plot) for plot in own], class_="grid")]
    lead = "One bar per setting, from shallow (blue) to full depth (orange); beside it, its mean depth in layers."
    return [tag("p", lead), parts] if parts else _nothing("depth histograms")


def _texts(document: Evaluation) -> Child:
    parts = []
    for backbone in document.backbones:
        own = [item for item in document.examples if item.backbone == backbone.name]
        if own:
            parts.append((tag("h3", backbone.name), texts(document, backbone, own)))
    return parts or _nothing("texts")


def _reliability(document: Evaluation, show: Show) -> Child:
    parts: list[Child] = []
    for backbone in document.backbones:
        own = [item for item in document.reliability if item.backbone == backbone.name]
        families = dict.fromkeys(item.family for item in own)
        plots = [
            reliability(
                document, backbone, family, sorted((i for i in own if i.family == family), key=lambda i: i.layer)
            )
            for family in families
        ]
        if plots:
            parts += [tag("h3", backbone.name), tag("div", [show(plot) for plot in plots], class_="grid")]
    lead = (
        "On the dashed line, of all tokens given confidence p, a share p is right. Below it a head is too sure of "
        "itself, above it too modest. Larger dots hold more tokens."
    )
    return [tag("p", lead), parts] if parts else _nothing("reliability curves")


def _promises(document: Evaluation, show: Show) -> Child:
    parts: list[Child] = []
    for backbone, promises in document.promises.items():
        if promises:
            parts.append(tag("h3", backbone))
        for index, promise in enumerate(promises):
            plot = evidence(f"{backbone} {promise.get('text')} {index + 1}", promise)
            parts.append(card(promise, show(plot) if plot else None))
    moved = [tag("h3", "On other text"), shifts(document.shifts, document.backbones)] if document.shifts else []
    return [parts or _nothing("promises"), moved or _nothing("measurements of a promise on other text")]


def _runs(document: Evaluation) -> Child:
    cards = []
    for run in document.runs:
        facts = {
            "created": run.created,
            "took": f"{run.seconds:,.0f} s",
            "hardware": run.hardware,
            "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()) or DASH,
            "commit": run.commit or DASH,
        }
        rows = [tag("div", tag("dt", key), tag("dd", value)) for key, value in facts.items()]
        cards.append(tag("article", tag("pre", run.command, tabindex=0), tag("dl", rows, class_="meta"), class_="run"))
    sources = [
        tag("li", f"{task.name}: {task.source}", f", sha256 {task.sha256}" if task.sha256 else None)
        for task in document.tasks
    ]
    models = [
        tag("li", f"{item.name}: {item.model_type}, fingerprint {item.fingerprint}") for item in document.backbones
    ]
    return [
        cards or _nothing("runs"),
        tag("h3", "Where documents came from") if sources else None,
        tag("ul", sources, class_="sources"),
        tag("h3", "Backbones") if models else None,
        tag("ul", models, class_="sources"),
    ]


def _nothing(what: str) -> Markup:
    return tag("p", f"This document holds no {what}.", class_="aside")


def _size(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
