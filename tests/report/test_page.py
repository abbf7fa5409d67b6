"""The page holds every number of the document, shows text as text, and asks nothing of anybody."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest

from dynamax_llm.evaluation.harness.results import Bin
from dynamax_llm.report import write_report
from dynamax_llm.report.figures import evidence, fronts, reliability
from dynamax_llm.report.numbers import difference, number, percent, slug, spread, times
from dynamax_llm.report.palette import DARK, LIGHT, SENTINELS, mixed, step
from dynamax_llm.report.plots import clean, inline
from dynamax_llm.report.select import pairs
from tests.report import synthetic
from tests.report.reading import Element, read


@pytest.fixture(scope="module")
def root(page) -> Element:
    return read(page.read_text(encoding="utf-8"))


def words(element: Element) -> str:
    return " ".join(element.text.split())


def test_every_section_is_there(root):
    titles = [item.text for item in root.all("h2")]
    assert titles[0] == "Verdict"
    assert [item.attributes["id"] for item in root.all("section") if "id" in item.attributes] == [
        "fronts", "tables", "depth", "texts", "reliability", "promises", "measured", "runs",
    ]  # fmt: skip
    assert [item.attributes["href"] for item in root.all("nav")[0].all("a")][:2] == ["#fronts", "#tables"]
    assert root.all("h1")[0].text == synthetic.evaluation().title
    levels = [int(item.name[1]) for item in root.inside if re.fullmatch(r"h[1-6]", item.name)]
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))


def test_tables_hold_every_cell(root):
    document = synthetic.evaluation()
    tables = root.all("table", "results")
    assert len(tables) == 6
    assert sum(len(item.all("tbody")[0].all("tr")) for item in tables) == len(document.cells) == 168
    row = tables[0].all("tbody")[0].all("tr")[1]
    cell = next(item for item in document.cells if item.setting == "mamba@0.95")
    assert words(row.all("th")[0]).startswith("mamba ≥ 0.95")
    sorts = [float(item.attributes["data-v"]) for item in row.all("td") if "data-v" in item.attributes]
    metric, agreement = cell.metrics[document.tasks[0].primary], cell.agreement
    assert sorts[:2] == [metric.value, metric.delta.value]
    assert agreement.value in sorts and cell.counted_reduction.value in sorts and cell.speed_up.value in sorts
    shown = words(row)
    assert f"{agreement.value:.3f}{agreement.low:.3f} … {agreement.high:.3f}" in shown
    assert f"{100 * cell.counted_reduction.value:.1f} %" in shown
    assert f"{cell.speed_up.value:.2f}×" in shown and "8 timed" in shown


def test_log_likelihood_has_dashes_for_texts(root):
    row = root.all("table", "results")[2].all("tbody")[0].all("tr")[1]
    assert [item.text for item in row.all("td")].count("–") == 6  # ROUGE-L, identical, divergence, degenerate, …


def test_nothing_is_asked_of_anybody(page, root):
    text = page.read_text(encoding="utf-8")
    assert len(text.encode()) < 1_500_000
    outside = [
        value
        for item in root.inside
        for key, value in item.attributes.items()
        if key in ("src", "href", "xlink:href", "action", "srcset", "data", "poster") and not value.startswith("#")
    ]
    assert outside == ["data:,"]
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in root.all("meta")[1].attributes["content"]


def test_ids_are_unique_and_figures_speak(root):
    ids = [item.attributes["id"] for item in root.inside if "id" in item.attributes]
    assert len(ids) > 100 and [name for name, count in Counter(ids).items() if count > 1] == []
    used = {item.attributes["xlink:href"] for item in root.all("use")}
    assert sorted(used - {f"#{name}" for name in ids}) == []
    figures = root.all("figure")
    assert len(figures) == 20 + 6 + 4 + 2
    assert all(len(item.all("svg")) == 1 and item.all("svg")[0].attributes["aria-label"] for item in figures)
    assert not any(value in item.text for item in figures for value in SENTINELS.values())


def test_hostile_text_is_text(root):
    assert len(root.all("script")) == 1 and root.all("img") == []
    assert not any(key.startswith("on") for item in root.inside for key in item.attributes)
    tokens = [item for item in root.all("span", "t") if "data-n" in item.attributes]
    assert synthetic.HOSTILE in [item.text for item in tokens]
    assert any(synthetic.HOSTILE in item.text for item in root.all("div", "notes"))


def test_tokens_know_their_depth_and_alternative(root):
    text = next(item for item in root.all("p", "text") if item.text.startswith(" The river"))
    tokens = text.all("span")
    assert [token.attributes["data-n"] for token in tokens[:3]] == ["8", "12", "16"]
    assert tokens[0].attributes["data-f"] == "␣other" and "x" in tokens[0].attributes["class"].split()
    assert "data-f" not in tokens[1].attributes
    assert tokens[0].attributes["aria-label"] == "␣The, 8 of 16 layers; full model: ␣other"
    assert [token.attributes["tabindex"] for token in tokens] == ["0", *["-1"] * 15]


def test_promises_say_what_they_say_and_what_not(root):
    first, second = root.all("article", "promise")[:2]
    assert "With 95 % confidence over the draw of the 400 sequences of wikipedia.jsonl" in words(first)
    assert "is at least 0.980" in words(first) and "What it does not say." in words(first)
    rows = first.all("tbody")[0].all("tr")
    assert len(rows) == 9
    assert [item.text for item in rows[4].all("td")] == ["0.985", "0.0092", "85.0\u00a0%", "● chosen"]
    assert words(rows[5]).endswith("○ not passed")
    assert "no confidence attached" in words(second) and "f1 falls by at most 0.020" in words(second)
    assert "kept by never leaving early" in words(second) and "p-value–" in words(second)


def test_shifts_are_kept_or_broken_in_numbers(root):
    section = next(item for item in root.all("section") if item.attributes.get("id") == "promises")
    table = section.all("table")[-1]
    rows = [[words(cell) for cell in row.all("td")] for row in table.all("tbody")[0].all("tr")]
    assert rows[0][2:5] == ["dialogues", "200", "0.9860.982 … 0.990"] and rows[0][-1] == "✓ kept"
    assert rows[1][2] == "novels" and rows[1][-1] == "✗ broken"
    assert "4 measurements" in words(section) and "2 outside it" in words(section)


def test_runs_are_told(root):
    run = root.all("article", "run")[0]
    assert run.all("pre")[0].text == synthetic.evaluation().runs[0].command
    assert "transformers 5.23.0" in run.text and "2 cores of a made-up CPU" in run.text and "0123abcd" in run.text


def test_the_least_document(tmp_path):
    path = tmp_path / "one.html"
    assert write_report([synthetic.single()], path) == [path]
    text = words(read(path.read_text(encoding="utf-8")))
    for said in (
        "no texts",
        "no promises",
        "no reliability curves",
        "no front to draw",
        "no depth histograms",
        "no runs",
    ):
        assert f"This document holds {said}." in text
    assert "there is no verdict" in text and "Nothing was timed here" in text


def test_the_same_document_gives_the_same_bytes(tmp_path):
    document = synthetic.evaluation(timed=False, backbones=synthetic.BACKBONES[:1])
    cells = [item for item in document.cells if item.task == "triviaqa" and item.setting[:5] in ("full", "softm")]
    fewer = {"cells": tuple(cells), "reliability": (), "examples": (), "promises": {}}
    document = document.model_copy(update=fewer)
    written = [write_report([document], tmp_path / name / "r.html", tmp_path / name / "plots") for name in "ab"]
    names = [[path.name for path in paths] for paths in written]
    assert names[0] == names[1] and len(set(names[0])) == 1 + 2 * 3
    assert "front-tfm-demo-triviaqa-agreement-counted.svg" in names[0] and "depth-tfm-demo-triviaqa.png" in names[0]
    for one, other in zip(*written, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    drawn = {path.name: path.read_bytes() for path in written[0]}
    svg = drawn["front-tfm-demo-triviaqa-agreement-counted.svg"].decode()
    assert "<text" in svg and "softmax_margin" in svg and "#ffffff" in svg and "var(--" not in svg
    assert all(content.startswith(b"\x89PNG") for name, content in drawn.items() if name.endswith(".png"))


def test_text_in_figures_keeps_its_digits_and_dollars():
    backbone, curve = synthetic.BACKBONES[0], synthetic.curve(synthetic.BACKBONES[0], "mamba", 0)
    curve = curve.model_copy(
        update={"family": "$a$ <b>", "error": 0.0123, "bins": (Bin(confidence=1, right=1, tokens=2),)}
    )
    drawn = inline(reliability(synthetic.evaluation(), backbone, curve.family, [curve]))
    assert "ECE 0.012" in drawn and "$a$ &lt;b&gt;" in drawn
    assert "var(--d0)" in drawn and "var(--sans)" in drawn


def test_evidence_without_numbers_draws_nothing():
    assert evidence("x", {"text": "agreement>=0.9", "evidence": [{"estimate": None}]}) is None
    assert evidence("x", {}) is None


def test_numbers():
    assert [number(0.98123), number(-0.5), number(21.456), number(None), number(float("nan")), number(True)] == [
        "0.981", "−0.500", "21.46", "–", "–", "–",
    ]  # fmt: skip
    assert [difference(0.0123), difference(-0.0123), difference(-0.0001)] == ["+0.012", "−0.012", "0.000"]
    assert [percent(0.1424), percent(-0.00001), times(1.0449)] == ["14.2\u00a0%", "0.0\u00a0%", "1.04×"]
    assert spread(synthetic.about(0.5, 0.1), percent) == "40.0 … 60.0\u00a0%" and spread(None) == ""


def test_names_of_files_and_text_in_figures():
    assert [slug("Mamba 7B", "f1,none"), slug("日本")] == ["mamba-7b-f1-none", "x"]
    assert clean("a\n b\x00c" + "d" * 90, 12) == "a b cdddddd…"


def hostile(value: object, path: tuple[str, ...] = ()) -> object:
    """The value with hostile text in place of every free text in it."""
    kinds = ("kind", "format", "policy", "method", "measure")
    if isinstance(value, dict):
        return {key: hostile(item, (*path, str(key))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hostile(item, path) for item in value]
    keep = not isinstance(value, str) or path[-1] in kinds
    return value if keep else f"{value} {synthetic.HOSTILE}"


def test_every_text_of_a_document_is_escaped(tmp_path):
    """Names, labels, sources, commands, promises: whatever a document holds cannot become an element."""
    whole = synthetic.evaluation(backbones=synthetic.BACKBONES[:1])
    few = [item for item in whole.cells if item.setting in ("full", "mamba@0.8")]
    document = whole.model_copy(update={"cells": tuple(few)}).model_dump()
    changed = hostile(document)
    for part in ("settings", "promises"):
        changed[part] = {f"{name} {synthetic.HOSTILE}": items for name, items in changed[part].items()}
    for cell in changed["cells"]:
        cell["metrics"] = {f"{name} {synthetic.HOSTILE}": item for name, item in cell["metrics"].items()}
    path = tmp_path / "hostile.html"
    write_report([type(whole).model_validate(changed)], path)
    text = path.read_text(encoding="utf-8")
    root = read(text)
    assert len(root.all("script")) == 1 and root.all("img") == []
    assert not any(key.startswith("on") for item in root.inside for key in item.attributes)
    assert root.text.count(synthetic.HOSTILE) > 50


def test_scores_that_are_all_zero_are_said_not_drawn(tmp_path):
    document = synthetic.evaluation(backbones=synthetic.BACKBONES[:1])
    task = document.tasks[0]
    cells = []
    for cell in document.cells:
        metrics = dict(cell.metrics)
        if cell.task == task.name:
            zero = synthetic.about(0.0, 0.0)
            metrics[task.primary] = metrics[task.primary].model_copy(
                update={"value": 0.0, "low": 0.0, "high": 0.0, "delta": zero}
            )
        cells.append(cell.model_copy(update={"metrics": metrics}))
    changed = document.model_copy(update={"cells": tuple(cells)})
    before, after = ({t.name: fronts(d, b, t, c) for b, t, c in pairs(d)} for d in (document, changed))
    assert len(before[task.name]) == 4
    assert [plot.name for plot in after[task.name]] == [
        plot.name for plot in before[task.name] if "agreement" in plot.name
    ]
    assert {name: len(plots) for name, plots in after.items() if name != task.name} == {
        name: len(plots) for name, plots in before.items() if name != task.name
    }
    path = tmp_path / "zero.html"
    write_report([changed], path)
    shown = words(read(path.read_text(encoding="utf-8")))
    assert shown.count("are 0 here, so they are not drawn") == 1
    assert "All scores of exact_match (remove_whitespace) are 0 here" in shown
    write_report([document], path)
    assert "are 0 here" not in words(read(path.read_text(encoding="utf-8")))


def test_colours():
    assert mixed("#000000", "#ffffff", 0.5) == "#808080"
    assert [step(8, 8, 16), step(12, 8, 16), step(16, 8, 16), step(3, 8, 16), step(5, 5, 5)] == [0, 4, 8, 0, 0]
    assert len(set(SENTINELS.values())) == len(LIGHT) == len(DARK)
