"""``dynamax calibrate``: thresholds that keep a promise, with the proof."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamax_llm.calibration.settings import CalibrationSettings, PromiseSettings
from dynamax_llm.cli import options as opt
from dynamax_llm.cli.backbone import load_backbone, no_empty_folder, peek_backbone, text_of
from dynamax_llm.cli.deciding import ExitsFolder, check_exits, note_unused_window
from dynamax_llm.errors import UsageError

if TYPE_CHECKING:
    from dynamax_llm.exits.artifact import Exits
    from dynamax_llm.exits.promise import Promise


Data = Annotated[
    str | None,
    typer.Option(
        help="Text like that to come: a .jsonl, .jsonl.xz or .txt file, a folder of them, or a dataset id; for a risk, "
        ".jsonl with question (or a whole prompt) and answers; with --chat, and for a draft, prompts. A draft needs "
        "none.",
        metavar="PATH|ID",
    ),
]
PromiseText = Annotated[
    str | None,
    typer.Option(
        help=r"agreement>=0.98, consistency>=0.9, risk\[f1]<=0.02 or risk\[exact_match]<=0.02. Without: of a draft, "
        "measure its costs here and choose threshold and window."
    ),
]


@opt.verb(place=opt.PLACE, proof=opt.Fields(PromiseSettings), settings=opt.Fields(CalibrationSettings))
def calibrate(
    *,
    model: opt.Model,
    data: Data = None,
    promise: PromiseText = None,
    exits: ExitsFolder = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the exits with the promise. Default: the folder of --exits; shipped need one."),
    ] = None,
    proof: opt.Given,
    settings: opt.Given,
    text_field: opt.TextField = None,
    place: opt.Given,
) -> None:
    """Find the thresholds that save most and keep a promise, prove it, and record it with the exits.

    Exits that are a draft need no promise: what their chains cost on this machine decides threshold and window.
    """
    draws = CalibrationSettings(**settings)
    note_unused_window(proof)
    check_exits(exits, None, None)
    if promise is None:
        _draft(model, exits, out, data, draws, settings, place)
        return
    if data is None:
        raise UsageError(f"the promise {promise!r} is proved on text: give `data`.")

    from rich.console import Console

    from dynamax_llm.backbones import adapt
    from dynamax_llm.calibration.calibrate import Request
    from dynamax_llm.calibration.calibrate import calibrate as prove
    from dynamax_llm.exits.artifact import MANIFEST, TENSORS
    from dynamax_llm.exits.files import prepare_folder

    how = PromiseSettings(**proof)
    request = Request.of(promise, how.confidence, how.method, how.policy, how.window, how.measure)
    request.check_count(draws.prompts, draws, f"prompts = {draws.prompts}")
    source = text_of(data, text_field)
    peek_backbone(model)
    found, target = _exits(model, exits, out)
    found.estimator(how.measure)
    with no_empty_folder(target):
        prepare_folder(target, (MANIFEST, TENSORS))
        lm, tokenizer = load_backbone(model, place)
        # One line on stderr while tests are made; nothing where stderr is not a terminal.
        with Console(stderr=True).status("learning the path of thresholds …") as status:

            def on_test(test: dict[str, Any]) -> None:
                at = f"λ {test['parameter']:.2f}: {test['estimate']:.4f} at depth {test['mean_depth']:.3f} …"
                status.update(at)

            arguments = {**vars(how), "settings": draws, "on_test": on_test}
            proved = prove(adapt(lm), tokenizer, found, source, promise, **arguments)
        found.keep(proved).save(target)
    report(proved, found, model, target)


def _draft(
    model: str,
    exits: str | None,
    out: Path | None,
    data: str | None,
    draws: CalibrationSettings,
    settings: opt.Given,
    place: opt.Given,
) -> None:
    """Calibrate a draft. Raises UsageError for other exits, which need a promise."""
    from dynamax_llm.cli.drafted import calibrate_draft
    from dynamax_llm.decoding.draft_choice import drafts

    peek_backbone(model)
    found, target = _exits(model, exits, out)
    if not drafts(found):
        raise UsageError(
            f"exits with the readout {found.config.readout!r} are calibrated for a promise: give `promise`, "
            "agreement>=0.98 for instance. Only a draft needs none."
        )
    calibrate_draft(model, found, target, data, draws, settings.get("batch", 1), place)


def _exits(model: str, exits: str | None, out: Path | None) -> tuple[Exits, Path]:
    """The exits to calibrate and the folder for them. Raises UsageError where that would be a shipped folder."""
    from dynamax_llm.backbones.loading import REFERENCE_FOLDER, shipped_exits
    from dynamax_llm.exits.artifact import Exits

    name = exits if exits is not None else model
    if exits is None and shipped_exits(model) is None:
        raise UsageError(f"no exits for {model!r}. Give --exits DIR, the folder that dynamax train wrote.")
    folder = Path(name).expanduser()
    shipped = shipped_exits(name) is not None or folder.resolve().is_relative_to(REFERENCE_FOLDER.resolve())
    if out is None and (shipped or not folder.is_dir()):
        what = "ship with DYNAMAX" if shipped else "are no folder here"
        raise UsageError(f"exits {name!r} {what} and are not changed. Give --out DIR for a copy with the promise.")
    if out is not None and out.expanduser().resolve().is_relative_to(REFERENCE_FOLDER.resolve()):
        raise UsageError(f"`out` {str(out)!r} ships with DYNAMAX and is not changed. Give another folder.")
    return Exits.from_pretrained(name), folder if out is None else out.expanduser()


def report(promise: Promise, exits: Exits, model: str, out: Path) -> None:
    """Print the tests, what is promised and what is not, and the command that uses it."""
    from dynamax_llm.cli.tables import Terminal

    terminal = Terminal()
    what = "drop" if promise.measure.startswith("risk:") else promise.measure
    how = {"ltt": "learn then test, p-values by betting", "crc": "conformal risk control"}.get(
        promise.method, "learn then test, p-values of Hoeffding and Bentkus"
    )
    terminal.write_line(f"{promise.text}: tests from safe to risky on {promise.n} prompts ({how})")
    rows = [
        (
            f"{test['parameter']:.2f}",
            f"{test['mean_depth']:.3f}",
            f"{test['estimate']:.4f}",
            "–" if test["p_value"] is None else f"{test['p_value']:.2g}",
            "yes" if test["kept"] else "no",
        )
        for test in promise.evidence
    ]
    terminal.write_table("", ("λ", "mean depth", what, "p-value", "kept"), rows)
    terminal.write_line(f"{promise.sentence()}.")
    thresholds = ", ".join(
        f"{'never' if value is None else f'{value:.5f}'} after layer {layer}"
        for value, layer in zip(promise.thresholds, exits.config.layers, strict=True)
    )
    score = promise.data.get("full_score")
    beside = "" if score is None else f", where the full model scores {score:.4f},"
    terminal.write_line(
        f"Seen on them: {promise.estimate:.4f}{beside} at a mean depth of {promise.mean_depth:.3f} of the layers; "
        f"thresholds {thresholds}.",
    )
    weaker = (
        " It bounds an average over calibrations too: this one may lie above it." if promise.method == "crc" else ""
    )
    terminal.write_line(
        f"It says nothing about text of another kind, longer texts, another backbone or exits, or another state policy "
        f"than {promise.policy}, and it takes prompts to be independent draws from one source.{weaker}",
    )
    terminal.write_line(f"Saved in {out}. Next:")
    terminal.write_line(f'  dynamax generate {model} --exits {out} --prompt "…" --promise "{promise.text}"')
