"""The results of a benchmark as one JSON document.

    Bench
    ├── run, backbone, place   which command, model and device; its copy bandwidth, measured in the same run
    ├── load                   prompt, new tokens, repeats, seed
    ├── rows                   one per setting and batch size: time, bytes, depth
    ├── parity                 whether the engines give the same tokens
    └── missing                what could not be measured, and why

Times are seconds unless a name says ms; bytes are counted from weight shapes, not measured. ``speed_up`` is wall clock
against full depth of the same engine, repeat by repeat in turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import ClassVar

from pydantic import AliasChoices, Field

from dynamax_llm.evaluation.common.documents import BackboneFacts, Document, Part, Run


class Spread(Part):
    """The median of some repeats, the least and the greatest of them."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(median=statistics.median(values), low=min(values), high=max(values), repeats=len(values))


class Place(Part):
    """Where it ran. ``copy_bandwidth``: bytes/s read and written by a copy of ``copy_bytes`` within the device."""

    device: str
    device_name: str
    dtype: str
    copy_bandwidth: float
    copy_bytes: int
    driver: str | None = None
    cuda: str | None = None


class Load(Part):
    """The work of every setting; ``baseline_new``: new tokens where decoding is slow (eager, transformers)."""

    prompt: int
    new: int
    baseline_new: int
    repeats: int
    seed: int
    zero_tail_from: int | None  # layers after this depth add nothing, so leaving there is always right


class Row(Part):
    """One setting at one batch size.

    ``kind``: "full" (no exit is checked), "exit" (every token leaves at ``exits``), "spread" (rows leave on their own),
    "checks" (exits are checked and no token leaves), "stock" (transformers' own generate).
    """

    label: str
    kind: str
    engine: str  # the one that ran: "cuda", "eager", "transformers", "transformers, compiled"
    kernels: tuple[str, ...] = ()
    batch: int
    policy: str | None = None
    window: int | None = None
    exits: tuple[int, ...] = ()  # depths
    #: Written as "judge" until 0.1.0.
    estimator: str | None = Field(default=None, validation_alias=AliasChoices("estimator", "judge"))
    leave: float | None = None  # of "spread": share of a row's tokens that leave …
    together: float | None = None  # … and the share of those at which all rows do
    new: int
    ms_per_token: Spread  # of one row, after the first token
    tokens_per_second: Spread  # of all rows
    speed_up: Spread | None  # against full depth of the same engine and batch size, wall clock
    first_token: Spread  # seconds of a call that generates one token
    first_call: float  # seconds of the first call of this setting, programs and kernels built in it
    building: float  # what that took longer than the median of the later ones
    mean_depth: float | None = None  # share of the layers until a token was decided, after the first
    left: float | None = None  # share of tokens that left, after the first
    pass_reduction: float | None = None
    acceptance: float | None = None  # verify: share of checked proposals that were accepted
    weight_bytes: float  # read per step
    state_bytes: float  # K/V or recurrent state read and written per step, all rows
    bandwidth: float  # weight_bytes over time, bytes/s
    bandwidth_share: float  # of the device's copy bandwidth
    state_bandwidth_share: float  # the same with state_bytes added
    peak_memory: int | None = None  # bytes allocated at most, weights and other settings' programs included


class Parity(Part):
    """Whether a setting gives the tokens of a reference; ``of`` against ``reference``.

    ``positions`` are compared given the same text so far: ``differing`` is the share whose likeliest token is another.
    ``equal``: share of tokens equal in free generation, ``first_difference`` the first new token that is not.
    """

    of: str
    reference: str
    model: str
    dtype: str
    batch: int
    positions: int
    differing: float | None
    equal: float | None = None
    first_difference: int | None = None


class Missing(Part):
    """What could not be measured."""

    label: str
    batch: int
    reason: str


class Bench(Document):
    """The whole document; see the module. ``complete`` is False while a run is under way, or if it was cut off."""

    FORMAT: ClassVar[str] = "dynamax-bench"
    FILE: ClassVar[str] = "bench.json"
    WHAT: ClassVar[str] = "benchmark"
    COMMAND: ClassVar[str] = "dynamax bench"

    format: str = "dynamax-bench"
    version: int = 1
    complete: bool
    run: Run
    backbone: BackboneFacts
    place: Place
    load: Load
    rows: tuple[Row, ...]
    #: Written as "sameness" until 0.1.0.
    parity: tuple[Parity, ...] = Field(default=(), validation_alias=AliasChoices("parity", "sameness"))
    missing: tuple[Missing, ...] = ()
