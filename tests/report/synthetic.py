"""A made-up evaluation with everything in it: what a report must be able to show. No number in it was measured."""

from __future__ import annotations

import math
from typing import Any

from dynamax_llm.evaluation.harness.results import (
    BackboneFacts,
    Bin,
    Cell,
    Evaluation,
    Example,
    Interval,
    Metric,
    Reliability,
    Run,
    Setting,
    Shift,
    ShownToken,
    TaskFacts,
)

HOSTILE = "<script>alert('x')</script> & \"quotes\" ]]> <img src=x onerror=alert(1)>"
FIT = {"mamba": 1.0, "transformer": 1.25, "linear": 1.9, "softmax_margin": 1.45}
THRESHOLDS = (0.95, 0.9, 0.8, 0.65, 0.5)
BACKBONES = (
    BackboneFacts(name="tfm-demo", model_type="mistral", n_layers=16, parameters=7_600_000, fingerprint="a1b2c3d4"),
    BackboneFacts(name="ssm-demo", model_type="mamba2", n_layers=24, parameters=7_900_000, fingerprint="e5f6a7b8"),
)
TASKS = (
    TaskFacts(
        name="triviaqa", kind="generate", shots=2, samples=64, source="triviaqa_dev.jsonl", sha256="9f" * 32,
        primary="exact_match,remove_whitespace", max_new_tokens=32,
    ),
    TaskFacts(
        name="coqa", kind="generate", shots=0, samples=64, source="coqa_dev.jsonl", sha256="8e" * 32,
        primary="f1,none", max_new_tokens=32,
    ),
    TaskFacts(
        name="truthfulqa_mc2", kind="loglikelihood", shots=1, samples=48, source="truthfulqa_mc.jsonl", sha256=None,
        primary="acc,none",
    ),
)  # fmt: skip


def evaluation(*, timed: bool = True, backbones: tuple[BackboneFacts, ...] = BACKBONES) -> Evaluation:
    """Two backbones, three tasks, heads, a measure and baselines; promises, shifts and hostile text."""
    return Evaluation(
        title="Synthetic evaluation: every part of a report",
        notes=(
            "Every number here was made up by a formula, to show and to test the report.",
            f"Text from data is shown as text: {HOSTILE}",
        ),
        runs=(
            Run(
                command="dynamax eval tfm-demo --tasks triviaqa,coqa,truthfulqa_mc2 --out " + "long-folder/" * 8,
                created="2026-01-02T03:04:05+00:00",
                seconds=1234.5,
                hardware="2 cores of a made-up CPU",
                versions={"dynamax": "0.1.0", "torch": "2.9.0", "transformers": "5.23.0", "lm_eval": "0.4.13"},
                commit="0123abcd",
            ),
        ),
        backbones=backbones,
        settings={item.name: settings(item) for item in backbones},
        tasks=TASKS,
        cells=tuple(
            cell(item, setting, task, timed) for item in backbones for setting in settings(item) for task in TASKS
        ),
        examples=tuple(example(item, kind) for item in backbones for kind in range(3)),
        reliability=tuple(
            curve(item, family, at) for item in backbones for family in ("mamba", "linear") for at in range(4)
        ),
        promises={item.name: promises(item) for item in backbones},
        shifts=tuple(
            shift(item, where, value)
            for item in backbones
            for where, value in (("dialogues", 0.986), ("novels", 0.961))
        ),
    )


def single() -> Evaluation:
    """The least that is an evaluation: one cell, nothing timed, and None wherever it is allowed."""
    backbone, task = BACKBONES[0], TASKS[2]
    setting = settings(backbone)[1]
    alone = cell(backbone, setting, task, False).model_copy(
        update={
            "agreement": None, "metrics": {}, "histogram": {}, "mean_depth": Interval(value=1.0),
            "counted_reduction": Interval(value=0.0), "pass_reduction": None, "degenerate": None,
        }
    )  # fmt: skip
    return Evaluation(
        title="One cell",
        runs=(),
        backbones=(backbone,),
        settings={backbone.name: (setting,)},
        tasks=(task,),
        cells=(alone,),
    )


def exits(backbone: BackboneFacts) -> tuple[int, ...]:
    return tuple(backbone.n_layers * eighths // 8 for eighths in (4, 5, 6, 7))


def settings(backbone: BackboneFacts) -> tuple[Setting, ...]:
    places = exits(backbone)
    common: dict[str, Any] = {"layers": places, "policy": "propagate", "window": 16, "readout": "head"}
    never: dict[str, Any] = common | {"thresholds": (None,) * 4}
    heads = [
        Setting(
            id=f"{family}@{value:g}", kind="measure" if "_" in family else "head", family=family,
            **common, thresholds=(value,) * 4,
        )
        for family in FIT
        for value in THRESHOLDS
    ]  # fmt: skip
    static = [
        Setting(
            id=f"static@{place}",
            kind="static",
            family="static",
            **(common | {"thresholds": tuple(0.0 if place == p else None for p in places)}),
        )
        for place in places
    ]
    pruned = [Setting(id=f"pruned-{count}", kind="pruned", family="pruned", **never) for count in (2, 4, 6)]
    return (Setting(id="full", kind="full", family="full", **never), *heads, *static, *pruned)


def cell(backbone: BackboneFacts, setting: Setting, task: TaskFacts, timed: bool = True) -> Cell:
    """A plausible cell: less depth is less agreement, by how well the family fits."""
    saved, lost = trade(setting, backbone)
    saved, lost = saved * (1 - 0.08 * TASKS.index(task)), lost * (1.6 if backbone.name.startswith("ssm") else 1)
    hard = 1 + 0.35 * TASKS.index(task)
    agreement = max(1 - lost * hard, 0.03)
    text = task.kind == "generate"
    base = (0.21, 0.34, 0.41)[TASKS.index(task)]
    score = base * (1 - 0.6 * lost * hard)
    clock = 1 + 0.75 * saved - (0.02 if setting.kind == "full" else 0.085 if setting.kind in ("head", "measure") else 0)
    measured = timed and text and setting.kind != "full"
    full = setting.kind == "full"
    bleu = Metric(value=21.5 * score, low=None, high=None, delta=Interval(value=21.5 * (score - base)))
    return Cell(
        backbone=backbone.name,
        setting=setting.id,
        task=task.name,
        samples=task.samples,
        tokens=task.samples * 30,
        metrics={
            task.primary: Metric(value=score, low=score - 0.05, high=score + 0.05, delta=about(score - base, 0.02)),
            **({"bleu_max,none": bleu} if text else {}),
        },
        agreement=about(agreement, 0 if full else 0.008),
        rouge_l=about(max(agreement - 0.1 * lost, 0.02), 0.02) if text else None,
        identical=max(1 - 6 * lost, 0.0) if text else None,
        first_divergence=(None if full else max(14.5 - 30 * lost, 1.0)) if text else None,
        degenerate=about(0.03 + 0.3 * lost, 0.015) if text else None,
        mean_depth=about(1 - saved, 0 if full else 0.012),
        histogram=histogram(backbone, 1 - saved, task.samples * 30, setting),
        counted_reduction=about(0.0 if full else saved * 0.93 - 0.012, 0 if full else 0.012),
        pass_reduction=saved * 0.8 if text else None,
        speed_up=Interval(value=clock, low=clock - 0.035, high=clock + 0.035) if measured else None,
        timed_samples=8 if measured else 0,
    )  # fmt: skip


def trade(setting: Setting, backbone: BackboneFacts) -> tuple[float, float]:
    """Share of depth saved, share of tokens lost."""
    if setting.kind == "full":
        return 0.0, 0.0
    if setting.kind == "static":
        saved = 1 - int(setting.id.partition("@")[2]) / backbone.n_layers
        return saved, 0.9 * saved**0.75
    if setting.kind == "pruned":
        saved = int(setting.id.partition("-")[2]) / backbone.n_layers
        return saved, min(1.6 * saved**0.5, 0.97)
    eager = 1 - (setting.thresholds[0] or 0.0)
    saved = 0.42 * (1 - math.exp(-4.2 * eager)) / FIT[setting.family] ** 0.5
    return saved, 0.9 * FIT[setting.family] * saved**2.3


def histogram(backbone: BackboneFacts, depth: float, tokens: int, setting: Setting) -> dict[int, int]:
    if setting.kind == "static":
        return {int(setting.id.partition("@")[2]): tokens - tokens // 30, backbone.n_layers: tokens // 30}
    if setting.kind in ("full", "pruned"):
        return {round(depth * backbone.n_layers): tokens}
    early = round(tokens * min(1.6 * (1 - depth), 0.9))
    shares = (0.4, 0.25, 0.2, 0.15)
    counts = {place: round(early * share) for place, share in zip(exits(backbone), shares, strict=True)}
    return counts | {backbone.n_layers: tokens - sum(counts.values())}


def about(value: float, half: float) -> Interval:
    """An interval around a value; shares stay at or below 1."""
    return Interval(
        value=value, low=value - half, high=max(min(value + half, 1.0), value) if value <= 1 else value + half
    )


def example(backbone: BackboneFacts, kind: int) -> Example:
    """Three kinds: plain, hostile, and one with a long prompt, line ends and unusual characters."""
    places = (*exits(backbone), backbone.n_layers)
    words = (
        [
            "The",
            "river",
            "rose",
            "in",
            "the",
            "night",
            "and",
            "by",
            "morning",
            "the",
            "lower",
            "fields",
            "were",
            "under",
            "water",
            ".",
        ],
        [HOSTILE, "</p>", "a&b", "\"'", "javascript:alert(1)", "{{x}}", "$x$"],
        ["line", "\n", "日本語", "", "naïve", "\t", "🙂", "W" * 90],
    )[kind]
    tokens = tuple(
        ShownToken(
            text=word if kind else f" {word}",
            layers=places[(at * 7 + kind) % 5],
            full=word if at % 4 else (HOSTILE if kind == 1 else " other"),
            agrees=bool(at % 4),
        )
        for at, word in enumerate(words)
    )
    return Example(
        backbone=backbone.name,
        setting="mamba@0.8",
        task=TASKS[kind % 2].name,
        prompt=("Question: what rose in the night?\nAnswer:", f"Read this: {HOSTILE}", "Example. " * 200)[kind],
        tokens=tokens,
        full_text=(
            "The river rose in the night and by dawn the meadows stood in water.",
            HOSTILE,
            "line\n日本語 naïve 🙂",
        )[kind],
    )


def curve(backbone: BackboneFacts, family: str, at: int) -> Reliability:
    bend = (FIT[family] - 1) * 0.2 + 0.02 * at
    bins = tuple(
        Bin(
            confidence=(at_bin + 0.5) / 10,
            right=max((at_bin + 0.5) / 10 - bend * (1 - at_bin / 10), 0),
            tokens=40 + 25 * at_bin**2,
        )
        for at_bin in range(10)
    )
    return Reliability(backbone=backbone.name, family=family, layer=exits(backbone)[at], bins=bins, error=bend / 2)


def promises(backbone: BackboneFacts) -> tuple[dict[str, Any], ...]:
    steps = [
        {
            "parameter": 0.99 - 0.06 * at, "thresholds": [0.99 - 0.06 * at] * 4, "estimate": 0.999 - 0.0009 * at**2,
            "p_value": min(1e-4 * 3.1**at, 1.0), "mean_depth": 0.99 - 0.035 * at, "kept": at < 5,
        }
        for at in range(9)
    ]  # fmt: skip
    kept = steps[4]
    common = {
        "n": 400, "n_path": 100, "unit": "sequences", "parameter": kept["parameter"],
        "thresholds": [*kept["thresholds"][:3], None], "estimate": kept["estimate"], "p_value": kept["p_value"],
        "mean_depth": kept["mean_depth"], "policy": "propagate", "window": 16, "readout": "head", "estimator": "mamba",
        "data": {"source": "wikipedia.jsonl", "sha256": "7d" * 32, "tokens": 98_304},
        "fingerprint": backbone.fingerprint, "dynamax": "0.1.0", "date": "2026-01-02T03:04:05+00:00", "evidence": steps,
    }  # fmt: skip
    return (
        {
            **common, "text": "agreement>=0.98", "measure": "agreement", "bound": 0.98, "confidence": 0.95,
            "method": "ltt",
        },
        {
            **common, "text": "risk:f1<=0.02", "measure": "risk:f1", "bound": 0.02, "confidence": None, "method": "crc",
            "p_value": None, "evidence": [], "thresholds": [None] * 4,
        },
    )  # fmt: skip


def shift(backbone: BackboneFacts, where: str, value: float) -> Shift:
    return Shift(
        backbone=backbone.name, promise="agreement>=0.98", calibrated_on="wikipedia", measured_on=where, samples=200,
        value=about(value, 0.004), mean_depth=0.81, kept=value >= 0.98,
    )  # fmt: skip
