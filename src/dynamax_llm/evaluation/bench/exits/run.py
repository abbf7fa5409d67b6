"""Timing saved exits on prompts: plain ``generate``, a mode, plain ``generate``, the next mode, in one process.

A pair is one batch of prompts, once plain and once in the mode, in alternating order; both are whole ``generate`` calls
that write equally many tokens, as many as plain ``generate`` wrote before its end-of-text token. Modes take turns, so
that a slow moment of the machine affects all. The first call of a mode, which builds what it needs, is not timed.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamax_llm.backbones import adapt
from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.bench import parity
from dynamax_llm.evaluation.bench.device import describe
from dynamax_llm.evaluation.bench.exits import figures
from dynamax_llm.evaluation.bench.exits.document import ExitBench, ExitFacts, LeftOut, Load, ModeRow, Sample
from dynamax_llm.evaluation.bench.exits.modes import Mode, modes
from dynamax_llm.evaluation.bench.exits.settings import ExitBenchSettings
from dynamax_llm.evaluation.bench.exits.verdict import verdict
from dynamax_llm.evaluation.bench.exits.work import Item, Work, batched, check_room, encode
from dynamax_llm.evaluation.bench.plan import GROUP
from dynamax_llm.evaluation.common.provenance import backbone_facts, run_facts
from dynamax_llm.evaluation.common.timing import in_turns, timed
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.progress import Advance, Stages
from dynamax_llm.text.prompts import Prompt

#: Arguments of every ``generate`` call: greedy, one sequence a row, whatever the stored generation config says.
GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "stop_strings": None, "use_cache": True}


def bench_exits(
    model: PreTrainedModel,
    tokenizer: Any,
    exits: Exits,
    prompts: Sequence[Prompt],
    settings: ExitBenchSettings | None = None,
    *,
    name: str | None = None,
    exits_name: str = "",
    command: str = "dynamax_llm.bench_exits",
    on_part: Callable[[ExitBench], None] | None = None,
) -> ExitBench:
    """Time ``exits`` on ``prompts`` in every mode that they and the model support, beside plain ``model.generate``.

    ``name`` and ``exits_name`` are noted in the document. ``on_part`` is called with the document so far after every
    repeat. Raises ArtifactMismatchError for exits of another backbone, UsageError for exits without heads and no
    measure named, an engine that cannot run, a chat template that is not there, or a prompt that the context has no
    room for, DataError for prompts that cannot be used.
    """
    settings = settings or ExitBenchSettings()
    backbone = adapt(model)
    wanted, left_out = modes(exits, backbone, settings)
    items = encode(tokenizer, prompts, settings.prompts, chat=settings.chat, system=settings.system)
    check_room(items, backbone, settings.new)
    with _threads(settings.threads):
        run = _Run(model, tokenizer, settings, wanted, left_out)
        run.note(exits, items, {"backbone": name, "exits": exits_name}, command)
        run.measure(items, on_part)
        return run.document(complete=True)


@dataclass
class Timing:
    """One batch of prompts in one mode: seconds of plain generate and of the mode, per repeat, and the last output."""

    work: Work
    pairs: list[tuple[float, float]] = field(default_factory=list)
    out: Any = None  # an EarlyExitOutput, once it was timed


class _Run:
    """One benchmark under way."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        settings: ExitBenchSettings,
        wanted: list[Mode],
        left_out: list[LeftOut],
    ) -> None:
        self.started = time.monotonic()
        self.model, self.settings, self.modes, self.left_out = model, settings, wanted, left_out
        self.backbone = adapt(model)
        self.device = self.backbone.device
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad = int(pad or 0)  # padding is masked, so any token will do
        self.rows: list[ModeRow] = []

    def note(self, exits: Exits, items: Sequence[Item], names: Mapping[str, str | None], command: str) -> None:
        """Take down what is measured, and where."""
        config, settings, backbone = exits.config, self.settings, self.backbone
        self.command = command
        self.facts: dict[str, Any] = {
            "backbone": backbone_facts(names["backbone"] or str(backbone.model_type), backbone),
            "place": describe(self.device, backbone.dtype),
            "exits": ExitFacts(
                name=names["exits"] or "",
                layers=config.layers,
                estimator=settings.measure or str(config.head),
                readout=config.readout,
            ),
            "load": Load(
                prompts=len(items),
                new=settings.new,
                repeats=settings.repeats,
                chat=settings.chat,
                kinds=Counter(item.kind for item in items if item.kind is not None),
            ),
        }

    def measure(self, items: Sequence[Item], on_part: Callable[[ExitBench], None] | None) -> None:
        """Every batch size and every mode, one after another."""
        with Stages(self.settings.quiet) as bar:
            for batch in self.settings.batches:
                several = f", batch {batch}" if len(self.settings.batches) > 1 else ""
                works = batched(items, batch, self.pad, self.device)
                self._write(works, bar.stage(f"plain generate{several}"))
                # On a GPU fewer take turns than the engine keeps programs of: building is not timed.
                size = GROUP if self.device.type == "cuda" else len(self.modes)
                for first in range(0, len(self.modes), size):
                    advance = bar.stage(f"first calls{several}")
                    ready = [mode for mode in self.modes[first : first + size] if self._built(mode, batch, works)]
                    advance(1, 1)
                    self._time(ready, batch, works, bar.stage(f"timing{several}"), on_part)

    def _write(self, works: Sequence[Work], advance: Advance) -> None:
        """Plain generate's text of every batch, with its own end: how many tokens all modes write."""
        for number, work in enumerate(works, start=1):
            options = {**GREEDY, "max_new_tokens": self.settings.new, "pad_token_id": self.pad}
            work.text = _sequences(self.model.generate(work.ids, attention_mask=work.mask, **options))
            if len(work.items) > 1:  # a row that ended before the others goes on, as it does when modes are timed
                work.text = _sequences(self._call(work)[1])
            advance(number, len(works))

    def _call(self, work: Work, mode: Mode | None = None) -> tuple[float, Any]:
        """Seconds of one call that writes as many tokens as plain generate's text has, and its output."""
        own = {} if mode is None else {"custom_generate": mode.early}
        options = {**GREEDY, "max_new_tokens": work.new, "eos_token_id": None, "pad_token_id": self.pad, **own}
        return timed(lambda: self.model.generate(work.ids, attention_mask=work.mask, **options), self.device)

    def _built(self, mode: Mode, batch: int, works: Sequence[Work]) -> bool:
        """Whether a mode runs; its first call for every number of rows, which builds what it needs."""
        try:
            for work in {len(work.items): work for work in works}.values():
                self._call(work, mode)
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except UsageError as error:
            if mode.kind == "never":
                raise
            reason = str(error).rstrip(".")
        else:
            return True
        self.left_out.append(LeftOut(label=mode.label, batch=batch, reason=reason))
        return False

    def _time(
        self,
        group: Sequence[Mode],
        batch: int,
        works: Sequence[Work],
        advance: Advance,
        on_part: Callable[[ExitBench], None] | None,
    ) -> None:
        """Modes in turns; rows are known after every repeat."""
        timings = [[Timing(work) for work in works] for _ in group]
        before, repeats, done = len(self.rows), self.settings.repeats, 0
        for repeat in range(repeats):
            for index, work in enumerate(works):
                for mode, timing in zip(group, timings, strict=True):
                    sides = (functools.partial(self._call, work), functools.partial(self._call, work, mode))
                    (plain, _), (own, timing[index].out) = in_turns(*sides, repeat + index)
                    timing[index].pairs.append((plain, own))
                    done += 1
                    advance(done, repeats * len(works) * len(group))
            self.rows[before:] = [_row(mode, batch, timing) for mode, timing in zip(group, timings, strict=True)]
            if on_part is not None:
                on_part(self.document(complete=False))

    def document(self, *, complete: bool) -> ExitBench:
        """What is known so far. The commit of a checkout is no part of it."""
        run = run_facts(self.command, time.monotonic() - self.started).model_copy(update={"commit": None})
        rows = tuple(self.rows)
        dtype = self.facts["place"].dtype
        return ExitBench(
            complete=complete,
            run=run,
            **self.facts,
            verdict=tuple(verdict(rows, dtype)),
            plain=figures.plain(rows),
            rows=rows,
            left_out=tuple(self.left_out),
        )


def _sample(timing: Timing) -> Sample:
    work, out = timing.work, timing.out
    plain, own = zip(*timing.pairs, strict=True)
    start = work.ids.shape[1]
    equal, first = parity.compared(out.sequences[:, start:], work.text[:, start:])
    differs = out.sequences != work.text
    place = None
    if first is not None:
        place = work.items[int(differs[:, start + first].nonzero()[0])].place, first + 1
    checks = out.verification
    return Sample(
        prompts=tuple(item.place for item in work.items),
        kind=work.kind,
        prompt_tokens=start,
        new=work.new,
        seconds=own,
        plain_seconds=plain,
        equal=equal,
        same=int((~differs.any(1)).sum()),
        first_difference=place,
        mean_depth=out.trace.mean_depth,
        counted_reduction=out.trace.counted_reduction,
        pass_reduction=out.trace.pass_reduction,
        verifications=None if checks is None else checks.windows,
        checked=None if checks is None else checks.accepted + checks.corrected,
        accepted=None if checks is None else checks.accepted,
    )


def _row(mode: Mode, batch: int, timings: Sequence[Timing]) -> ModeRow:
    early, out, samples = mode.early, timings[0].out, tuple(map(_sample, timings))
    return ModeRow(
        label=mode.label,
        mode=mode.kind,
        batch=batch,
        policy=early.policy.name,
        threshold=mode.threshold,
        window=early.window if early.policy.exact_state else None,
        promise=None if early.promise is None else early.promise.text,
        exact=mode.exact,
        engine=out.engine,
        kernels=tuple(out.kernels),
        overall=figures.figures(samples),
        kinds={kind: figures.figures(part) for kind, part in figures.by_kind(samples).items()},
        samples=samples,
    )


def _sequences(out: Any) -> Tensor:
    """What ``generate`` returned: the sequences, or an output that holds them where the stored config asks for it."""
    return out if isinstance(out, Tensor) else out.sequences


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Torch's threads set to ``count`` for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
