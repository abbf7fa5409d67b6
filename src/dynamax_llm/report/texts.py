"""Texts for reading: each token tinted by its depth, disagreements underlined, the full model's word beside it."""

from __future__ import annotations

from collections.abc import Sequence

from dynamax_llm.evaluation.harness.results import BackboneFacts, Evaluation, Example, ShownToken
from dynamax_llm.report.depths import first_depth
from dynamax_llm.report.markup import Markup, join, tag
from dynamax_llm.report.numbers import percent
from dynamax_llm.report.palette import step
from dynamax_llm.report.select import label
from dynamax_llm.report.verdict import CLOSE

#: Characters shown of a prompt, its end; few-shot prompts are thousands of characters long.
PROMPT = 420


def texts(document: Evaluation, backbone: BackboneFacts, examples: Sequence[Example]) -> Markup:
    """Examples of one backbone under one legend; see ``chosen``."""
    first, last = first_depth(document, backbone), backbone.n_layers
    left_out = len(examples)
    examples = chosen(document, examples)
    left_out -= len(examples)
    depths = sorted({token.layers for item in examples for token in item.tokens})
    swatches = [tag("span", depth, class_=f"t d{step(depth, first, last)}") for depth in depths]
    legend = tag(
        "p",
        "layers run: ",
        [(swatch, " ") for swatch in swatches],
        f"of {last} · ",
        tag("span", "underlined", class_="x"),
        ": the full model would have said something else. Point at a token, tap it, or use Tab and the arrow keys.",
        class_="legend",
    )
    note = None
    if left_out:
        note = tag(
            "p",
            f"Of every family the least deep setting with an agreement of at least {CLOSE:g} on that task is shown, "
            f"or without one the closest. {left_out} texts of other settings are in eval.json.",
            class_="legend",
        )
    shown = [_example(document, item, first, last) for item in examples]
    return join([legend, note, tag("div", shown, class_="examples")])


def chosen(document: Evaluation, examples: Sequence[Example]) -> list[Example]:
    """Of every prompt and family of settings one example, in the order given: a grid has hundreds.

    It is the setting of least depth among those close to the full model on that task, or the closest one.
    """
    cells = {(cell.backbone, cell.setting, cell.task): cell for cell in document.cells}
    families = {(name, one.id): (one.family, one.kind) for name, group in document.settings.items() for one in group}
    best: dict[tuple[str, ...], tuple[tuple[float, float], int]] = {}
    for place, item in enumerate(examples):
        cell = cells.get((item.backbone, item.setting, item.task))
        agreement = cell.agreement.value if cell is not None and cell.agreement is not None else 0.0
        depth = cell.mean_depth.value if cell is not None else 1.0
        rank = (1.0, -depth) if agreement >= CLOSE else (0.0, agreement)
        key = (item.task, item.prompt, item.full_text, *families[item.backbone, item.setting])
        if key not in best or rank > best[key][0]:
            best[key] = (rank, place)
    return [examples[place] for _, place in sorted(best.values(), key=lambda found: found[1])]


def _example(document: Evaluation, example: Example, first: int, last: int) -> Markup:
    setting = next(item for item in document.settings[example.backbone] if item.id == example.setting)
    count = len(example.tokens)
    differ = sum(not token.agrees for token in example.tokens)
    mean = sum(token.layers for token in example.tokens) / count if count else last
    facts = f"{count} tokens, mean depth {mean:.1f} of {last} ({percent(mean / last)}), {differ} not the full model's"
    tokens = [_token(token, first, last, index) for index, token in enumerate(example.tokens)]
    hidden = len(example.prompt) - PROMPT
    prompt = f"… {example.prompt[-PROMPT:]}" if hidden > 0 else example.prompt
    return tag(
        "article",
        tag("h4", example.task, " · ", label(setting)),
        tag("p", prompt, class_="prompt", title=f"{hidden} earlier characters are left out" if hidden > 0 else None),
        tag("p", tokens, class_="text", role="list", aria_label="generated tokens", data_l=last),
        tag("p", tag("b", "full model: "), example.full_text, class_="whole"),
        tag("p", facts, class_="facts"),
        class_="example",
    )


def _token(token: ShownToken, first: int, last: int, index: int) -> Markup:
    """One token; ``data-f`` holds the full model's where it differs, ``data-n`` the layers."""
    classes = f"t d{step(token.layers, first, last)}{'' if token.agrees else ' x'}"
    said = f"{visible(token.text)}, {token.layers} of {last} layers"
    alternative = None if token.agrees else visible(token.full)
    spoken = said if token.agrees else f"{said}; full model: {alternative}"
    return tag(
        "span",
        token.text or "∅",
        class_=classes,
        role="listitem",
        tabindex=0 if index == 0 else -1,
        aria_label=spoken,
        data_n=token.layers,
        data_f=alternative,
    )


def visible(text: str) -> str:
    """A token with its spaces and line ends made visible; an empty one has a sign of its own."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "∅"
