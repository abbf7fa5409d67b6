"""What ``dynamax bench`` prints: of settings on random tokens, and of saved exits on prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamax_llm.cli.tables import Terminal

if TYPE_CHECKING:
    from dynamax_llm.evaluation.bench import Bench
    from dynamax_llm.evaluation.bench.document import Row, Spread
    from dynamax_llm.evaluation.bench.exits.document import ExitBench, Figures
    from dynamax_llm.evaluation.common.documents import Interval

#: Columns of a terminal from which on times carry their ranges.
WIDE = 120


def show_bench(found: Bench) -> None:
    """Times, then what engines say, then what is missing."""
    terminal = Terminal()
    place, load = found.place, found.load
    heading = (
        f"{found.backbone.name}, {place.device_name}, {place.dtype}, {load.prompt}-token prompt, {load.new} new "
        f"tokens, {load.repeats} repeats; a copy moves {place.copy_bandwidth / 1e9:,.0f} GB/s"
    )
    wide = terminal.width >= WIDE
    columns: tuple[str, ...] = ("setting · engine", "ms/token", "tokens/s", "x full", "bandwidth")
    columns += ("first token", "building") if wide else ()
    for batch in sorted({row.batch for row in found.rows}):
        rows = [_cells(row, wide)[: len(columns)] for row in found.rows if row.batch == batch]
        terminal.write_table(f"{heading}, batch {batch}", columns, rows)
    same = [
        (
            f"{item.of}, against {item.reference}"
            + ("" if item.model == found.backbone.name else f" ({item.model}, {item.dtype})"),
            str(item.batch),
            f"{item.positions:,}",
            "–" if item.differing is None else f"{item.differing:.2%}",
            "–" if item.equal is None else f"{item.equal:.1%}",
        )
        for item in found.parity
    ]
    terminal.write_table("Same tokens?", ("of, against", "batch", "tokens", "likeliest differs", "equal"), same)
    for lack in found.missing:
        terminal.write_line(f"Not measured, batch {lack.batch}: {lack.label}: {lack.reason}.")
    terminal.write_line(
        "ms/token: median of one row's time per token after the first [least, greatest]. x full: wall clock against "
        "full depth of the same engine in the same turns. Bandwidth: counted bytes of weights over time, as a share of "
        "the copy's. Building: what the first call took longer than later ones. Likeliest differs: given the same text "
        "so far; equal: in free generation, where one difference changes all that follows.",
    )


def _cells(row: Row, wide: bool) -> tuple[str, ...]:
    return (
        f"{row.label} · {row.engine}",
        _range(row.ms_per_token, 3) if wide else f"{row.ms_per_token.median:.3f}",
        f"{row.tokens_per_second.median:.1f}",
        "–" if row.speed_up is None else f"{row.speed_up.median:.3f}",
        f"{row.bandwidth_share:.2f}",
        f"{1e3 * row.first_token.median:.1f} ms",
        f"{row.building:.1f} s",
    )


def _range(value: Spread, digits: int) -> str:
    return f"{value.median:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def show_exits(found: ExitBench) -> None:
    """The verdict, then per batch size time and counts of every mode, its speed by kind of prompt, and what is left."""
    terminal, load = Terminal(), found.load
    for sentence in found.verdict:
        terminal.write_line(sentence)
    work = f"{load.prompts} prompts{', chat template' if load.chat else ''}, {load.new} new tokens at most, " + (
        f"{load.repeats} repeats"
    )
    terminal.write_line(f"\n{found.backbone.name}, {found.place.dtype}, {work}\n{found.run.hardware}")
    columns = ("mode", "tok/s", "x plain", "from-to", "depth", "/check", "same", "counted")
    for plain in found.plain:
        rows = [row for row in found.rows if row.batch == plain.batch]
        rate = f"{plain.tokens_per_second['all']:.1f}"
        cells: list[tuple[str, ...]] = [("plain generate", rate, "1.00", "–", "1.000", "–", "100.0%", "0%")]
        cells += [(row.label, *_figures(row.overall)) for row in rows]
        terminal.write_table(f"batch {plain.batch}", columns, cells)
        by_kind = [
            (row.label, *(" ".join(_ratio(row.kinds[kind].ratio)) for kind in load.kinds)) for row in rows if row.kinds
        ]
        counts = [f"{kind} ({count})" for kind, count in load.kinds.items()]
        terminal.write_table("x plain by kind of prompt", ("mode", *counts), by_kind)
    for mode in found.left_out:
        batch = "" if mode.batch is None else f", batch {mode.batch}"
        terminal.write_line(f"Left out{batch}: {mode.label}: {mode.reason}.")
    terminal.write_line(
        "tok/s: new tokens over whole generate calls. x plain: speed over plain generate's just before or after, "
        "median over prompts; from-to: its 95 % bootstrap interval, for one batch of prompts least and greatest. never "
        "exit: the engine at full depth. Depth: share of the layers until a token is decided. /check: tokens that a "
        "verification decides. Same: new tokens that are plain generate's, place by place. Counted: "
        "multiply-accumulates not spent, which is no speed-up."
    )


def _figures(figures: Figures) -> tuple[str, ...]:
    decided = figures.tokens_per_verification
    return (
        f"{figures.tokens_per_second:.1f}",
        *_ratio(figures.ratio),
        f"{figures.mean_depth:.3f}",
        "–" if decided is None else f"{decided:.1f}",
        f"{figures.equal:.1%}",
        f"{figures.counted_reduction:.0%}",
    )


def _ratio(value: Interval) -> tuple[str, str]:
    """The ratio, and the ends of its interval."""
    ends = "–" if value.low is None or value.high is None else f"{value.low:.2f}-{value.high:.2f}"
    return f"{value.value:.2f}", ends
