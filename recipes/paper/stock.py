"""Does closing every exit give the harness's stock scores, to the last digit, and does opening them change them?

python recipes/paper/stock.py --data-dir tests/data/tasks [--limit 4] [--new-tokens 16] [--models mamba-ee]

Both shipped backbones, all five tasks: ``lm_eval.simple_evaluate`` with the stock class HFLM against ``evaluate`` under
the full model, the shipped Mamba head at "never", and at 0.5. Prints a Markdown table; exit code 1 if any score of the
first two differs, or if no log-likelihood score of the last does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import lm_eval
import lm_eval.tasks
from lm_eval.models.huggingface import HFLM

from dynamax_llm.backbones.loading import REFERENCE_BACKBONES, load
from dynamax_llm.evaluation.harness.evaluate import Plan, evaluate
from dynamax_llm.evaluation.harness.settings import Subject, by_head, full
from dynamax_llm.evaluation.harness.tasks import LOCAL, EvalTask, load_tasks
from dynamax_llm.exits.artifact import Exits

BATCH, OPEN = 2, 0.5


def main() -> int:
    """Compare and print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--models", nargs="+", default=REFERENCE_BACKBONES, choices=REFERENCE_BACKBONES)
    options = parser.parse_args()
    tasks = load_tasks(list(LOCAL), data_dir=options.data_dir, limit=options.limit, max_new_tokens=options.new_tokens)
    print("| backbone | task | scores | full model | never | at 0.5: first score, stock |")
    print("|---|---|---|---|---|---|")
    wrong, moved = 0, 0
    for name in options.models:
        model, tokenizer = load(name)
        subject, exits = Subject(name, model, tokenizer), Exits.from_pretrained(name)
        settings = [full(subject, exits), by_head(subject, exits, "never"), by_head(subject, exits, OPEN)]
        with tempfile.TemporaryDirectory() as folder:
            cells = evaluate(subject, settings, tasks, Plan(batch=BATCH, timed=0, examples=0), folder).cells
        for task in tasks:
            expected = stock(subject, task)
            own = [
                {key: metric.value for key, metric in cell.metrics.items()}
                for cell in cells
                if cell.task == task.facts.name
            ]
            same = [scores == {key: expected[key] for key in scores} for scores in own]
            wrong += same[:2].count(False)
            moved += task.facts.kind == "loglikelihood" and not same[2]
            first = next(iter(own[2]))
            said = " | ".join("same" if one else "**differs**" for one in same[:2])
            moves = f"{own[2][first]!r}, {float(expected[first])!r}"
            print(f"| {name} | {task.facts.name} | {len(own[0])} | {said} | {moves} |", flush=True)
    return 1 if wrong or not moved else 0


def stock(subject: Subject, task: EvalTask) -> dict[str, float]:
    """The harness's own results with its own class."""
    place = Path(lm_eval.tasks.__file__).parent / LOCAL[task.facts.name].folder
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=BATCH),
        tasks=[task.task],
        limit=len(task.docs),
        bootstrap_iters=0,
        log_samples=False,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(place)),
    )
    return found["results"][task.facts.name]


if __name__ == "__main__":
    sys.exit(main())
