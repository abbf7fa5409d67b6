"""Pairs of times to figures, and figures to a verdict in words."""

from __future__ import annotations

import pytest

from dynamax_llm.evaluation.bench.exits import figures
from dynamax_llm.evaluation.bench.exits.document import ModeRow, Sample
from dynamax_llm.evaluation.bench.exits.verdict import verdict
from dynamax_llm.evaluation.common.timing import in_turns, paired


def test_turns_and_ratios_of_neighbours():
    order: list[str] = []

    def side(name: str, seconds: float):
        return lambda: order.append(name) or seconds

    assert in_turns(side("a", 1.0), side("b", 2.0), 0) == (1.0, 2.0)
    assert in_turns(side("a", 1.0), side("b", 2.0), 1) == (1.0, 2.0)
    assert order == ["a", "b", "b", "a"]
    seconds = iter([9.0, 9.0, 1.0, 2.0, 4.0, 2.0, 3.0, 4.0])
    found = paired(lambda: next(seconds), lambda: next(seconds), 3)
    assert (found.median, found.least, found.greatest) == (0.5, 0.5, 0.75)
    assert str(found) == "0.500 (0.500 to 0.750)"


def sample(ratios: tuple[float, ...], *, kind: str | None = None, equal: float = 1.0, **counts: object) -> Sample:
    """A batch of one prompt that plain generate takes a second for."""
    values = {"mean_depth": 0.5, "counted_reduction": 0.2, "pass_reduction": 0.4, **counts}
    different = None if equal == 1.0 else (7, 3)
    return Sample(
        prompts=(7,), kind=kind, prompt_tokens=4, new=10, seconds=tuple(1 / ratio for ratio in ratios),
        plain_seconds=(1.0,) * len(ratios), equal=equal, same=int(equal == 1.0), first_difference=different, **values,
    )  # fmt: skip


def row(label: str, speed: float, *, exact: bool = False, equal: float = 1.0, **counts: object) -> ModeRow:
    """A mode with a spread of a tenth around its speed."""
    samples = (sample((0.95 * speed, speed, 1.05 * speed), equal=equal, **counts),)
    facts = {"policy": label.split()[0] if label != "never exit" else "propagate", "engine": "eager", "batch": 1}
    mode = "never" if label == "never exit" else "threshold"
    return ModeRow(label=label, mode=mode, exact=exact, overall=figures.figures(samples), samples=samples, **facts)


def test_a_verdict_names_the_fastest_mode_and_whether_it_is_exact():
    never = row("never exit", 1.2, exact=True)
    fast, right = row("propagate at 0.8", 1.6, equal=0.7), row("verify at 0.9", 1.4, exact=True)
    said = verdict([never, fast, right], "float32")
    assert said[:3] == [
        "Fastest here: propagate at 0.8, 1.60x [1.52, 1.68] of plain generate, approximate: 70.0% of its tokens are "
        "plain generate's, 0 of 1 texts the same.",
        "Fastest exact mode: verify at 0.9, 1.40x [1.33, 1.47].",
        "Of this the engine alone, without any exit, makes 1.20x [1.14, 1.26].",
    ]
    assert said[3:] == [
        f"{label}: all 1 texts are plain generate's, token for token (float32)."
        for label in ("never exit", "verify at 0.9")
    ]
    assert verdict([right], "float32")[0] == "Fastest here: verify at 0.9, 1.40x [1.33, 1.47] of plain generate, exact."
    assert verdict([never, fast], "float32")[1] == "Fastest exact mode: never exit, 1.20x [1.14, 1.26]."
    slow = row("never exit", 0.99, exact=True)
    assert verdict([slow, fast], "float32")[1] == "No exact mode pays; the fastest: never exit, 0.99x [0.94, 1.04]."


def test_a_verdict_says_that_nothing_pays_and_what_to_leave_alone():
    """``verify`` at a threshold far too low: nearly every draft is wrong."""
    poor = row("verify at 0.1", 0.09, exact=True, verifications=10, checked=40, accepted=2)
    good = row("verify at 0.9", 0.5, exact=True, verifications=10, checked=40, accepted=38)
    said = verdict([row("never exit", 0.8, exact=True), poor, good], "float32")
    assert said[0] == (
        "None pays here, use plain generate: the fastest mode, never exit (exact), runs at 0.80x [0.76, 0.84] of it."
    )
    assert said[1] == (
        "Slower than plain generate: verify at 0.1 0.09x (5% of its drafts are right: raise its threshold), verify at "
        "0.9 0.50x (95% of its drafts are right), never exit 0.80x."
    )
    assert poor.overall.tokens_per_verification == 4.0 and poor.overall.acceptance == 0.05
    unclear = verdict([row("defer at 0.9", 1.01, equal=0.5)], "float32")
    assert len(unclear) == 1 and unclear[0].endswith("[0.96, 1.06] of it, which this measurement cannot tell apart.")
    engine = verdict([row("never exit", 3.0, exact=True), row("propagate at 0.9", 2.0, equal=0.9)], "bfloat16")
    assert engine[0] == (
        "No exit pays here: the fastest mode is never exit, 3.00x [2.85, 3.15] of plain generate, exact."
    )


def test_a_text_that_should_be_exact_and_is_not_is_named():
    other = row("verify at 0.9", 1.5, exact=True, equal=0.8)
    assert verdict([other], "float32")[-1] == (
        "verify at 0.9: 0 of 1 texts are plain generate's, they differ first at new token 3 of prompt 7 (float32: "
        "passes over several tokens round differently)."
    )
    assert "--dtype float32 tells" in verdict([other], "bfloat16")[-1]


def test_an_interval_is_over_batches_of_prompts():
    found = figures.speed([sample((1.0, 1.2, 5.0)), sample((2.0, 2.0, 2.0)), sample((1.4, 1.4, 0.1))])
    assert found.value == pytest.approx(1.4)  # of 1.2, 2.0 and 1.4
    assert (found.low, found.high) == (pytest.approx(1.2), pytest.approx(2.0))
    one = figures.speed([sample((1.0, 1.2, 5.0))])
    assert (one.value, one.low, one.high) == (pytest.approx(1.2), pytest.approx(1.0), pytest.approx(5.0))
