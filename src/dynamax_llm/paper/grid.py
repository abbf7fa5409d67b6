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
from pathlib import Path
from typing import Any

from dynamax_llm.backbones import adapt
from dynamax_llm.backbones.loading import load, peek
from dynamax_llm.evaluation.harness.combine import add_to, combine
from dynamax_llm.evaluation.harness.evaluate import OnProgress, evaluate
from dynamax_llm.evaluation.harness.plan import MARGIN
from dynamax_llm.evaluation.harness.results import Evaluation
from dynamax_llm.evaluation.harness.settings import Subject, grid
from dynamax_llm.evaluation.harness.tasks import EvalTask, load_tasks
from dynamax_llm.paper.heads import exits_of
from dynamax_llm.paper.plan import PaperPlan

#: Parameters below which a model is said to answer hardly any question.
SMALL = 1_000_000_000


def run(plan: PaperPlan, out: str | Path, *, command: str = "", on_progress: OnProgress | None = None) -> Evaluation:
    """Run everything of ``plan`` that ``out`` does not hold yet; the whole document, saved as ``out``/eval.json.

    Trained exits are kept in ``out``/exits, records in ``out``/records: a killed run continues where it stopped. One
    backbone is in memory at a time. Raises whatever loading, training and evaluating raise.
    """
    folder = Path(out).expanduser()
    for model in plan.models:
        peek(model)  # a wrong name is refused before the first backbone's hours
    options: dict[str, Any] = {"limit": plan.limit, "max_new_tokens": plan.max_new_tokens, "seed": plan.how.seed}
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
    variants = grid(subject, families, plan.thresholds, measures=(MARGIN,), policy=plan.policy, engine=plan.engine)

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
