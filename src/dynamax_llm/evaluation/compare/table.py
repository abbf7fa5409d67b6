"""Comparisons as a Markdown table: the same rows on a terminal, in a README and in a recorded result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dynamax_llm.backbones import Costs
from dynamax_llm.evaluation.compare.heads import Comparison, at_agreement
from dynamax_llm.evaluation.compare.shapes import projected

#: ConfidenceEstimator, first look and later look of one check in µs, by candidate name and inputs.
Times = Mapping[tuple[str, str], tuple[float, float, float]]

HEADER = (
    "estimator",
    "sees",
    "AUROC per exit",
    "mean depth",
    "counted reduction",
    "parameters",
    "check, kMAC",
    "look, kMAC (first, later)",
    "check, µs",
    "look, µs (first, later)",
)


def comparison_table(
    results: Sequence[Comparison], costs: Costs, times: Times | None = None, scale: str | None = None
) -> str:
    """Rows sorted by mean depth at the target agreement; ``times`` adds what a check takes on one machine, ``scale``
    the counted reduction that the same exits would have on a large shape (see ``shapes``).

    A layer's kMAC stands in the last line, to compare with.
    """
    header = (*(HEADER if times else HEADER[:-2]), *((f"at {scale} shape",) if scale else ()))
    rows = [_row(item, times, scale) for item in sorted(results, key=lambda item: item.depth)]
    lines = [" | ".join(header), " | ".join("---" for _ in header), *(" | ".join(row) for row in rows)]
    layer, readout = costs.layers[0].layer / 1e3, costs.readout / 1e3
    note = (
        f"One layer: {layer:,.0f} kMAC; its state update: {costs.layers[0].state / 1e3:,.0f}; LM head: {readout:,.0f}."
    )
    return "\n".join([*(f"| {line} |" for line in lines), "", note])


def _row(item: Comparison, times: Times | None, scale: str | None) -> tuple[str, ...]:
    ranks = " ".join("–" if value is None else f"{value:.3f}" for value in item.auroc)
    measured: tuple[str, ...] = ()
    if times:
        check, first, later = times[item.candidate.name, item.candidate.inputs]
        measured = (f"{check:.0f}", f"{first:.0f}, {later:.0f}")
    return (
        item.candidate.name,
        item.candidate.inputs or "–",
        ranks,
        f"{item.depth:.3f}",
        f"{100 * item.counted_reduction:.1f} %",
        f"{item.parameters:,}",
        f"{item.check_macs / 1e3:.1f}",
        ", ".join(f"{macs / 1e3:,.0f}" for macs in item.read_macs),
        *measured,
        *((f"{100 * _scaled(item, scale):.1f} %",) if scale else ()),
    )


def _scaled(item: Comparison, scale: str) -> float:
    """Counted reduction at the target agreement if these exits sat on the named shape."""
    return at_agreement(projected(scale, item.candidate, item.points), item.target, "counted_reduction")
