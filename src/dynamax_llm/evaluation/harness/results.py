"""The results of an evaluation as one JSON document: ``dynamax eval`` and ``paper`` write it, ``report`` reads it.

    Evaluation
    ├── runs         which command, versions and hardware made it
    ├── backbones    which models were evaluated
    ├── tasks        on which documents
    ├── cells        one per backbone x setting x task: quality, consistency, depth, cost and time
    ├── examples     a few texts token by token, for reading
    ├── reliability  how often a head that says p is right, per exit
    ├── promises     what calibration guarantees (``Promise.to_json`` of the artifact)
    └── shifts       a promise measured on other text than it was calibrated on

Depths, reductions, agreement, ROUGE-L and rates are shares 0..1 unless a name says layers; times are seconds.
"""

from __future__ import annotations

from typing import Any, ClassVar

from dynamax_llm.evaluation.common.documents import BackboneFacts, Document, Interval, Part, Run


class Setting(Part):
    """How it is decided where tokens leave.

    ``kind``: "full" (stock model), "head" (a trained exit head), "measure" (a confidence measure), "static" (every
    token leaves at one exit), "pruned" (the last-but-one layers removed, the paper's baseline).
    ``id`` is unique within a backbone; settings of one ``family`` differ in their threshold or depth alone and make a
    line in a plot. ``thresholds``: per exit, None where no token may leave.
    """

    id: str
    kind: str
    family: str
    layers: tuple[int, ...]
    thresholds: tuple[float | None, ...]
    policy: str
    window: int
    readout: str
    promise: str | None = None


class TaskFacts(Part):
    """A task: the harness's name, "generate" or "loglikelihood", and where its documents came from."""

    name: str
    kind: str
    shots: int
    samples: int
    source: str
    sha256: str | None
    primary: str  # the metric a plot shows
    max_new_tokens: int | None = None


class Metric(Part):
    """A task metric under the harness's own name, and its paired difference to the full model on the same samples."""

    value: float
    low: float | None
    high: float | None
    delta: Interval


class Cell(Part):
    """One backbone under one setting on one task. None where a figure does not apply (no text on log-likelihood)."""

    backbone: str
    setting: str
    task: str
    samples: int
    tokens: int
    metrics: dict[str, Metric]
    agreement: Interval | None  # teacher-forced on the full model's own output
    rouge_l: Interval | None  # to the full model's text
    identical: float | None  # share of outputs equal to the full model's
    first_divergence: float | None  # median token index among outputs that differ
    degenerate: Interval | None  # share of outputs that are blank or repeat themselves; counted, never left out
    mean_depth: Interval
    histogram: dict[int, int]  # tokens by layers run
    counted_reduction: Interval
    pass_reduction: float | None
    speed_up: Interval | None  # wall clock, paired with the full model in the same engine, batch 1
    timed_samples: int


class ShownToken(Part):
    """A piece of generated text: layers run for it, and the full model's token there."""

    text: str
    layers: int
    full: str
    agrees: bool


class Example(Part):
    """One sample of a cell for reading."""

    backbone: str
    setting: str
    task: str
    prompt: str
    tokens: tuple[ShownToken, ...]
    full_text: str


class Bin(Part):
    """Tokens whose confidence lies around ``confidence``: how many, and the share the exit got right."""

    confidence: float
    right: float
    tokens: int


class Reliability(Part):
    """Calibration curve of one exit's head; ``error`` is the expected calibration error."""

    backbone: str
    family: str
    layer: int
    bins: tuple[Bin, ...]
    error: float


class Shift(Part):
    """A promise measured on text of a kind: the share or score it bounds, and whether the bound holds there."""

    backbone: str
    promise: str
    calibrated_on: str
    measured_on: str
    samples: int
    value: Interval
    mean_depth: float
    kept: bool


class Evaluation(Document):
    """The whole document; see the module."""

    FORMAT: ClassVar[str] = "dynamax-eval"
    FILE: ClassVar[str] = "eval.json"
    WHAT: ClassVar[str] = "evaluation"
    COMMAND: ClassVar[str] = "dynamax eval"

    format: str = "dynamax-eval"
    version: int = 1
    title: str
    notes: tuple[str, ...] = ()  # plain paragraphs for the report: what this can and cannot show
    runs: tuple[Run, ...]
    backbones: tuple[BackboneFacts, ...]
    settings: dict[str, tuple[Setting, ...]]  # by backbone name
    tasks: tuple[TaskFacts, ...]
    cells: tuple[Cell, ...]
    examples: tuple[Example, ...] = ()
    reliability: tuple[Reliability, ...] = ()
    promises: dict[str, tuple[dict[str, Any], ...]] = {}  # by backbone name
    shifts: tuple[Shift, ...] = ()
