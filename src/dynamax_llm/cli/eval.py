"""``dynamax eval``: quality, consistency, depth, cost and time of exits, on lm-evaluation-harness."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamax_llm.cli.deciding import Policy, Promised, Window, saved_exits
from dynamax_llm.cli.evaluated import Bar, Batch, DataDir, Limit, NewTokens, Timed, show
from dynamax_llm.cli.options import Device, Dtype, Model, load_backbone, peek_backbone
from dynamax_llm.errors import UsageError

if TYPE_CHECKING:
    from dynamax_llm.evaluation.harness.settings import Subject, Variant
    from dynamax_llm.exits.artifact import Exits

#: Layers or shares of the depth, where a folder of exits could stand.
_PLACES = re.compile(r"[\d./, ]+")
_DEFAULT_TASKS = "triviaqa,coqa,truthfulqa_gen"


def evaluate(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for eval.json and records; a killed run goes on where it stopped.")],
    exits: Annotated[
        list[str] | None,
        typer.Option(
            help="A folder that dynamax train wrote (or a hub id); may be given more than once, to compare heads. With "
            "--measure also layers (8,12) or shares (1/2,3/4). Default: what ships with a shipped backbone.",
            metavar="DIR|LAYERS",
        ),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma list: triviaqa, coqa, truthfulqa_gen, truthfulqa_mc1, truthfulqa_mc2; online also every other "
            "single task of lm-evaluation-harness."
        ),
    ] = _DEFAULT_TASKS,
    threshold: Annotated[str, typer.Option(help="Comma list of settings, each for all exits: 0.8,0.9,never.")] = "0.9",
    measure: Annotated[
        str | None,
        typer.Option(
            help="Comma list of confidence measures to evaluate beside the heads; default with --baselines: "
            "softmax_margin.",
            metavar="NAMES",
        ),
    ] = None,
    policy: Policy = None,
    window: Window = None,
    promise: Promised = None,
    baselines: Annotated[
        bool,
        typer.Option("--baselines/--no-baselines", help="Margin rule, static depth at every exit, pruned layers."),
    ] = True,
    limit: Limit = 32,
    batch: Batch = 16,
    timed: Timed = 4,
    shots: Annotated[
        int | None, typer.Option(help="Worked examples in a prompt. Default: 2 triviaqa, 0 coqa, 1 truthfulqa.")
    ] = None,
    max_new_tokens: NewTokens = 32,
    data_dir: DataDir = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of documents and of the bootstrap.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole document instead of tables.")] = False,
) -> None:
    """Evaluate exits on tasks of lm-evaluation-harness, beside the full model and baselines."""
    command = "dynamax " + shlex.join(sys.argv[1:]) if sys.argv[1:2] == ["eval"] else "dynamax eval"
    thresholds = _items("threshold", threshold)
    names = _items("tasks", tasks)
    measures = _items("measure", measure) if measure else ["softmax_margin"] if baselines else []
    peek_backbone(model)

    from dynamax_llm.evaluation.harness.combine import add_to
    from dynamax_llm.evaluation.harness.evaluate import Plan
    from dynamax_llm.evaluation.harness.evaluate import evaluate as run
    from dynamax_llm.evaluation.harness.settings import Subject, by_promise
    from dynamax_llm.evaluation.harness.tasks import load_tasks

    # Whatever can be wrong is found before the backbone is loaded and the first document is asked.
    plan = Plan(batch=batch, timed=timed, seed=seed)
    trained, places = _trained(model, exits, measure)
    promised = _promised(trained, promise)
    _check_decisions(thresholds, measures)
    loaded = load_tasks(names, data_dir=data_dir, shots=shots, limit=limit, max_new_tokens=max_new_tokens, seed=seed)
    lm, tokenizer = load_backbone(model, dtype, device)
    subject = Subject(Path(model).name, lm, tokenizer)
    settings = _settings(subject, trained, places, thresholds, measures, policy, window, baselines)
    settings += [by_promise(subject, exits, text) for exits, text in promised]
    with Bar() as bar:
        found = run(subject, settings, loaded, plan, out, command=command, on_progress=bar.show)
    kept = {subject.name: tuple(item.to_json() for exits in trained.values() for item in exits.promises)}
    found = add_to(out, found.model_copy(update={"promises": kept}))
    typer.echo(found.model_dump_json(indent=1)) if as_json else show(found, out)


def _items(name: str, text: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise UsageError(f"{name} {text!r}: give at least one, separated by commas.")
    return list(dict.fromkeys(items))


def _trained(model: str, exits: Sequence[str] | None, measure: str | None) -> tuple[dict[str, Exits], str | None]:
    """Trained exits by the name of their family, and places for measures if --exits named places instead."""
    from dynamax_llm.exits.artifact import Exits

    given = list(exits or [])
    places = [item for item in given if _PLACES.fullmatch(item) and not Path(item).is_dir()]
    if len(places) > 1 or (places and len(given) > 1):
        raise UsageError(f"exits {', '.join(map(repr, given))}: give folders, or once the layers where measures judge.")
    if places:
        if measure is None:
            raise UsageError(f"exits {places[0]!r} are places without a head: name who judges there: --measure NAMES.")
        return {}, places[0]
    if not given:
        saved = saved_exits(model, None, measure)
        return ({} if saved is None else {_family(saved): saved}), None
    found: dict[str, Exits] = {}
    for folder in given:
        loaded = Exits.from_pretrained(folder)
        name = _family(loaded)
        if name in found:
            name = f"{name} ({Path(folder).name})"
        found[name] = loaded
    return found, None


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


def _check_decisions(thresholds: Sequence[str], measures: Sequence[str]) -> None:
    from dynamax_llm.decoding.thresholds import Thresholds
    from dynamax_llm.exits.confidence.measures import measure

    for value in thresholds:
        Thresholds.parse(value, 1)
    for name in measures:
        measure(name)


def _settings(
    subject: Subject,
    trained: dict[str, Exits],
    places: str | None,
    thresholds: Sequence[str],
    measures: Sequence[str],
    policy: str | None,
    window: int | None,
    baselines: bool,
) -> list[Variant]:
    from dynamax_llm.decoding.generate import DEFAULT_POLICY
    from dynamax_llm.engines.plan import DEFAULT_WINDOW
    from dynamax_llm.evaluation.harness.settings import grid
    from dynamax_llm.exits.artifact import Exits

    heads = {name: exits for name, exits in trained.items() if exits.heads is not None}
    at = Exits.untrained(subject.backbone, places) if places else next(iter(trained.values()), None)
    how: dict[str, Any] = {"policy": policy or DEFAULT_POLICY, "window": window or DEFAULT_WINDOW}
    return grid(subject, heads, thresholds, measures=measures, at=at, baselines=baselines, **how)
