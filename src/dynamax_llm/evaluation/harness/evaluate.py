"""An evaluation: every setting on every task, sample by sample, resumable, as one ``Evaluation``.

    tasks = load_tasks(["triviaqa"], data_dir="data")
    settings = grid(subject, {"mamba head": exits}, [0.8, 0.9], measures=["softmax_margin"])
    found = evaluate(subject, settings, tasks, Plan(), "out")
    found.save("out")

A batch of documents is answered under every setting before the next, because the settings share its prompts. Records
are on the disk before the next batch starts; the same call again goes on where the last one stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.common.provenance import backbone_facts, run_facts
from dynamax_llm.evaluation.harness import summary
from dynamax_llm.evaluation.harness.forced import Prompted, agreement, confidences, said
from dynamax_llm.evaluation.harness.plan import Plan
from dynamax_llm.evaluation.harness.prompts import SharedPrompts
from dynamax_llm.evaluation.harness.records import Records, cell_path
from dynamax_llm.evaluation.harness.results import Cell, Evaluation, Example, Reliability, ShownToken
from dynamax_llm.evaluation.harness.settings import Subject, Variant, check_ids
from dynamax_llm.evaluation.harness.tasks import Doc, EvalTask
from dynamax_llm.evaluation.harness.timing import pair

#: Characters of a prompt that an example shows, its end.
SHOWN_PROMPT = 400
#: How tokenizers decode the first bytes of a character.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"

#: Called as the work goes on: what is being done, samples done, samples in all (resumed ones are done).
OnProgress = Callable[[str, int, int], None]


def evaluate(
    subject: Subject,
    settings: Sequence[Variant],
    tasks: Sequence[EvalTask],
    plan: Plan,
    out: str | Path,
    *,
    command: str = "",
    title: str | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Answer every task under every setting, of which the first is the full model; records are kept in ``out``.

    The document is returned, not written. Raises DataError for damaged records, UsageError for those of another run.
    """
    start = time.perf_counter()
    variants = check_ids(list(settings))
    bench = _Bench(subject, variants, plan, Path(out).expanduser(), on_progress)
    bench.open(tasks)  # every refusal comes before the first minute of work
    parts = [bench.run(task) for task in tasks]
    return Evaluation(
        title=title or f"Early exits on {subject.name}",
        runs=(run_facts(command, time.perf_counter() - start),),
        backbones=(backbone_facts(subject.name, subject.backbone),),
        settings={subject.name: tuple(variant.facts for variant in variants)},
        tasks=tuple(task.facts for task in tasks),
        cells=tuple(cell for cells, _ in parts for cell in cells),
        examples=tuple(example for _, examples in parts for example in examples),
        reliability=tuple(bench.reliability(tasks)),
    )


@dataclass
class _Bench:
    """One subject under all its settings."""

    subject: Subject
    variants: list[Variant]
    plan: Plan
    out: Path
    on_progress: OnProgress | None
    records: dict[tuple[str, str], Records] = field(default_factory=dict)  # by task and setting
    prompts: SharedPrompts = field(default_factory=SharedPrompts)
    models: dict[int, Any] = field(default_factory=dict)  # DynamaxLM by id of its model
    done: int = 0
    total: int = 0

    def open(self, tasks: Sequence[EvalTask]) -> None:
        """Read all the records there are."""
        backbone = self.subject.backbone
        who = backbone_facts(self.subject.name, backbone)
        self.n_layers, self.full_macs = backbone.n_layers, backbone.costs().total
        for task in tasks:
            for variant in self.variants:
                identity = {**task.identity, **variant.identity, "backbone": who.fingerprint}
                path = cell_path(self.out, self.subject.name, task.facts.name, variant.facts.id)
                kept = Records(path, identity)
                self.records[task.facts.name, variant.facts.id] = kept
                self.done += len(kept.samples)
                self.total += len(task.docs)

    def run(self, task: EvalTask) -> tuple[list[Cell], list[Example]]:
        """Answer what has no record yet, then sum up."""
        lm = self._lm(self.variants[0])
        order = sorted(
            task.docs, key=lambda doc: (-max(len(lm.tok_encode(i.args[0])) for i in doc.instances), doc.prompt)
        )
        for first in range(0, len(order), self.plan.batch):
            for variant in self.variants:
                kept = self.records[task.facts.name, variant.facts.id]
                docs = [doc for doc in order[first : first + self.plan.batch] if doc.number not in kept.samples]
                if docs:
                    kept.append(*self._answer(task, variant, docs))
                    self._step(f"{task.facts.name}, {variant.facts.id}", len(docs))
        if task.generates:
            self._time(task)
        return self._summed(task), self._examples(task)

    def _chunks(self, task: EvalTask) -> list[list[Doc]]:
        """Batches of documents as the harness makes them, longest prompts first.

        Continuations to score are all one chunk: the harness sorts and batches them itself, over the whole task, and
        rounding depends on what shares a batch.
        """
        if not task.generates:
            return [list(task.docs)]
        lm = self._lm(self.variants[0])
        order = sorted(task.docs, key=lambda doc: (-len(lm.tok_encode(doc.prompt)), doc.prompt))
        return [order[first : first + self.plan.batch] for first in range(0, len(order), self.plan.batch)]

    def _answer(self, task: EvalTask, variant: Variant, docs: Sequence[Doc]) -> list[dict[str, Any]]:
        """The records of some documents under one setting."""
        lm = self._lm(variant)
        lm.early_exit, lm.answers = variant.early_exit(self.prompts), {}
        asked = [instance for doc in docs for instance in doc.instances]
        ask = lm.generate_until if task.generates else lm.loglikelihood
        responses = dict(zip(map(id, asked), ask(asked, disable_tqdm=True), strict=True))
        found = []
        for doc in docs:
            own = [responses[id(instance)] for instance in doc.instances]
            answers = [lm.answers[tuple(i.args[: 1 if task.generates else 2])] for i in doc.instances]
            found.append(_record(task, doc, own, answers))
        if task.generates:
            self._force(task, variant, docs, found)
        return found

    def _force(self, task: EvalTask, variant: Variant, docs: Sequence[Doc], found: list[dict[str, Any]]) -> None:
        """Add to the records what needs the full model's answers: agreement, confidences, its view of the text."""
        full = self.records[task.facts.name, self.variants[0].facts.id]
        is_full = variant is self.variants[0]
        early = variant.early_exit(self.prompts)
        if is_full or early.policy.exact_output:
            for record in found:
                record["agreement"] = 1.0
        else:
            batch = self._prompted(task, docs, [full.samples[doc.number]["tokens"] for doc in docs])
            for record, own, answer in zip(found, said(variant, early, batch), batch.answers, strict=True):
                record["agreement"] = agreement(own, answer)
            if self._is_watched(variant):
                for record, points in zip(found, confidences(variant, early, batch), strict=True):
                    record["confidences"] = points
        shown = [(doc, record) for doc, record in zip(docs, found, strict=True) if self._is_shown(task, variant, doc)]
        if shown:
            batch = self._prompted(task, [doc for doc, _ in shown], [record["tokens"] for _, record in shown])
            whole = self.variants[0]
            views = said(whole, whole.early_exit(self.prompts), batch)
            for (_, record), view in zip(shown, views, strict=True):
                record["full"] = view

    def _prompted(self, task: EvalTask, docs: Sequence[Doc], answers: Sequence[Sequence[int]]) -> Prompted:
        lm = self._lm(self.variants[0])
        room = lm.max_length - int(task.facts.max_new_tokens or 0)
        ids, mask = lm.tok_batch_encode([doc.prompt for doc in docs], left_truncate_len=room)
        return Prompted(ids.to(lm.device), mask.to(lm.device), answers)

    def _time(self, task: EvalTask) -> None:
        """Pairs of timed runs, for the documents and settings that have none."""
        count = int(task.facts.max_new_tokens or 0)
        if count < 2:
            return
        whole = self.variants[0]
        for turn, doc in enumerate(task.docs[: self.plan.timed]):
            ids = None
            for variant in self.variants[1:]:
                kept = self.records[task.facts.name, variant.facts.id]
                if doc.number in kept.timings:
                    continue
                if ids is None:
                    ids = self._prompted(task, [doc], [[]]).ids
                seconds = pair(whole, variant, self.prompts, ids, count, turn)
                kept.append({"kind": "timing", "doc": doc.number, **seconds})
                self._step(f"{task.facts.name}, {variant.facts.id}, timed", 0)

    def _summed(self, task: EvalTask) -> list[Cell]:
        numbers = [doc.number for doc in task.docs]
        kept = [self.records[task.facts.name, variant.facts.id] for variant in self.variants]
        full = [kept[0].samples[number] for number in numbers]
        cells = []
        for variant, records in zip(self.variants, kept, strict=True):
            own = [records.samples[number] for number in numbers]
            timed = [records.timings[number] for number in numbers if number in records.timings]
            cells.append(
                summary.cell(self.subject.name, self.n_layers, variant, task, own, full, timed, self.plan.seed)
            )
        return cells

    def _examples(self, task: EvalTask) -> list[Example]:
        full = self.records[task.facts.name, self.variants[0].facts.id]
        found = []
        for variant in self.variants:
            kept = self.records[task.facts.name, variant.facts.id]
            for doc in task.docs:
                record = kept.samples[doc.number]
                if "full" in record:
                    tokens = tuple(_shown(self.subject.tokenizer, record))
                    prompt, text = doc.prompt[-SHOWN_PROMPT:], full.samples[doc.number]["text"]
                    where = {"backbone": self.subject.name, "setting": variant.facts.id, "task": task.facts.name}
                    found.append(Example(**where, prompt=prompt, tokens=tokens, full_text=text))
        return found

    def reliability(self, tasks: Sequence[EvalTask]) -> Iterator[Reliability]:
        """Of every head, over all generation tasks."""
        for variant in filter(self._is_watched, self.variants):
            kept = [self.records[task.facts.name, variant.facts.id] for task in tasks if task.generates]
            samples = [record for records in kept for record in records.samples.values() if "confidences" in record]
            yield from summary.reliability(self.subject.name, variant, samples)

    def _is_watched(self, variant: Variant) -> bool:
        """Whether reliability is measured in this setting's cells: once per head, in the first setting that asks it."""
        facts = variant.facts
        if facts.kind != "head" or facts.readout == "tail" or None in facts.thresholds:
            return False
        alike = [
            other
            for other in self.variants
            if other.facts.family == facts.family and None not in other.facts.thresholds
        ]
        return variant is alike[0]

    def _is_shown(self, task: EvalTask, variant: Variant, doc: Doc) -> bool:
        chosen = [item.number for item in task.docs[: self.plan.examples]]
        return variant.facts.kind in ("head", "measure") and doc.number in chosen

    def _lm(self, variant: Variant) -> Any:
        """The harness's model class for the variant's model, made once; importing the harness takes seconds."""
        from dynamax_llm.evaluation.harness.model import DynamaxLM

        key = id(variant.model)
        if key not in self.models:
            self.models[key] = DynamaxLM(
                variant.model,
                self.subject.tokenizer,
                batch_size=self.plan.batch,
                full_macs=self.full_macs,
                full_layers=self.n_layers,
            )
        return self.models[key]

    def _step(self, what: str, samples: int) -> None:
        self.done += samples
        if self.on_progress is not None:
            self.on_progress(what, self.done, self.total)


def _record(task: EvalTask, doc: Doc, responses: Sequence[Any], answers: Sequence[Any]) -> dict[str, Any]:
    """One document's record; the answers of several choices are strung together."""
    layers = [depth for answer in answers for depth in answer.layers]
    count = max(len(layers), 1)
    record = {
        "kind": "sample",
        "doc": doc.number,
        "metrics": task.score(doc, responses),
        "layers": layers,
        "reduction": sum(answer.reduction * len(answer.layers) for answer in answers) / count,
        "passes": sum(answer.passes * len(answer.layers) for answer in answers) / count,
        "seconds": round(sum(answer.seconds for answer in answers), 6),
    }
    if task.generates:
        return {**record, "text": responses[0], "tokens": list(answers[0].tokens)}
    return {**record, "scores": [list(response) for response in responses]}


def _shown(tokenizer: Any, record: dict[str, Any]) -> Iterator[ShownToken]:
    """The text in pieces that join to it, and what the full model would have said at each place.

    A character of several tokens is the last one's: the others' pieces are empty.
    """
    tokens: list[int] = record["tokens"]
    given = ""
    for place, (token, full) in enumerate(zip(tokens, record["full"], strict=True)):
        text = tokenizer.decode(tokens[: place + 1])
        whole = place + 1 == len(tokens) or not text.endswith(_INCOMPLETE)
        piece = text[len(given) :] if whole else ""
        given = text if whole else given
        said_too = full == token
        other = piece if said_too else tokenizer.decode([full])
        yield ShownToken(text=piece, layers=record["layers"][place], full=other, agrees=said_too)


def merge(parts: Sequence[Evaluation], *, title: str | None = None, notes: Sequence[str] = ()) -> Evaluation:
    """One document of several: other backbones, or other tasks of the same. Tasks and backbones appear once.

    Raises UsageError if a backbone or a task of one name is not the same in all of them.
    """
    if not parts:
        raise UsageError("nothing to merge: give at least one evaluation.")
    settings: dict[str, tuple[Any, ...]] = {}
    promises: dict[str, tuple[dict[str, Any], ...]] = {}
    for part in parts:
        for name, items in part.settings.items():
            settings[name] = (*settings.get(name, ()), *(item for item in items if item not in settings.get(name, ())))
        for name, kept in part.promises.items():
            promises[name] = (*promises.get(name, ()), *(item for item in kept if item not in promises.get(name, ())))
    return Evaluation(
        title=title or parts[0].title,
        notes=tuple(notes) or tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        runs=tuple(run for part in parts for run in part.runs),
        backbones=_once("backbone", [item for part in parts for item in part.backbones]),
        settings=settings,
        tasks=_once("task", [item for part in parts for item in part.tasks]),
        cells=tuple(item for part in parts for item in part.cells),
        examples=tuple(item for part in parts for item in part.examples),
        reliability=tuple(item for part in parts for item in part.reliability),
        promises=promises,
        shifts=tuple(item for part in parts for item in part.shifts),
    )


def _once(kind: str, items: Sequence[Any]) -> tuple[Any, ...]:
    found: dict[str, Any] = {}
    for item in items:
        if found.setdefault(item.name, item) != item:
            raise UsageError(f"two different {kind}s are called {item.name!r}: merge evaluations of the same {kind}s.")
    return tuple(found.values())
