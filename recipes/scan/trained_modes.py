"""Does a scan estimate what trained blocks and a trained draft reach? Both on the same tokens; and the law's own fit.

    python recipes/scan/trained_modes.py MODEL --exits DIR --prompts heldout.jsonl --count 40 --skip 0 --out FILE.pt
    python recipes/scan/trained_modes.py MODEL --exits DIR --text FILE --out FILE.pt
    python recipes/scan/trained_modes.py --fit FILE.pt … [--test FILE.pt …]

DIR holds block/ and draft/ (recipes/smollm2/train.py). The first two forms record, of a text or of greedy answers, what
the law reads of each token and what the trained exits did there. ``--fit`` fits the laws on records, with each kind of
prompt left out in turn, prints estimated beside reached, and the coefficients for ``evaluation/scan/law.py``.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import Tensor

import dynamax_llm as dx
from dynamax_llm.backbones import adapt
from dynamax_llm.decoding.draft_choice import ChainCosts
from dynamax_llm.evaluation.scan.collect import Chunk, Depths, batch_of, gather, packed, read
from dynamax_llm.evaluation.scan.estimator import logistic
from dynamax_llm.evaluation.scan.trained_modes import (
    DRAFT_RIDGE,
    RIDGE,
    STEPS,
    Law,
    estimate_blocks,
    estimate_draft,
    expanded,
    law_inputs,
)
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.readouts.base import build_readout
from dynamax_llm.text.answer_source import AnswerSource
from dynamax_llm.text.answers import make_answers
from dynamax_llm.text.prompts import read_prompts
from dynamax_llm.text.settings import AnswerSettings
from dynamax_llm.traces.chain_trace import ChainTrace, best_threshold
from dynamax_llm.traces.chains import chain
from dynamax_llm.traces.collect import hidden_at
from dynamax_llm.traces.curves import sweep

#: Parts of the answers, each as large as what a scan reads.
PARTS = 5
#: Costs at which drafts are compared here: the passes of SmolLM2 on two CPU cores, about.
COSTS = ChainCosts(draft=0.12, passes=(1.0, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9))


@torch.no_grad()
def trained(backbone, exits: tuple[dx.Exits, dx.Exits], chunks: list[Chunk], tokens: int) -> dict[str, Tensor]:
    """Per scanned token: margin and agreement of the trained blocks (E, n), matches and margins of chains (J, n) that
    start there, by step, and whether the step's token is scanned."""
    block, draft = (each.readout(backbone) for each in exits)
    layers, parts, done = block.config.layers, [], 0
    for group in packed(chunks, ScanSize.batch_tokens):
        batch, wanted = batch_of(group)
        hidden = hidden_at(backbone, (0, *layers, *draft.taps), batch.ids)
        target = torch.full(wanted.shape, -1)
        target[wanted] = torch.cat(
            [backbone.readout(h[None])[0].argmax(-1) for h in hidden[backbone.n_layers][wanted].split(512)]
        )
        found: list[list[Tensor]] = [[], [], [], [], []]
        for exit, depth in enumerate(layers):
            moved = block.transform(exit, hidden[depth])[0][wanted]
            top = block.scores(exit, moved[None])[0].softmax(-1).topk(2)
            found[0].append(top.values[:, 0] - top.values[:, 1])
            found[1].append(spoken(block, top.indices[:, 0]) == target[wanted])
        count = batch.ids.shape[1] - STEPS + 1
        forks = torch.arange(max(count, 1))
        for step, (outputs, _) in enumerate(chain(draft.weights, draft.taps, hidden, forks, STEPS if count > 0 else 1)):
            top = draft.scores(0, outputs).softmax(-1).topk(2)
            later = torch.full_like(target, -1)
            later[:, : target.shape[1] - step] = target[:, step:]
            margin, match = torch.zeros(wanted.shape), torch.zeros(wanted.shape, dtype=torch.bool)
            margin[:, forks] = top.values[..., 0] - top.values[..., 1]
            match[:, forks] = spoken(draft, top.indices[..., 0]) == later[:, forks]
            reached = torch.zeros_like(match)
            reached[:, forks] = later[:, forks] >= 0
            for place, value in zip((2, 3, 4), (margin, match, reached), strict=True):
                found[place].append(value[wanted])
        if len(found[2]) == STEPS:
            parts.append([torch.stack(each) for each in found])
        else:
            pad = [torch.zeros(STEPS - 1, len(found[2][0]), dtype=each[0].dtype) for each in found[2:]]
            parts.append(
                [torch.stack(each) for each in found[:2]]
                + [torch.cat((torch.stack(each), more)) for each, more in zip(found[2:], pad, strict=True)]
            )
        done += int(wanted.sum())
        if done >= tokens:
            break
    names = ("margin", "agrees", "chain_margin", "match", "reached")
    return {name: torch.cat(each, 1) for name, each in zip(names, zip(*parts, strict=True), strict=True)}


class Some(AnswerSource):
    """Every PARTS-th answer, from the ``part``-th on; of answers in the order of their prompts' lengths."""

    def __init__(self, answers, part: int | None) -> None:
        super().__init__(answers)
        object.__setattr__(self, "part", part)

    def documents(self, seed: int | None = None):
        kept = list(super().documents())
        kept = kept if self.part is None else kept[self.part :: PARTS]
        return iter(random.Random(seed).sample(kept, len(kept)))


class ScanSize:
    """Sizes of the pass: those of the verb."""

    batch_tokens = 2048


def spoken(readout, index: Tensor) -> Tensor:
    return index if readout.vocabulary is None else readout.vocabulary[index]


def record(args: argparse.Namespace) -> None:
    """What the law reads and what the trained exits did, in one file."""
    lm, tokenizer = dx.load(args.model, dtype="float32", device_map="cpu")
    backbone = adapt(lm)
    exits = tuple(dx.Exits.from_pretrained(args.exits / name) for name in ("block", "draft"))
    kinds: dict[tuple, str] = {}
    if args.prompts:
        prompts = read_prompts(args.prompts)[args.skip :: args.stride][: args.count]
        asked = AnswerSettings(sampled=0.0, rows=args.rows, max_new_tokens=args.max_new_tokens)
        answers = make_answers(lm, tokenizer, prompts, asked, args.answers or args.out.with_suffix(".answers"))
        kinds = {tuple(row.ids[: row.prompt]): prompts[row.index].kind for row in answers}
        source = Some(answers, args.part)
    else:
        source = dx.find_source(args.text)
    settings = dx.ScanSettings(tokens=args.tokens, batch_tokens=ScanSize.batch_tokens, layer_tokens=50)
    chunks = gather(source, tokenizer, settings, 512)
    layers, taps = exits[0].config.layers, exits[1].readout(backbone).taps
    readout = build_readout(backbone, ExitConfig(layers[-1:], backbone.n_layers))
    kept = read(backbone, readout, chunks, settings, Depths(layers, taps)).kept
    made = trained(backbone, exits, chunks, len(kept.target))
    order = [chunk for group in packed(chunks, ScanSize.batch_tokens) for chunk in group]
    of_row = [kinds.get(tuple(chunk.ids[: chunk.prompt]), "text") for chunk in order]
    row = {
        "blocks": [law_inputs(backbone, kept, h, RIDGE) for h in kept.exits],
        "draft": law_inputs(backbone, kept, kept.draft, DRAFT_RIDGE),
        "row": kept.row,
        "kind": [of_row[number] for number in kept.row.tolist()],
        "layers": layers,
        "n_layers": backbone.n_layers,
        **{name: value[..., : len(kept.row)] for name, value in made.items()},
    }
    torch.save(row, args.out)
    print(args.out, len(kept.row), "tokens")


def part(one: dict, kind: str | None, without: bool = False) -> Tensor:
    """The tokens (n,) bool of one kind, or all others."""
    which = torch.tensor([kind is None or name == kind for name in one["kind"]])
    return ~which if without and kind is not None else which


def fitted(records: list[dict], kind: str | None) -> tuple[Law, Law]:
    """Laws of blocks and draft, without the tokens of a kind."""
    x, y, dx_, dy = [], [], [], []
    for one in records:
        use = part(one, kind, without=True)
        for exit, layer in enumerate(one["layers"]):
            x.append(expanded(one["blocks"][exit][use], layer / one["n_layers"]))
            y.append(one["agrees"][exit][use].double())
        alive = use.clone()
        for step in range(len(one["match"])):
            alive = alive & one["reached"][step]
            at = alive.nonzero()[:, 0]
            dx_.append(expanded(one["draft"][at + step], step / STEPS))
            dy.append(one["match"][step][at].double())
            alive = alive & one["match"][step]
    blocks = Law(tuple(logistic(torch.cat(x), torch.cat(y)).tolist()), 1.0, 0.0)
    draft = Law(tuple(logistic(torch.cat(dx_), torch.cat(dy)).tolist()), 1.0, 0.0)
    grid = [1 + step / 20 for step in range(41)]
    found = []
    for law, gap in ((blocks, depth_gap), (draft, speed_gap)):
        sharp = [Law(law.weights, value, 0.0) for value in grid]
        found.append(min(sharp, key=lambda law: abs(sum(gap(law, one, kind, True) for one in records))))
    return found[0], found[1]


def depths(law: Law, one: dict, use: Tensor) -> tuple[float, float]:
    """Estimated and reached at 98 %."""
    layers, n_layers = one["layers"], one["n_layers"]
    told = estimate_blocks(law, [each[use] for each in one["blocks"]], layers, n_layers, (0.98,)).depth[0]
    curve = sweep(one["margin"][:, use], one["agrees"][:, use], layers, n_layers)
    return told, curve.depth_at(0.98)[0] / n_layers


def speeds(law: Law, one: dict, use: Tensor) -> tuple[object, object, list[float]]:
    """Estimated and reached choices, and the reached match by step."""
    told = estimate_draft(law, one["draft"][use], one["row"][use], COSTS, len(one["match"]))
    starts = use & one["reached"].all(0)
    accepted = (one["match"] & one["reached"])[:, starts].T.long().cumprod(1).sum(1)
    trace = ChainTrace(
        one["chain_margin"][:, starts].T.double(), accepted, torch.full_like(accepted, len(one["match"]))
    )
    return told, best_threshold(trace, COSTS, len(one["match"])), trace.match


def depth_gap(law: Law, one: dict, kind: str | None, without: bool) -> float:
    told, reached = depths(law, one, part(one, kind, without))
    return told - reached


def speed_gap(law: Law, one: dict, kind: str | None, without: bool) -> float:
    told, reached, _ = speeds(law, one, part(one, kind, without))
    return told.choice.speed_up / reached.speed_up - 1


def show(name: str, laws: tuple[Law, Law], one: dict, use: Tensor) -> None:
    told, reached = depths(laws[0], one, use)
    agrees = estimate_blocks(
        laws[0], [e[use] for e in one["blocks"]], one["layers"], one["n_layers"], (0.98,)
    ).agreement
    draft, best, match = speeds(laws[1], one, use)
    told_speed, speed = draft.choice.speed_up, best.speed_up
    print(
        f"{name:24} {int(use.sum()):6} tokens  depth {told:.3f} / {reached:.3f} ({told - reached:+.3f})  agreement "
        + " ".join(f"{a:.2f}/{b:.2f}" for a, b in zip(agrees, one["agrees"][:, use].double().mean(1), strict=True))
        + f"  draft {told_speed:.2f} / {speed:.2f} ({told_speed / speed - 1:+.1%})"
        + "  match "
        + " ".join(f"{a:.2f}/{b:.2f}" for a, b in zip(draft.match[:4], match[:4], strict=True))
    )


def fit(files: list[Path], tests: list[Path]) -> None:
    """Fit, leaving out each kind in turn, and print."""
    records = [torch.load(file) for file in files]
    print("estimated / reached")
    for kind in sorted({name for one in records for name in one["kind"]}):
        laws = fitted(records, kind)
        for file, one in zip(files, records, strict=True):
            if bool(part(one, kind).any()):
                show(f"{kind} left out, {file.stem}", laws, one, part(one, kind))
    laws = fitted(records, None)
    for file, one in zip(files, records, strict=True):
        show(f"fitted on, {file.stem}", laws, one, part(one, None))
    for file in tests:
        one = torch.load(file)
        for kind in (None, *sorted(set(one["kind"]))):
            show(f"test, {kind or 'all'}, {file.stem}", laws, one, part(one, kind))
    for name, law in zip(("BLOCKS", "DRAFT"), laws, strict=True):
        print(name, tuple(round(weight, 4) for weight in law.weights), law.sharpness)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", nargs="?")
    made.add_argument("--exits", type=Path)
    made.add_argument("--prompts")
    made.add_argument("--text")
    made.add_argument("--count", type=int, default=40)
    made.add_argument("--skip", type=int, default=0)
    made.add_argument("--stride", type=int, default=1)
    made.add_argument("--tokens", type=int, default=4000)
    made.add_argument("--max-new-tokens", type=int, default=224)
    made.add_argument("--out", type=Path)
    made.add_argument("--answers", type=Path, help="folder of the answers; default beside FILE")
    made.add_argument("--rows", type=int, default=50, help="prompts answered at once")
    made.add_argument("--part", type=int, help=f"record only every {PARTS}th answer, from this one on")
    made.add_argument("--fit", type=Path, nargs="+")
    made.add_argument("--test", type=Path, nargs="*", default=[])
    args = made.parse_args()
    fit(args.fit, args.test) if args.fit else record(args)


if __name__ == "__main__":
    main()
