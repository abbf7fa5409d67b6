"""``dynamax calibrate``: thresholds that keep a promise, with the proof."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamax_llm.cli.options import Device, Dtype, Model, load_backbone, peek_backbone
from dynamax_llm.errors import UsageError

if TYPE_CHECKING:
    from dynamax_llm.exits.artifact import Exits
    from dynamax_llm.exits.promise import Promise

Data = Annotated[
    str,
    typer.Option(
        help="Text like that to come: a .jsonl, .jsonl.xz or .txt file, a folder of them, or a dataset id; "
        "for a risk, .jsonl with question (or a whole prompt) and answers.",
        metavar="PATH|ID",
    ),
]
ExitsIn = Annotated[
    str | None,
    typer.Option(
        "--exits",
        help="The folder that dynamax train wrote (or a hub id). Default: what ships with a shipped backbone.",
        metavar="DIR",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for the exits with the promise. Default: the folder of --exits; shipped need one."),
]


def calibrate(
    model: Model,
    data: Data,
    promise: Annotated[
        str, typer.Option(help=r"agreement>=0.98, consistency>=0.9, risk\[f1]<=0.02 or risk\[exact_match]<=0.02.")
    ],
    exits: ExitsIn = None,
    out: Out = None,
    confidence: Annotated[float, typer.Option(help="How sure to be, over draws of the prompts; not for crc.")] = 0.95,
    method: Annotated[
        str,
        typer.Option(
            help="ltt: learn then test, p-values by betting; ltt-hb: those of Hoeffding and Bentkus, larger; "
            "crc: conformal risk control, in expectation only.",
            metavar="NAME",
        ),
    ] = "ltt",
    policy: Annotated[
        str, typer.Option(help="State of skipped layers: propagate, copy, stale or defer.", metavar="NAME")
    ] = "propagate",
    window: Annotated[int, typer.Option(min=1, help="Tokens that may wait (defer).")] = 16,
    measure: Annotated[
        str | None, typer.Option(help="Judge by a confidence measure, not by the head.", metavar="NAME")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Documents drawn, one prompt each.")] = 500,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens read after a prompt (agreement), or generated.")] = 64,
    path_share: Annotated[float, typer.Option(help="Share of the prompts on which the path is learnt.")] = 0.2,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    text_field: Annotated[
        str | None, typer.Option(help="Field of a .jsonl or dataset record that holds the text.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Find the thresholds that save most and keep a promise, prove it, and record it with the exits."""
    from dynamax_llm.backbones import adapt
    from dynamax_llm.calibration.calibrate import CalibrationSettings, Request
    from dynamax_llm.calibration.calibrate import calibrate as prove
    from dynamax_llm.exits.artifact import MANIFEST, TENSORS
    from dynamax_llm.exits.files import prepare_folder
    from dynamax_llm.text.sources import find_source

    # Whatever can be wrong is found before the backbone is loaded, which may take minutes.
    settings = CalibrationSettings(prompts, prompt_tokens, new_tokens, path_share, batch, seed)
    asked = Request.of(promise, confidence, method, policy, window, measure)
    asked.check_count(prompts, settings, f"--prompts {prompts}")
    source = find_source(data, text_field)
    peek_backbone(model)
    found, target = _exits(model, exits, out)
    found.estimator(measure)
    prepare_folder(target, (MANIFEST, TENSORS))
    lm, tokenizer = load_backbone(model, dtype, device)
    with _Status() as status:
        proved = prove(
            adapt(lm),
            tokenizer,
            found,
            source,
            promise,
            confidence=confidence,
            policy=policy,
            window=window,
            measure=measure,
            method=method,
            settings=settings,
            on_test=status,
        )
    found.keep(proved).save(target)
    report(proved, found, model, target)


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
        raise UsageError(f"--out {str(out)!r} ships with DYNAMAX and is not changed. Give another folder.")
    return Exits.from_pretrained(name), folder if out is None else out.expanduser()


class _Status:
    """One line on stderr while tests are made; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._status = Console(stderr=True).status("learning the path of thresholds …")

    def __enter__(self) -> _Status:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def __call__(self, test: dict[str, Any]) -> None:
        self._status.update(f"λ {test['parameter']:.2f}: {test['estimate']:.4f} at depth {test['mean_depth']:.3f} …")


def report(promise: Promise, exits: Exits, model: str, out: Path) -> None:
    """Print the tests, what is promised and what is not, and the command that uses it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    what = "drop" if promise.measure.startswith("risk:") else promise.measure
    how = {"ltt": "learn then test, p-values by betting", "crc": "conformal risk control"}.get(
        promise.method, "learn then test, p-values of Hoeffding and Bentkus"
    )
    console.print(f"{promise.text}: tests from safe to risky on {promise.n} prompts ({how})", soft_wrap=True)
    table = Table()
    for column in ("λ", "mean depth", what, "p-value", "kept"):
        table.add_column(column, justify="right")
    for test in promise.evidence:
        p = "–" if test["p_value"] is None else f"{test['p_value']:.2g}"
        cells = (f"{test['parameter']:.2f}", f"{test['mean_depth']:.3f}", f"{test['estimate']:.4f}", p)
        table.add_row(*cells, "yes" if test["kept"] else "no")
    console.print(table)
    console.print(f"{promise.sentence()}.", soft_wrap=True)
    bars = ", ".join(
        f"{'never' if bar is None else f'{bar:.5f}'} after layer {layer}"
        for bar, layer in zip(promise.thresholds, exits.config.layers, strict=True)
    )
    score = promise.data.get("full_score")
    beside = "" if score is None else f", where the full model scores {score:.4f},"
    console.print(
        f"Seen on them: {promise.estimate:.4f}{beside} at a mean depth of {promise.mean_depth:.3f} of the layers; "
        f"thresholds {bars}.",
        soft_wrap=True,
    )
    weaker = (
        " It bounds an average over calibrations too: this one may lie above it." if promise.method == "crc" else ""
    )
    console.print(
        f"It says nothing about text of another kind, longer texts, another backbone or exits, or another state policy "
        f"than {promise.policy}, and it takes prompts to be independent draws from one source.{weaker}",
        soft_wrap=True,
    )
    console.print(f"Saved in {out}. Next:", soft_wrap=True)
    console.print(f'  dynamax generate {model} --exits {out} --prompt "…" --promise "{promise.text}"', soft_wrap=True)
