"""``dynamax eval``: quality, consistency, depth, cost and time of exits, on lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamax_llm.cli import options as opt
from dynamax_llm.cli.backbone import command_line, load_backbone, peek_backbone
from dynamax_llm.cli.deciding import MeasureLayers, check_exits, note_unused_window, saved_exits
from dynamax_llm.decoding.thresholds import Thresholds
from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.harness.plan import EvalSettings, Plan
from dynamax_llm.settings import DecodeSettings

if TYPE_CHECKING:
    from dynamax_llm.evaluation.harness.settings import Subject, Variant
    from dynamax_llm.evaluation.harness.tasks import Chat
    from dynamax_llm.exits.artifact import Exits


@opt.verb(
    place=opt.PLACE,
    resumes=True,
    settings=opt.Fields(EvalSettings),
    decode=opt.Fields(DecodeSettings, "policy", "window", "promise", "engine"),
    how=opt.Fields(Plan),
)
def evaluate(
    *,
    model: opt.Model,
    out: Annotated[Path, typer.Option(help="Folder for eval.json and records; a killed run goes on where it stopped.")],
    exits: Annotated[
        list[str] | None,
        typer.Option(
            help="A folder that dynamax train wrote, a hub id, or a shipped backbone's name; may be given more than "
            "once, to compare heads. Default: what ships with a shipped backbone.",
            metavar="DIR",
        ),
    ] = None,
    exit_layers: MeasureLayers = None,
    settings: opt.Given,
    decode: opt.Given,
    how: opt.Given,
    place: opt.Given,
    as_json: opt.AsJson = False,
) -> None:
    """Evaluate exits on tasks of lm-evaluation-harness, beside the full model and baselines."""
    once = {name: tuple(dict.fromkeys(value)) for name, value in settings.items() if isinstance(value, tuple)}
    what, plan = EvalSettings(**{**settings, **once}), Plan(**how)
    for value in what.thresholds:
        Thresholds.parse(value, 1)
    for folder in exits or (None,):
        check_exits(folder, exit_layers, what.measures)
    note_unused_window(decode)
    peek_backbone(model)

    from dynamax_llm.cli.tables import Bar, show_evaluation
    from dynamax_llm.evaluation.harness.combine import add_to
    from dynamax_llm.evaluation.harness.evaluate import evaluate as run
    from dynamax_llm.evaluation.harness.settings import Subject, by_promise
    from dynamax_llm.evaluation.harness.tasks import load_tasks

    # Whatever can be wrong is found before the backbone is loaded and the first document is run.
    trained = _trained(model, exits or (), exit_layers, what.measures)
    promised = _promised(trained, decode.get("promise"))
    sizes: opt.Given = {name: getattr(what, name) for name in ("data_dir", "shots", "limit", "max_new_tokens")}
    loaded = load_tasks(what.tasks, seed=plan.seed, chat=_chat(model, what), **sizes)
    lm, tokenizer = load_backbone(model, place)
    subject = Subject(Path(model).name, lm, tokenizer)
    variants = _variants(subject, trained, exit_layers, what, decode)
    variants += [by_promise(subject, exits, text).on(decode.get("engine")) for exits, text in promised]
    with Bar() as bar:
        found = run(subject, variants, loaded, plan, out, command=command_line("eval"), on_progress=bar.show)
    kept = {subject.name: tuple(item.to_json() for exits in trained.values() for item in exits.promises)}
    found = add_to(out, found.model_copy(update={"promises": kept}))
    typer.echo(found.model_dump_json(indent=1)) if as_json else show_evaluation(found, out)


def _chat(model: str, what: EvalSettings) -> Chat | None:
    """What frames prompts as conversations, if asked for. Raises UsageError for a tokenizer without a template."""
    from dynamax_llm.backbones.loading import load_tokenizer
    from dynamax_llm.evaluation.harness.tasks import Chat
    from dynamax_llm.text.prompts import has_template

    if not what.chat:
        return None
    tokenizer = load_tokenizer(model)
    if not has_template(tokenizer):
        raise UsageError(f"the tokenizer of {model!r} has no chat template: leave out `chat`.")
    return Chat(tokenizer, what.system)


def _trained(
    model: str, folders: Sequence[str], exit_layers: str | None, measures: Sequence[str] | None
) -> dict[str, Exits]:
    """Trained exits by the name of their family; none where measures decide at layers."""
    from dynamax_llm.exits.artifact import Exits

    if not folders:
        saved = saved_exits(model, None, exit_layers, measures)
        return {} if saved is None else {_family(saved): saved}
    found: dict[str, Exits] = {}
    for folder in folders:
        loaded = Exits.from_pretrained(folder)
        name = _family(loaded)
        found[f"{name} ({Path(folder).name})" if name in found else name] = loaded
    return found


def _promised(trained: dict[str, Exits], promise: str | None) -> list[tuple[Exits, str]]:
    """The exits that keep this promise, with its text. Raises UsageError without trained exits, PromiseError."""
    from dynamax_llm.errors import PromiseError

    if promise is None:
        return []
    if not trained:
        raise UsageError(f"promise {promise!r} belongs to exits. Give the folder dynamax calibrate wrote: --exits DIR.")
    kept, problems = [], []
    for exits in trained.values():
        try:
            kept.append((exits, exits.promise(promise).text))
        except PromiseError as error:
            problems.append(error)
    if not kept:
        raise problems[0]
    return kept


def _family(exits: Exits) -> str:
    return f"{exits.config.head} head"


def _variants(
    subject: Subject, trained: dict[str, Exits], exit_layers: str | None, what: EvalSettings, decode: opt.Given
) -> list[Variant]:
    from dynamax_llm.evaluation.harness.settings import grid
    from dynamax_llm.exits.artifact import Exits

    heads = {name: exits for name, exits in trained.items() if exits.heads is not None}
    at = Exits.untrained(subject.backbone, exit_layers) if exit_layers else next(iter(trained.values()), None)
    how = {name: value for name, value in decode.items() if name != "promise"}
    chosen: opt.Given = {"measures": what.compared_measures, "at": at, "baselines": what.baselines}
    return grid(subject, heads, what.thresholds, **chosen, **how)
