"""Tasks of lm-evaluation-harness, on the hub's datasets or offline on local files with the same fields.

Prompts, filters, stop sequences and metrics are the harness's own configurations; only where the documents come from,
the number of shots and the number of new tokens are set here. A local file is read whole, shuffled with the run's
seed, and its first ``limit`` documents are used; nothing is written to a dataset cache.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamax_llm.errors import DataError, UsageError, first_line
from dynamax_llm.evaluation.harness.patches import single_scores, squad_metrics
from dynamax_llm.evaluation.harness.plan import EvalSettings
from dynamax_llm.evaluation.harness.results import TaskFacts
from dynamax_llm.text.prompts import rendered
from dynamax_llm.text.sources import json_records

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


_TRUTHFUL, _CHOICES = "truthfulqa_generation.jsonl", "truthfulqa_mc.jsonl"
#: What can be evaluated offline.
LOCAL = {
    "triviaqa": Local(
        "triviaqa", "triviaqa_dev.jsonl", "triviaqa_train_sample.jsonl", 2, "exact_match,remove_whitespace"
    ),
    "coqa": Local("coqa", "coqa_dev.jsonl", "coqa_dev.jsonl", 0, "f1,none"),
    "truthfulqa_gen": Local("truthfulqa", _TRUTHFUL, _TRUTHFUL, 1, "rougeL_max,none"),
    "truthfulqa_mc1": Local("truthfulqa", _CHOICES, _CHOICES, 1, "acc,none"),
    "truthfulqa_mc2": Local("truthfulqa", _CHOICES, _CHOICES, 1, "acc,none"),
}


@dataclass(frozen=True)
class Chat:
    """Prompts as conversations: a tokenizer with a chat template, and the system message."""

    tokenizer: Any
    system: str | None = None

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, as the harness asks for it; its last message is continued if it is the model's.

        Raises DataError for a template that fails.
        """
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(rendered(self.tokenizer, messages, tokenize=False, **how))

    def options(self) -> dict[str, Any]:
        """Arguments with which the harness builds requests."""
        how = {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": self.render}
        return {**how, "system_instruction": self.system}


@dataclass(frozen=True)
class Doc:
    """One document: its number in the task, the fields that metrics read, and its requests to the model."""

    number: int
    fields: Mapping[str, Any]
    instances: tuple[Any, ...]  # lm_eval Instance, in the order of their idx

    @property
    def prompt(self) -> str:
        """The text that all its requests begin with."""
        return str(self.instances[0].args[0])


@dataclass(frozen=True)
class EvalTask:
    """A loaded task: its requests are built once and used under every setting."""

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
        scores: dict[str, Any] = {}
        with single_scores():
            for ensemble in self.task._filters:
                ensemble.apply(list(doc.instances))
                answers = [instance.filtered_resps[ensemble.name] for instance in doc.instances]
                for metric, value in self.task.process_results(doc.fields, answers).items():
                    scores[f"{metric},{ensemble.name}"] = _plain(value)
        return scores

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
    chat: Chat | None = None,
) -> list[EvalTask]:
    """The named tasks with their requests built.

    ``data_dir`` holds local files (see ``LOCAL``); without it, and for other tasks, documents come from the hub.
    ``shots`` None is the paper's number for the five tasks above, else the harness's. ``limit`` None is all documents.
    ``chat`` frames prompts as conversations.

    Raises UsageError for an unknown task or a number out of range, DataError for documents that cannot be had.
    """
    if not names:
        raise UsageError(f"no task named. Offline there are: {', '.join(LOCAL)}.")
    for name, value, least in (("limit", limit, 1), ("shots", shots, 0), ("max_new_tokens", max_new_tokens, 1)):
        if value is not None and value < least:
            raise UsageError(f"{name} {value}: give a whole number, at least {least}.")
    folder = None if data_dir is None else _folder(data_dir)

    import dynamax_llm.evaluation.harness.model  # noqa: F401  raises UsageError where lm-eval is missing

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    others = [name for name in names if name not in LOCAL]
    manager = _manager(None) if others else None
    for name in others:
        _check_name(name, manager)
    loaded = []
    with _quiet():
        for name in dict.fromkeys(names):
            files = _files(name, folder)
            count = shots if shots is not None or name not in LOCAL else LOCAL[name].shots
            task = _task(manager or _manager(LOCAL[name].folder), name, files, count, seed)
            loaded.append(_ready(name, task, files, limit, max_new_tokens, seed, chat))
    return loaded


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

        import datasets

        changes["custom_dataset"] = lambda **_: {
            name: datasets.Dataset.from_list(rows) for name, rows in splits.items()
        }
    with squad_metrics():
        try:
            # In a group the harness applies these changes to its own configuration of the task.
            task = manager.load([{"group": "dynamax", "task": [changes]}])["tasks"][name]
        except DataError:
            raise
        except Exception as error:  # the hub client, the builders and the harness have different errors
            raise _unavailable(name, files, error) from error
    if task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SHOT_SEED)
    return task


def _unavailable(name: str, files: Mapping[str, Path], error: Exception) -> DataError:
    reason = first_line(error)
    if files:
        paths = ", ".join(sorted({str(path) for path in files.values()}))
        return DataError(
            f"task {name!r} cannot be made from {paths} ({reason}). Its fields are those of the hub's dataset."
        )
    if name in LOCAL:
        wanted = " and ".join(dict.fromkeys((LOCAL[name].documents, LOCAL[name].examples)))
        return DataError(
            f"the documents of task {name!r} could not be fetched ({reason}). Check the connection, or give a folder "
            f"that holds {wanted}: `data_dir`."
        )
    return DataError(f"task {name!r} could not be loaded ({reason}). Check the connection.")


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [record for _, record in json_records(path)]
    if not rows:
        raise DataError(f"{path} holds no document. Give one JSON object a line.")
    return rows


def _ready(
    name: str,
    task: Any,
    files: Mapping[str, Path],
    limit: int | None,
    max_new_tokens: int,
    seed: int,
    chat: Chat | None = None,
) -> EvalTask:
    generates = task.OUTPUT_TYPE == "generate_until"
    if not generates and task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        raise UsageError(
            f"task {name!r} requires {task.OUTPUT_TYPE}: give a task that generates or scores continuations."
        )
    if generates:
        task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
    task.build_all_requests(limit=limit, **({} if chat is None else chat.options()))
    by_doc: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_doc.setdefault(int(instance.doc_id), []).append(instance)
    fields = dict(task.doc_iterator(limit=limit))
    docs = tuple(
        Doc(number, fields[number], tuple(sorted(instances, key=lambda item: item.idx)))
        for number, instances in sorted(by_doc.items())
    )
    contents = b"".join(path.read_bytes() for path in sorted(set(files.values())))
    metric = next(iter(task.aggregation()))
    facts = TaskFacts(
        name=name,
        kind="generate" if generates else "loglikelihood",
        shots=int(task.config.num_fewshot or 0),
        samples=len(docs),
        source=", ".join(dict.fromkeys(path.name for path in files.values())) or str(task.DATASET_PATH),
        sha256=hashlib.sha256(contents).hexdigest() if files else None,
        primary=LOCAL[name].primary if name in LOCAL else f"{metric},{task._filters[0].name}",
        max_new_tokens=max_new_tokens if generates else None,
    )
    # The requests' texts decide every outcome, wherever they came from.
    asked = hashlib.sha256("\0".join(str(i.args) for doc in docs for i in doc.instances).encode()).hexdigest()
    return EvalTask(facts, docs, task, {**facts.model_dump(exclude={"primary"}), "seed": seed, "asked": asked})


def _plain(value: Any) -> Any:
    """A metric's value as JSON types; numpy's numbers become equal Python numbers."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


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
