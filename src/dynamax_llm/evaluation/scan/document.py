"""The results of a scan as one JSON document, and the rule of its verdict.

    Scan
    ├── run, backbone, data   which command, model and text
    ├── layers                every layer 1..L-1: does its own argmax agree with the full model's
    ├── oracle                mean depth of leaving at the first layer, or the first exit, that agrees
    ├── points                softmax margin and the fitted estimator at each target agreement
    ├── predicted             the better of the two: what a trained head should reach, states intact
    ├── reaches               counted saving and layer passes saved at most, by state policy and rule
    ├── disturbed             what is left of it under propagate
    ├── break_even, checks    what a check may cost, and what it costs
    ├── modes                 what a trained draft and trained blocks are estimated to reach, and which to use
    └── verdict               on ordinary heads

Depths, agreement and reductions are shares 0..1 unless a name says layers; costs are multiply-accumulates.
"""

from __future__ import annotations

from typing import ClassVar

from dynamax_llm.evaluation.common.documents import BackboneFacts, Document, Interval, Part, Run

#: The agreement at which the verdict is taken.
VERDICT_AT = 0.98
#: Exits are worth it if a trained head should spare at least this share of the depth …
LEAST_DEPTH_SAVED = 0.10
#: … and under propagate at least this share of the multiply-accumulates should remain saved, every check paid.
LEAST_COUNTED = 0.02


class Data(Part):
    """The text: ``groups`` are documents, or chunks where the text has too few documents to stand apart."""

    source: str
    documents: int
    prompts: int = 0  # prompts that the model answered for this scan; 0: the text was given
    tokens: int
    groups: int
    grouped_by: str  # "document" or "chunk": what intervals and the fit draw


class Layer(Part):
    """One layer: agreement of its own argmax, and the share of tokens that some layer up to here has got right."""

    depth: int
    agreement: Interval
    settled: Interval


class Oracle(Part):
    """Mean depth of the exit rule that leaves at the first place that agrees."""

    every_layer: Interval
    exits: Interval


class Point(Part):
    """An estimator at the lowest threshold with at least the target agreement; None: no token leaves.

    Intervals are those of depth and agreement at this threshold.
    """

    rule: str  # "softmax_margin" or "fitted"
    target: float
    threshold: float | None
    depth: Interval
    agreement: Interval
    left: tuple[int, ...]  # tokens by exit, full depth last
    checks: float  # per token


class Reach(Part):
    """The most a policy could save if tokens left as under ``rule`` and no later token changed by it."""

    policy: str
    rule: str  # "oracle at every layer", "oracle", "softmax_margin" or "predicted"
    target: float | None
    counted_reduction: float
    pass_reduction: float


class BreakEven(Part):
    """What one check may cost before the saving at VERDICT_AT of the predicted rule is gone; 0 if none is there."""

    policy: str
    macs: float
    of_layer: float  # the same as a share of a mean layer


class Check(Part):
    """What one check of the default head costs at an exit, its readout included."""

    depth: int
    macs: int
    of_layer: float


class Drift(Part):
    """Mean depth at VERDICT_AT where skipped layers keep approximate state (``propagate``), on a part of the text.

    ``kept`` is the share of the margin rule's spared depth that is left of it; ``predicted`` is what a trained head
    should run if as much is left of its own, ``counted_reduction`` what it then saves.
    """

    tokens: int
    margin_intact: float
    margin: float
    kept: float
    predicted: float
    counted_reduction: float


class EstimatedDraft(Part):
    """A trained draft, its proposals verified: exact output. Costs are in passes over one token, timed here."""

    match: tuple[float, ...]  # by step, the share of proposals that match where all before did
    tokens: float  # a verification
    proposals: float  # a verification
    speed_up: Interval  # over single steps; the interval is the law's error
    step_cost: float  # of one of its steps
    pass_costs: tuple[float, ...]  # of a pass over 1, 2, … tokens
    pass_seconds: float


class EstimatedBlocks(Part):
    """Trained blocks with states intact: approximate output."""

    layers: tuple[int, ...]  # depths of their exits
    agreement: tuple[float, ...]  # by exit, if all tokens left there
    targets: tuple[float, ...]
    depth: tuple[Interval, ...]  # mean depth at each target, blocks not counted; the interval is the law's error


class Modes(Part):
    """What to train: ``use`` is "draft", "blocks" or "heads"; None: nothing that is estimated pays."""

    draft: EstimatedDraft | None  # None: no text is long enough for a chain
    blocks: EstimatedBlocks
    law: str  # what the law was fitted on
    use: str | None
    lines: tuple[str, ...]  # the verdict in words, the best first


class Verdict(Part):
    """``answer``: "worth it", "only for layer passes" or "not worth it"."""

    answer: str
    reason: str


class Scan(Document):
    """The whole document; see the module."""

    FORMAT: ClassVar[str] = "dynamax-scan"
    FILE: ClassVar[str] = "scan.json"
    WHAT: ClassVar[str] = "scan"
    COMMAND: ClassVar[str] = "dynamax scan"

    format: str = "dynamax-scan"
    version: int = 1
    run: Run
    backbone: BackboneFacts
    data: Data
    exits: tuple[int, ...]  # depths
    candidates: int
    layers: tuple[Layer, ...]
    oracle: Oracle
    points: tuple[Point, ...]
    predicted: tuple[Point, ...]
    reaches: tuple[Reach, ...]
    disturbed: Drift
    break_even: tuple[BreakEven, ...]
    checks: tuple[Check, ...]
    modes: Modes | None = None  # older scans have none
    verdict: Verdict


def verdict(depth: float, oracle: float, drift: Drift) -> Verdict:
    """From the predicted depth at VERDICT_AT with states intact, the oracle's at the same exits, and what ``propagate``
    leaves."""
    head = f"A trained head should run {depth:.2f} of the depth at {VERDICT_AT:.0%} agreement"
    if 1.0 - oracle < LEAST_DEPTH_SAVED:
        answer = "not worth it"
        reason = (
            f"Even an estimator that is always right would run {oracle:.2f} of the depth at these exits: the layers "
            "agree with the last one too late. A backbone trained with a multi-exit loss would have to come first."
        )
    elif 1.0 - depth < LEAST_DEPTH_SAVED:
        answer = "not worth it"
        reason = (
            f"{head}, sparing less than {LEAST_DEPTH_SAVED:.0%}: tokens that could leave early (oracle {oracle:.2f}) "
            "can hardly be told from those that could not."
        )
    elif drift.counted_reduction < LEAST_COUNTED:
        answer = "only for layer passes"
        reason = (
            f"{head} with states intact (defer, verify), which spares layer passes. Under propagate "
            f"{drift.predicted:.2f}, and checks, readouts and state updates then leave a counted reduction of "
            f"{drift.counted_reduction:.1%}: hardly any arithmetic less."
        )
    else:
        answer = "worth it"
        reason = (
            f"{head} with states intact (oracle {oracle:.2f}) and {drift.predicted:.2f} under propagate, for a counted "
            f"reduction of {drift.counted_reduction:.1%}."
        )
    return Verdict(answer=answer, reason=reason)
