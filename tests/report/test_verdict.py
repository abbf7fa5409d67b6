"""What the report concludes follows from the numbers, and says no more than they do."""

from __future__ import annotations

import pytest

from dynamax_llm.evaluation.harness.results import Evaluation, Interval, Metric
from dynamax_llm.report.verdict import sentences, verdicts
from tests.report import synthetic


def with_cells(**changes: object) -> Evaluation:
    """One backbone whose only settings are the full model and one head, its cells changed."""
    document = synthetic.evaluation(backbones=synthetic.BACKBONES[:1])
    kept = [item for item in document.cells if item.setting in ("full", "mamba@0.8")]
    cells = tuple(item if item.setting == "full" else item.model_copy(update=changes) for item in kept)
    return document.model_copy(update={"cells": cells})


def clock(low: float, high: float) -> Interval:
    return Interval(value=(low + high) / 2, low=low, high=high)


def test_the_best_close_setting_is_found():
    document = synthetic.evaluation()
    for found in verdicts(document):
        lowest = {}
        saved = {}
        for cell in document.cells:
            if cell.backbone == found.backbone.name and "@" in cell.setting and not cell.setting.startswith("static"):
                lowest[cell.setting] = min(lowest.get(cell.setting, 1.0), cell.agreement.value)
                saved[cell.setting] = saved.get(cell.setting, 0.0) + cell.counted_reduction.value / 3
        close = [name for name in lowest if lowest[name] >= 0.98]
        best = max(close, key=lambda name: saved[name])
        assert not found.pays and found.rivals == len(close) - 1
        assert found.setting.id == best
        assert found.agreement == pytest.approx(lowest[best])
        assert found.reduction == pytest.approx(saved[best])
        assert (found.tasks, found.timed) == (3, 2)


def test_without_a_close_setting_the_nearest_is_named():
    (found,) = verdicts(with_cells(agreement=Interval(value=0.91)))
    assert not found.close and found.agreement == 0.91
    assert "no setting keeps an agreement of 0.98" in sentences(found)[0] and "0.910" in sentences(found)[0]


@pytest.mark.parametrize(
    ("speed_up", "said"),
    [
        (clock(1.05, 1.2), "It pays: faster on 3 of 3 timed tasks, slower on none."),
        (clock(0.8, 0.9), "Slower on 3 of 3 timed tasks: it does not pay here."),
        (clock(0.95, 1.1), "No task shows a difference in time beyond chance: it does not pay here."),
        (None, "nothing was timed"),
    ],
)
def test_the_clock_decides_whether_it_pays(speed_up, said):
    (found,) = verdicts(with_cells(agreement=Interval(value=0.99), speed_up=speed_up))
    text = " ".join(sentences(found))
    assert said in text and "fewer multiply-accumulates" in text
    assert found.pays == (said.startswith("It pays"))


def test_a_setting_that_pays_comes_before_one_that_saves_more():
    document = synthetic.evaluation(backbones=synthetic.BACKBONES[:1])
    cells = [item.model_copy(update={"agreement": Interval(value=0.99)}) for item in document.cells]
    slow, fast = {"speed_up": clock(0.8, 0.9)}, {"speed_up": clock(1.1, 1.2)}
    changed = [item.model_copy(update=fast if item.setting == "linear@0.95" else slow) for item in cells]
    (found,) = verdicts(document.model_copy(update={"cells": tuple(changed)}))
    assert found.setting.id == "linear@0.95" and found.speed_up == pytest.approx(1.15)
    assert "the fastest setting that pays" in sentences(found)[0]
    (found,) = verdicts(document.model_copy(update={"cells": tuple(item.model_copy(update=slow) for item in cells)}))
    assert found.setting.id == "mamba@0.5" and "nor do the 19 other timed settings" in sentences(found)[1]


def test_one_task_shows_its_interval():
    document = with_cells(agreement=Interval(value=0.99), speed_up=clock(0.9, 0.98))
    (found,) = verdicts(document.model_copy(update={"cells": document.cells[3:4]}))
    assert (found.tasks, found.speed_ups) == (1, (0.9, 0.98))
    assert "Slower on the timed task: it does not pay here." in sentences(found)[1]


def test_a_loss_of_agreement_never_pays():
    (found,) = verdicts(with_cells(agreement=Interval(value=0.9), speed_up=clock(1.3, 1.5)))
    assert not found.pays and "at an agreement below the mark" in sentences(found)[1]


def test_counting_more_is_said_so():
    (found,) = verdicts(with_cells(agreement=Interval(value=0.99), counted_reduction=Interval(value=-0.05)))
    assert "5.0\u00a0% more multiply-accumulates" in sentences(found)[1] and not found.pays


def test_a_fall_in_quality_is_named():
    task = synthetic.TASKS[0]
    worse = Metric(value=0.1, low=None, high=None, delta=clock(-0.2, -0.1))
    (found,) = verdicts(with_cells(metrics={task.primary: worse}))
    assert found.worse == (task.name,) and "falls on triviaqa" in sentences(found)[-1]


def test_no_agreement_no_verdict():
    assert verdicts(synthetic.single()) == []
