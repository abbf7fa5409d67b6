"""What blocks and a draft do on held-out chat prompts: the model's own greedy answers, teacher-forced.

    python recipes/smollm2/measure.py MODEL --exits DIR --prompts heldout.jsonl --out FILE [--device cuda]

DIR holds block/ and draft/ of ``train.py``. Depth and agreement: thresholds are fitted on half of the prompts and
applied to the other half, both ways. Depths count the block as one layer more ("with block") or not. Costs are counted
in weights; nothing here is timed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from recipes.common import conditions, parsed, parser
from torch import Tensor

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.backbones.loading import load
from dynamax_llm.decoding.draft_choice import ChainCosts
from dynamax_llm.decoding.trace import TokenCosts
from dynamax_llm.engines.plan import POLICIES, ExitPlan
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.text.answers import make_answers
from dynamax_llm.text.batches import Batch, pad
from dynamax_llm.text.prompts import read_prompts
from dynamax_llm.text.settings import AnswerSettings
from dynamax_llm.traces.chain_choice import prompts_of
from dynamax_llm.traces.chain_trace import best_threshold, record_chains
from dynamax_llm.traces.collect import collect_exits
from dynamax_llm.traces.curves import oracle_depth, sweep
from dynamax_llm.traces.simulate import simulate_no_exit
from dynamax_llm.traces.teacher_forced import teacher_forced
from dynamax_llm.traces.thresholds import shallowest, threshold_for_agreement
from dynamax_llm.training.held_out import Decoded

ROWS = 16
TARGETS = (0.95, 0.98, 0.99)


def batches_by_kind(backbone: Backbone, tokenizer: object, args: object) -> dict[str, list[Batch]]:
    """Prompts with the model's greedy answers, by kind of prompt, as they alternate between the two halves."""
    prompts = read_prompts(args.prompts)
    settings = AnswerSettings(sampled=0.0, rows=args.rows, max_new_tokens=args.max_new_tokens)
    answers = make_answers(backbone.model, tokenizer, prompts, settings, args.out.parent / "heldout-answers")
    kinds: dict[str, list] = {}
    for number in range(len(answers)):
        row = answers[number]
        kinds.setdefault(prompts[row.index].kind or "all", []).append(row)
    made: dict[str, list[Batch]] = {}
    for kind, rows in kinds.items():
        made[kind] = []
        for half in (0, 1):
            mine = sorted(rows[half::2], key=lambda row: len(row.ids))
            for start in range(0, len(mine), ROWS):
                group = mine[start : start + ROWS]
                batch = pad([list(row.ids) for row in group])
                places = torch.arange(batch.ids.shape[1])
                prompt = torch.tensor([row.prompt for row in group])[:, None]
                length = torch.tensor([len(row.ids) for row in group])[:, None]
                answered = (places >= prompt - 1) & (places < length - 1)
                made[kind].append(replace(batch, answers=answered))
            made[kind].append(None)  # the end of a half
    return made


def halves(batches: list[Batch | None]) -> list[list[Batch]]:
    """The two halves."""
    cut = batches.index(None)
    return [batches[:cut], batches[cut + 1 : -1]]


def depth_report(backbone: Backbone, exits: Exits, kinds: dict[str, list], name: str | None) -> dict:
    """Depth and agreement with intact states, by kind and over all, for the head or a measure."""
    estimator, readout = exits.estimator(name), exits.readout(backbone)
    layers, n_layers = exits.config.layers, backbone.n_layers
    plan = ExitPlan(layers, estimator, readout, POLICIES.lookup("propagate"))
    costs = TokenCosts.of(backbone.costs(), plan)
    traces: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for kind, batches in kinds.items():
        for part in halves(batches):
            found = []
            for batch in part:
                shown = collect_exits(backbone, readout, batch)
                wanted = batch.answers.to(shown.mask.device)
                found.append((simulate_no_exit(estimator, shown).confidence[:, wanted], shown.labels[:, wanted]))
            traces.setdefault(kind, []).append(tuple(torch.cat(each, dim=1) for each in zip(*found, strict=True)))
    traces["all"] = [
        tuple(torch.cat([traces[kind][half][part] for kind in kinds], dim=1) for part in (0, 1)) for half in (0, 1)
    ]
    report = {}
    for kind, (first, second) in traces.items():
        both = torch.cat((first[1], second[1]), dim=1)
        row = report[kind] = {
            "tokens": both.shape[1],
            "agreement_if_all_leave": both.double().mean(1).tolist(),
            "oracle_depth": oracle_depth(both, layers, n_layers) / n_layers,
        }
        for target in TARGETS:
            points = [
                applied(sweep(*fitted, layers, n_layers).depth_at(target)[1], other, layers, n_layers, costs)
                for fitted, other in ((first, second), (second, first))
            ]
            row[str(target)] = {key: sum(point[key] for point in points) / 2 for key in points[0]}
    return report


def applied(threshold: float, trace: tuple[Tensor, Tensor], layers: tuple, n_layers: int, costs: TokenCosts) -> dict:
    """One threshold on confidences and labels (E, N)."""
    confidence, labels = trace
    leaves = torch.cat((confidence >= threshold, torch.ones_like(labels[:1])))
    where = leaves.int().argmax(0)
    agrees = torch.cat((labels, torch.ones_like(labels[:1]))).gather(0, where[None])[0]
    depths = torch.tensor([*layers, n_layers], device=where.device).double()
    blocks = (where < len(layers)).double()
    macs = torch.tensor(costs.by_exit, device=where.device).double()[where].mean()
    return {
        "threshold": threshold,
        "depth": float(depths[where].mean()) / n_layers,
        "depth_with_block": float((depths[where] + blocks).mean()) / n_layers,
        "agreement": float(agrees.double().mean()),
        "counted_reduction": 1.0 - float(macs) / costs.full,
    }


def propagate_report(backbone: Backbone, exits: Exits, kinds: dict[str, list], target: float, policy: str) -> dict:
    """Depth under a policy over all kinds: the threshold fitted on one half, applied to the other."""
    plan = ExitPlan(exits.config.layers, exits.estimator(), exits.readout(backbone), POLICIES.lookup(policy))
    costs = TokenCosts.of(backbone.costs(), plan)

    def measured(part: list[Batch]) -> object:
        full = [
            teacher_forced(backbone, plan, b.ids.to(backbone.device), [None] * len(plan.layers)).tokens for b in part
        ]

        def at(threshold: float) -> Decoded:
            where, agree = [], 0
            for batch, tokens in zip(part, full, strict=True):
                wanted = batch.answers.to(backbone.device)
                start = wanted.int().argmax(1) + 1
                forced = teacher_forced(
                    backbone,
                    plan,
                    batch.ids.to(backbone.device),
                    [threshold] * len(plan.layers),
                    prompt_length=start,
                    wanted=wanted,
                )
                agree += int((forced.tokens[wanted] == tokens[wanted]).sum())
                where.append(forced.exit_index[wanted].cpu())
            left = torch.cat(where)
            depth = costs.layers(left).double().mean() / backbone.n_layers
            macs = torch.tensor(costs.by_exit, dtype=torch.float64)[left].mean()
            return Decoded(threshold, float(depth), agree / len(left), 1.0 - float(macs) / costs.full)

        return at

    parts = [[batch for batches in kinds.values() for batch in halves(batches)[half]] for half in (0, 1)]
    points = []
    for fitted, other in ((0, 1), (1, 0)):
        best = shallowest(threshold_for_agreement(measured(parts[fitted]), target, steps=9), target)
        points.append(measured(parts[other])(1.1 if best is None else best.threshold))
    keys = ("threshold", "depth", "agreement", "counted_reduction")
    return {key: sum(getattr(point, key) for point in points) / 2 for key in keys}


def draft_report(backbone: Backbone, exits: Exits, kinds: dict[str, list]) -> dict:
    """Matches by step, and tokens per verification at the threshold that pays by weights read."""
    draft = exits.readout(backbone).macs(0) / backbone.costs().total
    report: dict = {"draft_step_in_weights": draft}
    for kind, batches in kinds.items():
        trace = record_chains(backbone, exits, prompts_of([batch for batch in batches if batch is not None]))
        if trace is None:
            continue
        steps = trace.confidence.shape[1]
        choice = best_threshold(trace, ChainCosts(draft=draft, passes=(1.0,) * (steps + 1)))
        row = report[kind] = {"match": trace.match, "chains": len(trace), "head": vars(choice)}
        row["tokens_if_all_steps"] = trace.outcome(0.0, steps)[0]
    return report


def main() -> None:
    made = parser(__doc__, "model", "device")
    made.add_argument("--exits", type=Path, required=True)
    made.add_argument("--prompts", required=True)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--rows", type=int, default=128)
    made.add_argument("--max-new-tokens", type=int, default=224)
    args = parsed(made)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(args.model, device_map=args.device)
    backbone = adapt(model)
    kinds = batches_by_kind(backbone, tokenizer, args)
    record: dict = {"conditions": conditions(args.device)}
    if (args.exits / "block").is_dir():
        exits = Exits.from_pretrained(args.exits / "block")
        exits.heads.to(backbone.device)
        for name in (None, "softmax_margin"):
            record[f"intact, {name or 'head'}"] = depth_report(backbone, exits, kinds, name)
        for policy in ("propagate", "defer"):
            record[policy] = propagate_report(backbone, exits, kinds, 0.98, policy)
    if (args.exits / "draft").is_dir():
        exits = Exits.from_pretrained(args.exits / "draft")
        exits.heads.to(backbone.device)
        record["draft"] = draft_report(backbone, exits, kinds)
    args.out.write_text(json.dumps(record, indent=1))
    show(record)


def show(record: dict) -> None:
    """The figures that the bars ask for."""
    for name, report in record.items():
        if name.startswith("intact"):
            for kind, row in report.items():
                at = row["0.98"]
                print(
                    f"{name:16} {kind:8} oracle {row['oracle_depth']:.3f}  at 98 %: depth {at['depth']:.3f} "
                    f"({at['depth_with_block']:.3f} with block), agreement {at['agreement']:.3f}, counted reduction "
                    f"{at['counted_reduction']:.3f}"
                )
        elif name in ("propagate", "defer"):
            print(name, {key: round(value, 4) for key, value in report.items()})
        elif name == "draft":
            print("draft step in weights", round(report["draft_step_in_weights"], 4))
            for kind, row in report.items():
                if isinstance(row, dict):
                    steps = " ".join(f"{value:.2f}" for value in row["match"])
                    print(
                        f"draft {kind:8} match {steps}; tokens a verification: head {row['head']['tokens']:.2f} with "
                        f"{row['head']['proposals']:.1f} proposals (counted {row['head']['speed_up']:.2f}), "
                        f"all {len(row['match'])} {row['tokens_if_all_steps']:.2f}"
                    )


if __name__ == "__main__":
    main()
