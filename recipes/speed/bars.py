"""The GPU engine's aims beside what ``dynamax bench`` measured: a table.

python recipes/speed/bars.py DIR [--shape mistral-7b]     reads DIR/SHAPE-PART.json, as gpu.sh leaves them
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import markdown, parser
from dynamax_llm.evaluation.bench.document import Bench, Row

#: By shape: tokens/s at full depth, under propagate, under defer with a window of 8; verify's speed-up; growth of the
#: time per token in the long case.
BARS = {"mistral-7b": (227, 390, 370, 1.6, 0.15), "codestral-mamba-7b": (210, 310, 340, 1.5, 0.05)}
PARTS = ("short", "default-head", "batch", "spread", "long", "exact")
Line = tuple[str, str, str, bool | None]


def parts(folder: Path, shape: str) -> dict[str, Bench]:
    """The documents there are, by part."""
    return {name: Bench.read(path) for name in PARTS if (path := folder / f"{shape}-{name}.json").exists()}


def lines(found: dict[str, Bench], shape: str) -> Iterator[Line]:
    """Every aim: what, how much, what was measured, whether that is enough (None: not measured)."""
    short: Callable[[Bench], Iterator[Line]] = lambda document: _short(document, shape)  # noqa: E731
    long: Callable[[Bench], Iterator[Line]] = lambda document: _long(document, found.get("short"), BARS[shape][4])  # noqa: E731
    for name, check in zip(PARTS, (short, _checks, _batch, _batch, long, _exact), strict=True):
        yield from check(found[name]) if name in found else [(name, "", "not measured", None)]


def _rows(document: Bench, kind: str, policy: str | None = None) -> list[Row]:
    """Rows of the fast engine, where it ran."""
    rows = [row for row in document.rows if row.kind == kind and policy in (None, row.policy)]
    return [row for row in rows if row.engine == "cuda"] or rows


def _short(document: Bench, shape: str) -> Iterator[Line]:
    full, propagate, defer, verify, _ = BARS[shape]
    rates = [("1. full depth", row, full) for row in _rows(document, "full")[:1]]
    rates += [(f"2. {row.label}", row, propagate) for row in _rows(document, "exit", "propagate")]
    rates += [(f"2. {row.label}", row, defer) for row in _rows(document, "exit", "defer") if row.window == 8]
    for what, row, least in rates:
        rate = row.tokens_per_second
        spread = f"{rate.median:.1f} [{rate.low:.1f}, {rate.high:.1f}] tokens/s"
        found = f"{spread}, {row.bandwidth_share:.3f} of copy bandwidth"
        yield what, f"{least} tokens/s", found, rate.median >= least
    for row in _rows(document, "exit", "verify"):
        assert row.speed_up is not None and row.acceptance is not None
        found = f"{row.speed_up.median:.3f}x ({row.acceptance:.1%} accepted)"
        yield f"3. {row.label}", f"{verify}x", found, row.speed_up.median >= verify
    for same in document.parity:
        if same.differing is not None:
            yield f"3. {same.of}, against {same.reference}: likeliest differs", "", f"{same.differing:.2%}", None
    yield from _checks(document)
    for row in _rows(document, "full")[:1]:
        yield "7. first token", "", f"{1e3 * row.first_token.median:.1f} ms", None
    slowest = max((row for row in document.rows if row.kind != "stock"), key=lambda row: row.building)
    yield f"7. building at most ({slowest.label})", "60 s", f"{slowest.building:.1f} s", slowest.building < 60


def _checks(document: Bench) -> Iterator[Line]:
    """Heads that are asked: on h alone in ``short``, on the default inputs in ``default-head`` and ``spread``."""
    for row in _rows(document, "checks"):
        speed = row.speed_up
        more, low, high = (1 / value - 1 for value in (speed.median, speed.high, speed.low))
        found = f"{more:+.2%} [{low:+.2%}, {high:+.2%}]"
        yield f"4. {row.label} ({row.estimator}, batch {row.batch})", "3 % more time", found, more <= 0.03


def _batch(document: Bench) -> Iterator[Line]:
    yield from _checks(document)
    for row in (row for row in document.rows if row.kind in ("exit", "spread") and row.speed_up is not None):
        gains, speed = row.together is None or row.together >= 0.5, row.speed_up.median
        aim, met = ("faster", speed > 1.0) if gains else ("0.95x", speed >= 0.95)
        yield f"5. batch {row.batch}, {row.label}", aim, f"{speed:.3f}x", met


def _long(document: Bench, short: Bench | None, growth: float) -> Iterator[Line]:
    for kind in ("full", "exit"):
        for row in _rows(document, kind)[:1]:
            for near in _rows(short, kind, row.policy)[:1] if short is not None else []:
                more = row.ms_per_token.median / near.ms_per_token.median - 1
                what = f"6. long, {row.label}: time per token against the short case"
                yield what, f"{growth:+.0%}", f"{more:+.1%}", more <= growth


def _exact(document: Bench) -> Iterator[Line]:
    for same in document.parity:
        if same.equal is not None:
            what = f"6. {same.model}, {same.dtype}, {same.of} against {same.reference}, {same.positions:,} tokens"
            yield what, "all equal", f"{same.equal:.2%} equal", same.equal == 1.0


def main() -> None:
    made = parser(__doc__)
    made.add_argument("folder", type=Path)
    made.add_argument("--shape", choices=BARS, default="mistral-7b")
    args = made.parse_args()
    found = parts(args.folder, args.shape)
    for name, document in found.items():
        cut = "" if document.complete else " (cut off)"
        print(f"{name}{cut}: `{document.run.command}`, {document.place.device_name}, {document.run.versions}\n")
    marks = {None: "", True: "met", False: "missed"}
    rows = [(what, aim, measured, marks[met]) for what, aim, measured, met in lines(found, args.shape)]
    print(markdown((args.shape, "bar", "measured", ""), rows))


if __name__ == "__main__":
    main()
