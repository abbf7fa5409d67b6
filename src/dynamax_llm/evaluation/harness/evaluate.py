"""An evaluation: every setting on every task, sample by sample, resumable, as one ``Evaluation``.

    tasks = load_tasks(["triviaqa"], data_dir="data")
    settings = grid(subject, {"mamba head": exits}, [0.8, 0.9], measures=["softmax_margin"])
    document = evaluate(subject, settings, tasks, Plan(), "out")
    add_to("out", document)

A batch of documents is answered under every setting before the next, because the settings share its prompts. Records
are on the disk before the next batch starts; the same call again goes on where the last one stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynamax_llm.evaluation.common.provenance import backbone_facts, run_facts
from dynamax_llm.evaluation.harness import summary
from dynamax_llm.evaluation.harness.combine import check_addition
from dynamax_llm.evaluation.harness.forced import Prompted, agreement, confidences, forced
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

    The document is returned, not written: ``combine.add_to`` adds it to the one in ``out``. Raises DataError for
    damaged records or a damaged document, UsageError for those of another run.
    """
    start = time.perf_counter()
    folder, variants = Path(out).expanduser(), check_ids(list(settings))
    document = Evaluation(
        title=title or f"Early exits on {subject.name}",
        runs=(),
        backbones=(backbone_facts(subject.name, subject.backbone),),
        settings={subject.name: tuple(variant.facts for variant in variants)},
        tasks=tuple(task.facts for task in tasks),
        cells=(),
    )
    check_addition(folder, document)  # every refusal comes before the first minute of work
    cells = _Cells(subject, variants, plan, folder, on_progress)
    cells.open(tasks, document.backbones[0].fingerprint)
    parts = [cells.run(task) for task in tasks]
    results = {
        "runs": (run_facts(command, time.perf_counter() - start),),
        "cells": tuple(cell for own, _ in parts for cell in own),
        "examples": tuple(example for _, examples in parts for example in examples),
        "reliability": tuple(cells.reliability(tasks)),
    }
    return document.model_copy(update=results)


@dataclass
class _Cells:
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

    def open(self, tasks: Sequence[EvalTask], fingerprint: str) -> None:
        """Read all the records there are."""
        backbone = self.subject.backbone
        self.n_layers, self.full_macs = backbone.n_layers, backbone.costs().total
        for task in tasks:
            for variant in self.variants:
                identity = {**task.identity, **variant.identity, "backbone": fingerprint}
                path = cell_path(self.out, self.subject.name, task.facts.name, variant.facts.id)
                kept = self.records[task.facts.name, variant.facts.id] = Records(path, identity)
                self.done += len(kept.samples)
                self.total += len(task.docs)

    def run(self, task: EvalTask) -> tuple[list[Cell], list[Example]]:
        """Answer what has no record yet, then sum up."""
        for chunk in self._chunks(task):
            for variant in self.variants:
                kept = self._records(task, variant)
                docs = [doc for doc in chunk if doc.number not in kept.samples]
                if docs:
                    kept.append(*self._answer(task, variant, docs))
                    self._step(f"{task.facts.name}, {variant.facts.id}", len(docs))
        if task.generates:
            self._time(task)
        return self._summed(task), self._examples(task)

    def _chunks(self, task: EvalTask) -> list[list[Doc]]:
        """Documents that are answered in one call: of a task that generates a batch, longest prompts first.

        Continuations are scored in one call for the whole task, as the harness does: it sorts and batches them, and
        rounding depends on which texts share a batch.
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
        requests = [instance for doc in docs for instance in doc.instances]
        respond = lm.generate_until if task.generates else lm.loglikelihood
        responses = dict(zip(map(id, requests), respond(requests, disable_tqdm=True), strict=True))
        records = []
        for doc in docs:
            own = [responses[id(instance)] for instance in doc.instances]
            answers = [lm.answers[tuple(i.args[: 1 if task.generates else 2])] for i in doc.instances]
            records.append(_record(task, doc, own, answers))
        if task.generates:
            self._force(task, variant, docs, records)
        return records

    def _force(self, task: EvalTask, variant: Variant, docs: Sequence[Doc], records: list[dict[str, Any]]) -> None:
        """Add to the records what needs the full model's answers: agreement, confidences, its tokens for the text."""
        full, early = self.variants[0], variant.early_exit(self.prompts)
        if variant is full or early.policy.exact_output:
            for record in records:
                record["agreement"] = 1.0
        else:
            answers = self._records(task, full).samples
            batch = self._prompted(task, docs, [answers[doc.number]["tokens"] for doc in docs])
            for record, own, answer in zip(records, forced(variant, early, batch), batch.answers, strict=True):
                record["agreement"] = agreement(own, answer)
            if self._measures_reliability(variant):
                for record, points in zip(records, confidences(variant, early, batch), strict=True):
                    record["confidences"] = points
        examples = {doc.number for doc in task.docs[: self.plan.examples]}
        if variant.facts.kind in ("head", "measure"):
            shown = [(doc, record) for doc, record in zip(docs, records, strict=True) if doc.number in examples]
            if shown:
                batch = self._prompted(task, [doc for doc, _ in shown], [record["tokens"] for _, record in shown])
                views = forced(full, full.early_exit(self.prompts), batch)
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
                kept = self._records(task, variant)
                if doc.number in kept.timings:
                    continue
                if ids is None:
                    ids = self._prompted(task, [doc], [[]]).ids
                seconds = pair(whole, variant, self.prompts, ids, count, turn)
                kept.append({"kind": "timing", "doc": doc.number, **seconds})
                self._step(f"{task.facts.name}, {variant.facts.id}, timed", 0)

    def _summed(self, task: EvalTask) -> list[Cell]:
        numbers = [doc.number for doc in task.docs]
        full = [self._records(task, self.variants[0]).samples[number] for number in numbers]
        cells = []
        for variant in self.variants:
            records = self._records(task, variant)
            own = [records.samples[number] for number in numbers]
            timed = [records.timings[number] for number in numbers if number in records.timings]
            cells.append(
                summary.cell(self.subject.name, self.n_layers, variant, task, own, full, timed, self.plan.seed)
            )
        return cells

    def _examples(self, task: EvalTask) -> list[Example]:
        full = self._records(task, self.variants[0]).samples
        examples = []
        for variant in self.variants:
            for doc in task.docs:
                record = self._records(task, variant).samples[doc.number]
                if "full" in record:
                    examples.append(
                        Example(
                            backbone=self.subject.name,
                            setting=variant.facts.id,
                            task=task.facts.name,
                            prompt=doc.prompt[-SHOWN_PROMPT:],
                            tokens=tuple(_shown(self.subject.tokenizer, record)),
                            full_text=full[doc.number]["text"],
                        )
                    )
        return examples

    def reliability(self, tasks: Sequence[EvalTask]) -> Iterator[Reliability]:
        """Of every head, over all generation tasks."""
        for variant in filter(self._measures_reliability, self.variants):
            samples = [r for task in tasks if task.generates for r in self._records(task, variant).samples.values()]
            samples = [record for record in samples if "confidences" in record]
            yield from summary.reliability(self.subject.name, variant, samples)

    def _measures_reliability(self, variant: Variant) -> bool:
        """Whether this setting's records hold confidences: the first setting of a head in which every exit has one."""
        facts = variant.facts
        if facts.kind != "head" or facts.readout == "tail" or None in facts.thresholds:
            return False
        family = [other for other in self.variants if other.facts.family == facts.family]
        return variant is next(other for other in family if None not in other.facts.thresholds)

    def _records(self, task: EvalTask, variant: Variant) -> Records:
        return self.records[task.facts.name, variant.facts.id]

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
    """The text in pieces that join to it, each beside the full model's token at that place.

    The text of a character of several tokens is the last one's piece: the others' are empty.
    """
    tokens: list[int] = record["tokens"]
    before = ""
    for place, (token, full) in enumerate(zip(tokens, record["full"], strict=True)):
        text = tokenizer.decode(tokens[: place + 1])
        whole = place + 1 == len(tokens) or not text.endswith(_INCOMPLETE)
        piece = text[len(before) :] if whole else ""
        before = text if whole else before
        other = piece if full == token else tokenizer.decode([full])
        yield ShownToken(text=piece, layers=record["layers"][place], full=other, agrees=full == token)
