"""Which texts a report shows: of every prompt and family the least deep setting that stays close."""

from __future__ import annotations

from dynamax_llm.evaluation.harness.results import Example
from dynamax_llm.report.page import page
from dynamax_llm.report.select import chosen
from tests.report import synthetic


def examples(setting_ids, prompts=("one", "two")) -> list[Example]:
    backbone, task = synthetic.BACKBONES[0], synthetic.TASKS[0]
    return [
        Example(backbone=backbone.name, setting=name, task=task.name, prompt=text, tokens=(), full_text="t")
        for text in prompts
        for name in setting_ids
    ]


def family(document, name):
    backbone, task = synthetic.BACKBONES[0], synthetic.TASKS[0]
    return {
        setting.id: next(
            cell
            for cell in document.cells
            if (cell.backbone, cell.setting, cell.task) == (backbone.name, setting.id, task.name)
        )
        for setting in document.settings[backbone.name]
        if setting.family == name and setting.kind == "head"
    }


def test_one_text_per_prompt_and_family_the_least_deep_that_is_close():
    document = synthetic.evaluation()
    cells = family(document, "mamba")
    assert len(cells) > 2
    found = chosen(document, examples(cells))
    close = {name: cell for name, cell in cells.items() if cell.agreement.value >= 0.98}
    wanted = min(close, key=lambda name: close[name].mean_depth.value)
    assert [(item.prompt, item.setting) for item in found] == [("one", wanted), ("two", wanted)]


def test_without_a_close_setting_the_closest_is_shown():
    document = synthetic.evaluation()
    far = {name: cell for name, cell in family(document, "mamba").items() if cell.agreement.value < 0.98}
    assert len(far) > 1
    found = chosen(document, examples(far, ("one",)))
    assert [item.setting for item in found] == [max(far, key=lambda name: far[name].agreement.value)]


def test_the_page_says_how_many_are_left_out():
    document = synthetic.evaluation()
    every = examples(family(document, "mamba"))
    cells = tuple(family(document, "mamba").values())
    changes = {"cells": cells, "reliability": (), "promises": {}, "examples": tuple(every)}
    with_cells = document.model_copy(update=changes)
    plots: list[object] = []
    assert f"{len(every) - 2} texts of other settings" in page(with_cells, plots.append)
    one = with_cells.model_copy(update={"examples": tuple(every[:1])})
    assert "other settings" not in page(one, plots.append)
