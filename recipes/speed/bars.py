"""The GPU engine's bars beside what ``dynamax bench`` measured: a table.

python recipes/speed/bars.py DIR [--shape mistral-7b]     reads DIR/SHAPE-PART.json, as gpu.sh leaves them
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from dynamax_llm.evaluation.bench.document import Bench, Row

#: By shape: tokens/s at full depth, under propagate, under defer with a window of 8; verify's speed-up; growth of the
#: time per token in the long case.
BARS = {"mistral-7b": (227, 390, 370, 1.6, 0.15), "codestral-mamba-7b": (210, 310, 340, 1.5, 0.05)}

Line = tuple[str, str, str, bool | None]


def parts(folder: Path, shape: str) -> dict[str, Bench]:
    """The documents there are, by part."""
    names = ("short", "default-head", "batch", "spread", "long", "exact")
    return {name: Bench.read(path) for name in names if (path := folder / f"{shape}-{name}.json").exists()}


def lines(found: dict[str, Bench], shape: str) -> Iterator[Line]:
    """Every bar: what is asked, what was measured, whether that is enough (None: not measured)."""
    full, propagate, defer, verify, growth = BARS[shape]
    checks = (
        ("short", _short),
        ("default-head", _checks),
        ("batch", _batch),
        ("spread", _batch),
        ("long", _long),
        ("exact", _exact),
    )
    for name, check in checks:
        if name not in found:
            yield name, "", "not measured", None
        elif check is _short:
            yield from _short(found[name], full, propagate, defer, verify)
        elif check is _long:
            yield from _long(found[name], found.get("short"), growth)
        else:
            yield from check(found[name])


def _rows(document: Bench, kind: str, policy: str | None = None) -> list[Row]:
    """Rows of the fast engine."""
    rows = [row for row in document.rows if row.kind == kind and (policy is None or row.policy == policy)]
    fast = [row for row in rows if row.engine == "cuda"]
    return fast or rows


def _short(document: Bench, full: float, propagate: float, defer: float, verify: float) -> Iterator[Line]:
    for row in _rows(document, "full")[:1]:
        yield _rate("1. full depth", row, full)
    for row in _rows(document, "exit", "propagate"):
        yield _rate(f"2. {row.label}", row, propagate)
    for row in _rows(document, "exit", "defer"):
        if row.window == 8:
            yield _rate(f"2. {row.label}", row, defer)
    for row in _rows(document, "exit", "verify"):
        assert row.speed_up is not None and row.acceptance is not None
        said = f"{row.speed_up.median:.3f}x ({row.acceptance:.1%} accepted)"
        yield f"3. {row.label}", f"{verify}x", said, row.speed_up.median >= verify
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
        assert row.speed_up is not None
        more = 1 / row.speed_up.median - 1
        low, high = (1 / end - 1 for end in (row.speed_up.high, row.speed_up.low))
        said = f"{more:+.2%} [{low:+.2%}, {high:+.2%}]"
        yield f"4. {row.label} ({row.estimator}, batch {row.batch})", "3 % more time", said, more <= 0.03


def _rate(what: str, row: Row, least: float) -> Line:
    rate = row.tokens_per_second
    said = f"{rate.median:.1f} [{rate.low:.1f}, {rate.high:.1f}] tokens/s, {row.bandwidth_share:.3f} of copy bandwidth"
    return what, f"{least} tokens/s", said, rate.median >= least


def _batch(document: Bench) -> Iterator[Line]:
    yield from _checks(document)
    for row in (row for row in document.rows if row.kind in ("exit", "spread") and row.speed_up is not None):
        assert row.speed_up is not None
        gains = row.together is None or row.together >= 0.5
        speed = row.speed_up.median
        kept = speed > 1.0 if gains else speed >= 0.95
        yield f"5. batch {row.batch}, {row.label}", "faster" if gains else "0.95x", f"{speed:.3f}x", kept


def _long(document: Bench, short: Bench | None, growth: float) -> Iterator[Line]:
    for kind in ("full", "exit"):
        for row in _rows(document, kind)[:1]:
            near = _rows(short, kind, row.policy)[:1] if short is not None else []
            if near:
                more = row.ms_per_token.median / near[0].ms_per_token.median - 1
                what = f"6. long, {row.label}: time per token against the short case"
                yield what, f"{growth:+.0%}", f"{more:+.1%}", more <= growth


def _exact(document: Bench) -> Iterator[Line]:
    for same in document.parity:
        if same.equal is not None:
            what = f"6. {same.model}, {same.dtype}, {same.of} against {same.reference}, {same.positions:,} tokens"
            yield what, "all equal", f"{same.equal:.2%} equal", same.equal == 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=BARS, default="mistral-7b")
    args = parser.parse_args()
    found = parts(args.folder, args.shape)
    for name, document in found.items():
        cut = "" if document.complete else " (cut off)"
        print(f"{name}{cut}: `{document.run.command}`, {document.place.device_name}, {document.run.versions}\n")
    print(f"| {args.shape} | bar | measured | |\n|---|---|---|---|")
    for what, bar, said, kept in lines(found, args.shape):
        print(f"| {what} | {bar} | {said} | {'' if kept is None else 'met' if kept else 'missed'} |")


if __name__ == "__main__":
    main()
