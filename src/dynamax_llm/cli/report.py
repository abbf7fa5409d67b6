"""``dynamax report``: evaluations as one page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynamax_llm.cli import options as opt


@opt.verb()
def report(
    evaluations: Annotated[
        list[Path],
        typer.Argument(metavar="EVAL…", help="Folders that dynamax eval or dynamax paper wrote, or their eval.json."),
    ],
    out: Annotated[Path, typer.Option(help="The HTML file to write.", metavar="FILE")] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(help="Write every plot here too, as SVG and PNG for papers.", metavar="DIR")
    ] = None,
) -> None:
    """Make one self-contained HTML page of one or more evaluations."""
    from dynamax_llm.evaluation.harness.results import Evaluation
    from dynamax_llm.report import check_targets, write_report

    check_targets(out, figures)
    written = write_report([Evaluation.read(path) for path in evaluations], out, figures)
    size = out.expanduser().stat().st_size / 1e6
    typer.echo(
        f"{out}: {size:.2f} MB, self-contained" + (f"; {len(written) - 1} figures in {figures}" if figures else "")
    )
