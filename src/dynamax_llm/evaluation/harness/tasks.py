"""Tasks of lm-evaluation-harness, on the hub's datasets or offline on local files with the same fields.

Prompts, filters, stop sequences and metrics are the harness's own configurations; only where the documents come from,
the number of shots and the number of new tokens are set here. A local file is read whole, shuffled with the run's
seed, and its first ``limit`` documents are asked; nothing is written to a dataset cache.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import io
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamax_llm.errors import DataError, UsageError
from dynamax_llm.evaluation.harness.plan import EvalSettings
from dynamax_llm.evaluation.harness.results import TaskFacts
from dynamax_llm.evaluation.harness.squad import stand_in

#: The harness's own seed for drawing few-shot examples.
SHOT_SEED = 1234


@dataclass(frozen=True)
class Local:
    """A task that can be read from files: the harness's folder of it, its files, the paper's shots, its main metric."""

    folder: str
    documents: str
    examples: str  # where few-shot examples come from
    shots: int
    primary: str


#: What can be evaluated offline.
LOCAL = {
    "triviaqa": Local(
        "triviaqa", "triviaqa_dev.jsonl", "triviaqa_train_sample.jsonl", 2, "exact_match,remove_whitespace"
    ),
    "coqa": Local("coqa", "coqa_dev.jsonl", "coqa_dev.jsonl", 0, "f1,none"),
    "truthfulqa_gen": Local(
        "truthfulqa", "truthfulqa_generation.jsonl", "truthfulqa_generation.jsonl", 1, "rougeL_max,none"
    ),
    "truthfulqa_mc1": Local("truthfulqa", "truthfulqa_mc.jsonl", "truthfulqa_mc.jsonl", 1, "acc,none"),
    "truthfulqa_mc2": Local("truthfulqa", "truthfulqa_mc.jsonl", "truthfulqa_mc.jsonl", 1, "acc,none"),
}


@dataclass(frozen=True)
class Doc:
    """One document: its number in the task, what the metrics read, and what is asked of the model."""

    number: int
    fields: Mapping[str, Any]
    instances: tuple[Any, ...]  # lm_eval Instance, in the order of their idx

    @property
    def prompt(self) -> str:
        """The text that all its requests begin with."""
        return str(self.instances[0].args[0])


@dataclass(frozen=True)
class EvalTask:
    """A task made ready: its requests are built once and asked under every setting."""

    facts: TaskFacts
    docs: tuple[Doc, ...]
    task: Any  # lm_eval ConfigurableTask
    identity: Mapping[str, Any]

    @property
    def generates(self) -> bool:
        return self.facts.kind == "generate"

    def score(self, doc: Doc, responses: Sequence[Any]) -> dict[str, Any]:
        """The document's value of every metric under the harness's names, from one response per instance."""
        for instance, response in zip(doc.instances, responses, strict=True):
            instance.resps, instance.filtered_resps = [response], {}
        found: dict[str, Any] = {}
        with _single_scores():
            for ensemble in self.task._filters:
                ensemble.apply(list(doc.instances))
                answers = [instance.filtered_resps[ensemble.name] for instance in doc.instances]
                for metric, value in self.task.process_results(doc.fields, answers).items():
                    found[f"{metric},{ensemble.name}"] = _plain(value)
        return found

    def aggregate(self, metric: str, values: Sequence[Any]) -> float:
        """The task's figure from its documents' values, as the harness makes it."""
        from lm_eval.api.metrics import mean

        combine = self.task.aggregation().get(metric.rsplit(",", 1)[0], mean)
        return float(combine(list(values)))


def load_tasks(
    names: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = EvalSettings.limit,
    max_new_tokens: int = EvalSettings.max_new_tokens,
    seed: int = 0,
) -> list[EvalTask]:
    """The named tasks with their requests built.

    ``data_dir`` holds local files (see ``LOCAL``); without it, and for other tasks, documents come from the hub.
    ``shots`` None is the paper's number for the five tasks above, else the harness's. ``limit`` None is all documents.
    Raises UsageError for an unknown task or a number out of range, DataError for documents that cannot be had.
    """
    if not names:
        raise UsageError(f"no task named. Offline there are: {', '.join(LOCAL)}.")
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: give the number of documents per task, at least 1.")
    if shots is not None and shots < 0:
        raise UsageError(f"shots {shots}: give the number of worked examples in a prompt, 0 or more.")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens {max_new_tokens}: give at least 1.")
    folder = None if data_dir is None else _folder(data_dir)
    _require_harness()
    unknown = [name for name in names if name not in LOCAL]
    manager = _manager(None) if unknown else None
    for name in unknown:
        _check_name(name, manager)
    loaded = []
    with _quiet():
        for name in dict.fromkeys(names):
            files = _files(name, folder)
            used = manager or _manager(LOCAL[name].folder)
            count = shots if shots is not None or name not in LOCAL else LOCAL[name].shots
            task = _task(used, name, files, count, seed)
            loaded.append(_ready(name, task, files, limit, max_new_tokens, seed))
    return loaded


def _require_harness() -> None:
    import dynamax_llm.evaluation.harness.model  # noqa: F401  says what is missing

    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _manager(folder: str | None) -> Any:
    """The harness's index of its tasks; of one folder alone it takes milliseconds, of all of them many seconds."""
    import lm_eval.tasks

    if folder is None:
        return lm_eval.tasks.TaskManager()
    place = Path(lm_eval.tasks.__file__).parent / folder
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(place))


def _check_name(name: str, manager: Any) -> None:
    if name in manager.all_subtasks:
        return
    near = difflib.get_close_matches(name, [*LOCAL, *manager.all_subtasks], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(
        f"unknown task {name!r}.{hint} Offline there are {', '.join(LOCAL)}; online every single task of "
        "lm-evaluation-harness: lm_eval ls tasks."
    )


def _folder(data_dir: str | Path) -> Path:
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise DataError(f"no folder {str(data_dir)!r}. Give `data_dir`, the folder that holds the tasks' .jsonl files.")
    return folder


def _files(name: str, folder: Path | None) -> dict[str, Path]:
    """The task's files by split; none if it is read from the hub. Raises DataError naming the file that is missing."""
    if folder is None or name not in LOCAL:
        return {}
    files = {"validation": folder / LOCAL[name].documents, "train": folder / LOCAL[name].examples}
    for path in files.values():
        if not path.is_file():
            raise DataError(
                f"task {name!r} needs {path.name}, which {folder} does not hold. Put it there, see `data_dir`."
            )
    return files


def _task(manager: Any, name: str, files: Mapping[str, Path], shots: int | None, seed: int) -> Any:
    """The harness's task object, its documents read."""
    changes: dict[str, Any] = {"task": name}
    if shots is not None:
        changes["num_fewshot"] = shots
    if files:
        splits = {split: _rows(path) for split, path in files.items()}
        random.Random(seed).shuffle(splits["validation"])
        changes["custom_dataset"] = lambda **_: _datasets(splits)
    with stand_in():
        try:
            # In a group the harness lays these changes over its own configuration of the task.
            task = manager.load([{"group": "dynamax", "task": [changes]}])["tasks"][name]
        except DataError:
            raise
        except Exception as error:  # the hub client, the builders and the harness each raise their own
            raise _unavailable(name, files, error) from error
    if task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SHOT_SEED)
    return task


def _unavailable(name: str, files: Mapping[str, Path], error: Exception) -> DataError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".: ")
    if files:
        held = ", ".join(sorted({str(path) for path in files.values()}))
        return DataError(
            f"task {name!r} cannot be made from {held} ({reason}). Its fields are those of the hub's dataset."
        )
    if name in LOCAL:
        wanted = " and ".join(dict.fromkeys((LOCAL[name].documents, LOCAL[name].examples)))
        return DataError(
            f"the documents of task {name!r} could not be fetched ({reason}). Check the connection, or give a folder "
            f"that holds {wanted}: `data_dir`."
        )
    return DataError(f"task {name!r} could not be loaded ({reason}). Check the connection.")


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: no valid JSON ({error}). It holds one document a line.") from error
    if not rows:
        raise DataError(f"{path} holds no document. It holds one JSON object a line.")
    return rows


def _datasets(splits: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    import datasets

    return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}


def _ready(
    name: str, task: Any, files: Mapping[str, Path], limit: int | None, max_new_tokens: int, seed: int
) -> EvalTask:
    generates = task.OUTPUT_TYPE == "generate_until"
    if not generates and task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        raise UsageError(
            f"task {name!r} asks for {task.OUTPUT_TYPE}: give a task that generates or scores continuations."
        )
    if generates:
        task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
    task.build_all_requests(limit=limit)
    by_doc: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_doc.setdefault(int(instance.doc_id), []).append(instance)
    fields = dict(task.doc_iterator(limit=limit))
    docs = tuple(
        Doc(number, fields[number], tuple(sorted(instances, key=lambda item: item.idx)))
        for number, instances in sorted(by_doc.items())
    )
    digest = _sha256(sorted(set(files.values()))) if files else None
    metric = next(iter(task.aggregation()))
    facts = TaskFacts(
        name=name,
        kind="generate" if generates else "loglikelihood",
        shots=int(task.config.num_fewshot or 0),
        samples=len(docs),
        source=", ".join(dict.fromkeys(path.name for path in files.values())) or str(task.DATASET_PATH),
        sha256=digest,
        primary=LOCAL[name].primary if name in LOCAL else f"{metric},{task._filters[0].name}",
        max_new_tokens=max_new_tokens if generates else None,
    )
    # The texts asked decide everything, wherever they came from.
    asked = hashlib.sha256("\0".join(str(i.args) for doc in docs for i in doc.instances).encode()).hexdigest()
    return EvalTask(facts, docs, task, {**facts.model_dump(exclude={"primary"}), "seed": seed, "asked": asked})


def _sha256(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """A metric's value as JSON types; numpy's numbers are Python's to the last digit."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


@contextlib.contextmanager
def _single_scores() -> Iterator[None]:
    """ROUGE of one text against one reference without a thousand bootstrap draws of that one score.

    The harness's truthfulqa_gen aggregates each score by itself; whatever is drawn from a single number is that
    number, so one draw gives its figures to the last digit, in a hundredth of the time.
    """
    from rouge_score import scoring

    whole = scoring.BootstrapAggregator
    scoring.BootstrapAggregator = functools.partial(whole, n_samples=1)
    try:
        yield
    finally:
        scoring.BootstrapAggregator = whole


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The bars that the libraries draw on stderr go nowhere."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
