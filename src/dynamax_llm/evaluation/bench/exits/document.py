"""The results of timing saved exits on prompts as one JSON document.

    ExitBench
    ├── run, backbone, place, exits   which command, model, device and exits
    ├── load                          prompts, new tokens, repeats
    ├── verdict                       sentences: the fastest mode, exact or not, and what is slower than plain generate
    ├── plain                         tokens per second of plain ``generate``, over all pairs
    ├── rows                          one per mode and batch size: time first, then counts, then every single time
    └── left_out                      modes that were not timed, and why

Times are seconds of whole ``generate`` calls, the prompt's pass included. ``ratio`` is speed over plain ``generate``'s,
above 1 where the mode is faster. Counts are not times.
"""

from __future__ import annotations

from typing import ClassVar

from dynamax_llm.evaluation.bench.document import Place
from dynamax_llm.evaluation.common.documents import BackboneFacts, Document, Interval, Part, Run

#: The kind of all prompts together, and of those without a kind of their own beside others that have one.
ALL, OTHER = "all", "other"


class ExitFacts(Part):
    """The exits that were timed."""

    name: str
    layers: tuple[int, ...]
    estimator: str  # the head's kind, or the measure's name
    readout: str


class Load(Part):
    """The work of every mode. ``kinds``: prompts by kind, empty where the prompts name none."""

    prompts: int
    new: int  # at most
    repeats: int
    chat: bool
    kinds: dict[str, int]


class Sample(Part):
    """One batch of prompts in one mode; ``seconds`` and ``plain_seconds`` are neighbours, one pair per repeat."""

    prompts: tuple[int, ...]  # their places in the file, from 1
    kind: str | None
    prompt_tokens: int  # of the longest
    new: int  # tokens per prompt, in both
    seconds: tuple[float, ...]
    plain_seconds: tuple[float, ...]
    equal: float  # share of new tokens that are plain generate's, place by place
    same: int  # texts that are plain generate's
    first_difference: tuple[int, int] | None  # the first new token that differs: prompt, and place in its text from 1
    mean_depth: float  # share of the layers
    counted_reduction: float
    pass_reduction: float
    verifications: int | None = None  # passes that checked drafts …
    checked: int | None = None  # … the drafts in them …
    accepted: int | None = None  # … and those that were right

    @property
    def tokens(self) -> int:
        """New tokens of all rows."""
        return len(self.prompts) * self.new


class Figures(Part):
    """A mode on some prompts: time, then counts. ``ratio``: median over batches of prompts of the median over repeats,
    with its 95 % bootstrap interval over batches; least and greatest repeat where there is one batch."""

    prompts: int
    tokens: int
    tokens_per_second: float
    plain_tokens_per_second: float
    ratio: Interval
    mean_depth: float
    tokens_per_verification: float | None  # tokens that a checking pass decided: drafts accepted, or replaced
    acceptance: float | None
    equal: float
    same: int
    counted_reduction: float
    pass_reduction: float


class ModeRow(Part):
    """One mode at one batch size. ``mode``: "never" (full depth), "promise" or "threshold"; ``exact``: its text is
    plain generate's, to rounding."""

    label: str
    mode: str
    batch: int
    policy: str
    threshold: float | None = None
    window: int | None = None
    promise: str | None = None
    exact: bool
    engine: str
    kernels: tuple[str, ...] = ()
    overall: Figures
    kinds: dict[str, Figures] = {}
    samples: tuple[Sample, ...]

    @property
    def first_difference(self) -> tuple[int, int] | None:
        """The first of its samples'."""
        return next((sample.first_difference for sample in self.samples if sample.first_difference), None)


class Plain(Part):
    """Plain ``generate`` at one batch size: tokens per second by kind, all together under "all"."""

    batch: int
    tokens_per_second: dict[str, float]


class LeftOut(Part):
    """A mode that was not timed; ``batch`` is None where no batch size could be."""

    label: str
    batch: int | None = None
    reason: str


class ExitBench(Document):
    """The whole document; see the module. ``complete`` is False while a run is under way, or if it was cut off."""

    FORMAT: ClassVar[str] = "dynamax-exit-bench"
    FILE: ClassVar[str] = "exit-bench.json"
    WHAT: ClassVar[str] = "benchmark of exits"
    COMMAND: ClassVar[str] = "dynamax bench --data"

    format: str = "dynamax-exit-bench"
    version: int = 1
    complete: bool
    run: Run
    backbone: BackboneFacts
    place: Place
    exits: ExitFacts
    load: Load
    verdict: tuple[str, ...]
    plain: tuple[Plain, ...]
    rows: tuple[ModeRow, ...]
    left_out: tuple[LeftOut, ...] = ()
