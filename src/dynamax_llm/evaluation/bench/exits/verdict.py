"""What a benchmark of exits comes to, in sentences: the fastest mode, whether exact or not, and what is slower."""

from __future__ import annotations

from collections.abc import Sequence

from dynamax_llm.evaluation.bench.exits.document import ModeRow

PLAIN = "plain generate"
#: Share of right drafts below which a higher threshold is what ``verify`` needs.
GOOD = 0.8


def verdict(rows: Sequence[ModeRow], dtype: str) -> list[str]:
    """One sentence or more per batch size, the most important first; ``dtype`` is the backbone's."""
    found = []
    for batch in sorted({row.batch for row in rows}):
        own = [row for row in rows if row.batch == batch]
        sentences = [*_fastest(own), *_slower(own), *(_texts(row, dtype) for row in own if row.exact)]
        several = len({row.batch for row in rows}) > 1
        found += [f"Batch {batch}: {sentence}" for sentence in sentences] if several else sentences
    return found


def pays(row: ModeRow) -> bool:
    """Whether it is faster than plain generate beyond the spread of the measurement."""
    return row.overall.ratio.low is not None and row.overall.ratio.low > 1.0


def _fastest(rows: Sequence[ModeRow]) -> list[str]:
    """Which mode to take, if any; for an approximate one, what exact modes do; and what is the engine's, not exits'."""
    best = max(rows, key=_speed)
    if not any(map(pays, rows)):
        apart = "" if _speed(best) < 1.0 else ", which this measurement cannot tell apart"
        fastest = f"the fastest mode, {best.label} ({_kind(best)}), runs at {times(best)} of it{apart}"
        return [f"None pays here, use {PLAIN}: {fastest}."]
    best = max(filter(pays, rows), key=_speed)
    if best.mode == "never":
        return [f"No exit pays here: the fastest mode is {best.label}, {times(best)} of {PLAIN}, exact."]
    sentences = [f"Fastest here: {best.label}, {times(best)} of {PLAIN}, {_kind(best)}."]
    exact = max((row for row in rows if row.exact), key=_speed, default=None)
    if exact is not None and not best.exact:
        does = "Fastest exact mode" if pays(exact) else "No exact mode pays; the fastest"
        sentences.append(f"{does}: {exact.label}, {times(exact)}.")
    full = next((row for row in rows if row.mode == "never" and pays(row) and row is not exact), None)
    if full is not None:
        sentences.append(f"Of this the engine alone, without any exit, makes {times(full)}.")
    return sentences


def _slower(rows: Sequence[ModeRow]) -> list[str]:
    """The modes that are slower than plain generate, and what their drafts say about the threshold."""
    slow = [row for row in rows if row.overall.ratio.high is not None and row.overall.ratio.high < 1.0]
    listed = [f"{row.label} {_speed(row):.2f}x{_drafts(row)}" for row in sorted(slow, key=_speed)]
    return [f"Slower than {PLAIN}: {', '.join(listed)}."] if listed else []


def _drafts(row: ModeRow) -> str:
    share = row.overall.acceptance
    if share is None:
        return ""
    return f" ({share:.0%} of its drafts are right{': raise its threshold' if share < GOOD else ''})"


def _texts(row: ModeRow, dtype: str) -> str:
    """Whether the text of a mode that should be exact is plain generate's."""
    figures, first = row.overall, row.first_difference
    if first is None:
        return f"{row.label}: all {figures.prompts} texts are {PLAIN}'s, token for token ({dtype})."
    place = f"first at new token {first[1]} of prompt {first[0]}"
    why = (
        "passes over several tokens round differently"
        if dtype == "float32"
        else f"{dtype} rounds differently in another order of operations; --dtype float32 tells"
    )
    return (
        f"{row.label}: {figures.same} of {figures.prompts} texts are {PLAIN}'s, they differ {place} ({dtype}: {why})."
    )


def _kind(row: ModeRow) -> str:
    figures = row.overall
    if row.exact:
        return "exact"
    same = f"{figures.equal:.1%} of its tokens are {PLAIN}'s, {figures.same} of {figures.prompts} texts the same"
    return f"approximate: {same}"


def times(row: ModeRow) -> str:
    """Speed over plain generate's with its interval: 1.35x [1.30, 1.41]."""
    value = row.overall.ratio
    ends = "" if value.low is None or value.high is None else f" [{value.low:.2f}, {value.high:.2f}]"
    return f"{value.value:.2f}x{ends}"


def _speed(row: ModeRow) -> float:
    return row.overall.ratio.value
