"""The paper's grid: every backbone, head, task and threshold, with the full model and the baselines in the same run.

From the paper and its author's public code (arXiv 2504.20922): the pair of backbones, exits at 1/2, 5/8, 3/4 and 7/8 of
the depth, the three heads, TriviaQA with 2 examples, CoQA with none, TruthfulQA with 1, greedy, 32 new tokens, swept
thresholds, layer pruning as the baseline. Ours: how heads are trained and what their label means (docs/guide.md), the
margin rule and static depth as further baselines, agreement, consistency and wall clock beside task scores.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dynamax_llm.backbones import adapt
from dynamax_llm.backbones.loading import load, peek
from dynamax_llm.decoding.thresholds import Thresholds
from dynamax_llm.engines.plan import POLICIES
from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.harness.combine import add_to, combine
from dynamax_llm.evaluation.harness.evaluate import OnProgress, Plan, evaluate
from dynamax_llm.evaluation.harness.results import Evaluation
from dynamax_llm.evaluation.harness.settings import Subject, grid
from dynamax_llm.evaluation.harness.tasks import EvalTask, load_tasks
from dynamax_llm.exits.registries import HEADS as KINDS
from dynamax_llm.paper.heads import exits_of
from dynamax_llm.training.settings import TrainSettings

MODELS = ("mistralai/Mistral-7B-v0.3", "mistralai/Mamba-Codestral-7B-v0.1")
HEADS = ("linear", "transformer", "mamba")
TASKS = ("triviaqa", "coqa", "truthfulqa_gen")
#: The author's code swept 0.25 to 0.7; our heads' confidences estimate agreement, so higher ones are of interest too.
THRESHOLDS = (0.25, 0.4, 0.55, 0.7, 0.85, 0.95)
#: Parameters below which a model is said to answer hardly any question.
SMALL = 1_000_000_000


@dataclass(frozen=True)
class PaperPlan:
    """Models, heads, tasks and settings of a grid. ``train_data`` is needed only where trained exits are missing.

    ``limit``: documents per task. ``data_dir``: local task files, for use offline. Raises UsageError.
    """

    models: tuple[str, ...] = MODELS
    heads: tuple[str, ...] = HEADS
    tasks: tuple[str, ...] = TASKS
    thresholds: tuple[float, ...] = THRESHOLDS
    limit: int = 100
    max_new_tokens: int = 32
    data_dir: Path | None = None
    train_data: str | None = None
    training: TrainSettings = field(default_factory=TrainSettings)
    how: Plan = field(default_factory=Plan)
    policy: str = "propagate"
    dtype: str = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("models", "heads", "tasks", "thresholds"):
            values = getattr(self, name)
            if not values:
                raise UsageError(f"no {name}: give at least one.")
            twice = sorted({str(value) for value in values if values.count(value) > 1})
            if twice:
                raise UsageError(f"{name} {', '.join(twice)} given twice: name each once.")
        for head in self.heads:
            KINDS.lookup(head)
        for value in self.thresholds:
            Thresholds.parse(value, 1)
        POLICIES.lookup(self.policy)

    @property
    def names(self) -> dict[str, str]:
        """Names in the document: the end of a model's path, or all of it where two ends are the same."""
        ends = [Path(model).name for model in self.models]
        short = len(set(ends)) == len(ends)
        return {model: end if short else model.replace("/", "--") for model, end in zip(self.models, ends, strict=True)}


def run(plan: PaperPlan, out: str | Path, *, command: str = "", on_progress: OnProgress | None = None) -> Evaluation:
    """Run everything of ``plan`` that ``out`` does not hold yet; the whole document, saved as ``out``/eval.json.

    Trained exits are kept in ``out``/exits, records in ``out``/records: a killed run continues where it stopped. One
    backbone is in memory at a time. Raises whatever loading, training and evaluating raise.
    """
    folder = Path(out).expanduser()
    for model in plan.models:
        peek(model)  # a wrong name is refused before the first backbone's hours
    options = {"limit": plan.limit, "max_new_tokens": plan.max_new_tokens, "seed": plan.how.seed}
    tasks = load_tasks(plan.tasks, data_dir=plan.data_dir, **options)
    start = time.perf_counter()
    parts = [_backbone(plan, model, tasks, folder, command, on_progress) for model in plan.models]
    document = combine(parts, title="The paper's grid: " + " and ".join(plan.names.values()))
    whole = document.runs[0].model_copy(update={"seconds": time.perf_counter() - start})
    return add_to(folder, document.model_copy(update={"runs": (whole,), "notes": tuple(notes(document))}))


def _backbone(
    plan: PaperPlan, model: str, tasks: Sequence[EvalTask], folder: Path, command: str, on_progress: OnProgress | None
) -> Evaluation:
    """One backbone under all settings on all tasks."""
    name = plan.names[model]
    lm, tokenizer = load(model, dtype=plan.dtype, device_map=plan.device)
    data, settings = plan.train_data, plan.training
    exits = exits_of(model, adapt(lm), tokenizer, plan.heads, data, settings, folder / "exits" / name)
    subject = Subject(name, lm, tokenizer)
    families = {f"{head} head": trained for head, trained in exits.items()}
    variants = grid(subject, families, plan.thresholds, measures=("softmax_margin",), policy=plan.policy)

    def report(what: str, done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(f"{name}: {what}", done, total)

    found = evaluate(subject, variants, tasks, plan.how, folder, command=command, on_progress=report)
    del lm, subject, variants, exits, families
    gc.collect()
    return found


def notes(found: Evaluation) -> Iterator[str]:
    """What the document can show and what it cannot, in plain paragraphs."""
    yield (
        "This is the grid of arXiv 2504.20922 run with DYNAMAX's own heads, labels and training. The paper's own "
        "numbers are not reproduced: its tables are not quoted here, and its heads and data are not these."
    )
    small = [backbone for backbone in found.backbones if backbone.parameters < SMALL]
    if small:
        sizes = " and ".join(f"{item.name} ({item.parameters / 1e6:.1f} million parameters)" for item in small)
        scores = ", ".join(
            f"{cell.backbone} {cell.metrics[task.primary].value:.3f} on {task.name}"
            for task in found.tasks
            for cell in found.cells
            if cell.setting == "full" and cell.task == task.name
        )
        yield (
            f"{sizes}: models this small answer hardly any question. Full-depth scores here: {scores}. Task scores so "
            "near their floor cannot show what exits cost in answer quality; a setting that loses nothing there may "
            "lose much on a model that knows the answers. What such a pair does show: how often an early token is the "
            "full model's (agreement), how far the texts drift apart (ROUGE-L), how deep tokens go, what is counted "
            "and what the clock says, and that the whole grid runs. Nothing here predicts 7B models."
        )
    samples = sorted({task.samples for task in found.tasks})
    yield (
        f"Samples per task: {', '.join(map(str, samples))}. Intervals are 95 % bootstrap intervals over samples and "
        "hold for one draw of samples and one training of the heads; settings were not corrected for multiple "
        "comparison."
    )
