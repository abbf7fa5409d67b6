"""What a trained draft and its exit blocks do on held-out text, as sums per document or prompt.

Shapes: B rows, F forks, J steps, E exits, P thresholds, N documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.generate import EarlyExit
from dynamax_llm.evaluation.compare.heads import INTACT
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.readouts.base import build_readout
from dynamax_llm.exits.readouts.draft import DraftWeights
from dynamax_llm.exits.registries import READOUTS
from dynamax_llm.text.answer_source import AnySource, stream_of
from dynamax_llm.text.batches import Batch, first_batches
from dynamax_llm.traces.chains import STEPS, collect_chains
from dynamax_llm.traces.collect import collect_exits, hidden_at
from dynamax_llm.traces.curves import sweep
from dynamax_llm.traces.simulate import simulate_no_exit
from dynamax_llm.training.blocks import TrainedLearner
from dynamax_llm.training.parallel import ALONE
from dynamax_llm.training.phases import READOUT_LEARNERS
from dynamax_llm.training.settings import TrainSettings

#: Rows of a batch that is measured; the agreement at which depth is reported; what decides there.
ROWS, TARGET, ESTIMATORS = 16, 0.98, {"head": None, "margin": "softmax_margin"}
#: Per document, what is summed and what it is divided by.
Sums = tuple[list[float], list[float]]


def held_out(source: AnySource, tokenizer: Any, settings: TrainSettings, tokens: int) -> list[Batch]:
    """The first held-out documents, one a row, the same for every seed of training."""
    shape = (settings.held_out, settings.sequence, settings.sequence, 0, True)
    single = sorted(first_batches(stream_of(source, tokenizer, True, *shape), tokens), key=lambda one: one.tokens)
    return [joined(single[start : start + ROWS]) for start in range(0, len(single), ROWS)]


def joined(rows: Sequence[Batch]) -> Batch:
    """Batches of one row each as one, padded on the right."""
    longest = max(row.ids.shape[1] for row in rows)

    def together(parts: Iterable[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts])

    answers = [row.answers for row in rows if row.answers is not None]
    masks = together(answers) if answers else None
    return Batch(together(row.ids for row in rows), together(row.mask for row in rows), masks)


def counted(batch: Batch, device: torch.device) -> Tensor:
    """The tokens (B, T) whose next token counts."""
    return (batch.mask if batch.answers is None else batch.answers).to(device)


@torch.no_grad()
def losses(backbone: Backbone, exits: Exits, settings: TrainSettings, batches: Sequence[Batch]) -> dict[str, Sums]:
    """The training loss of every step of a draft, or of every exit's block, by its name."""
    config, weights = exits.config, exits.readout_weights
    assert weights is not None
    learner = READOUT_LEARNERS.lookup(str(READOUTS.lookup(config.readout).learner))(backbone, config, settings, ALONE)
    assert isinstance(learner, TrainedLearner)
    learner.weights.load_state_dict(weights.state_dict())
    learner.readout = build_readout(backbone, config, learner.weights)
    draft = config.readout == "draft"
    names = [f"draft loss {step + 1}" if draft else f"exit loss {config.layers[step]}" for step in range(learner.count)]
    found: dict[str, Sums] = {name: ([], []) for name in names}
    for batch in batches:
        hidden = hidden_at(backbone, learner.depths, batch.ids)
        last = batch.ids.shape[1] - learner.look_ahead
        forks = learner.blocks()[0].forks(last, settings.every, torch.Generator().manual_seed(0)).to(backbone.device)
        real = counted(batch, backbone.device)
        for number, outputs, positions in learner.parts(hidden, batch, forks):
            each = learner.losses(outputs, *learner.target(hidden[backbone.n_layers][:, positions]))
            here = real[:, positions]
            found[names[number]][0].extend((each * here).sum(1).tolist())
            found[names[number]][1].extend(here.sum(1).tolist())
    return found


@torch.no_grad()
def matches(backbone: Backbone, exits: Exits, every: int, batches: Sequence[Batch]) -> dict[str, Sums]:
    """Per step of a chain, proposals that are the full model's token, of those that decoding would reach: all before
    were accepted, and were the text's own tokens."""
    readout = exits.readout(backbone)
    found: dict[str, Sums] = {f"match {step + 1}": ([], []) for step in range(STEPS)}
    for batch in batches:
        chains = collect_chains(backbone, readout, batch, STEPS, every)
        agrees, real = (part.unflatten(1, (-1, STEPS)) for part in (chains.labels[0], chains.mask))  # (B, F, J)
        accepted = (agrees & real).long().cumprod(2).bool()
        tried = real & torch.cat((torch.ones_like(real[..., :1]), accepted[..., :-1]), dim=2)
        for step in range(STEPS):
            over, under = found[f"match {step + 1}"]
            over.extend(accepted[..., step].sum(1).tolist())
            under.extend(tried[..., step].sum(1).tolist())
    return found


@torch.no_grad()
def depths(backbone: Backbone, exits: Exits, batches: Sequence[Batch]) -> dict[str, dict[str, Any]]:
    """Per estimator, tokens that agree and layers that run (P, N) at thresholds around TARGET, all states intact."""
    readout, layers, n_layers = exits.readout(backbone), exits.config.layers, backbone.n_layers
    estimators = {name: exits.estimator(measure) for name, measure in ESTIMATORS.items()}
    traces: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in estimators}
    for batch in batches:
        shown = collect_exits(backbone, readout, batch)
        wanted = counted(batch, shown.mask.device)
        for name, estimator in estimators.items():
            traces[name].append((simulate_no_exit(estimator, shown).confidence, shown.labels.bool(), wanted))
    found: dict[str, dict[str, Any]] = {}
    for name, trace in traces.items():
        confidence, labels = (torch.cat([one[part][:, one[2]] for one in trace], dim=1) for part in (0, 1))
        curve = sweep(confidence, labels, layers, n_layers)
        at = (curve.depth_at(max(1.0 - factor * (1.0 - TARGET), 0.0))[1] for factor in INTACT)
        thresholds = sorted({min(max(value, 0.0), 1.0) for value in at})
        points = [_applied(trace, threshold, (*layers, n_layers)) for threshold in thresholds]
        found[name] = {"thresholds": thresholds, "n_layers": n_layers, "tokens": points[0][2]}
        found[name] |= {"agree": [point[0] for point in points], "layers": [point[1] for point in points]}
    return found


def _applied(
    trace: Sequence[tuple[Tensor, Tensor, Tensor]], threshold: float, layers: tuple[int, ...]
) -> tuple[list[int], list[int], list[int]]:
    """Per document, tokens that agree, layers run and tokens, where a token leaves at the first sure exit."""
    found: tuple[list[int], list[int], list[int]] = ([], [], [])
    for confidence, labels, wanted in trace:
        full = torch.ones_like(labels[:1])
        where = torch.cat((confidence >= threshold, full)).int().argmax(0)  # (B, T)
        agrees = torch.cat((labels, full)).gather(0, where[None])[0] & wanted
        ran = torch.tensor(layers, device=where.device)[where] * wanted
        for part, values in zip(found, (agrees, ran, wanted), strict=True):
            part.extend(values.sum(1).tolist())
    return found


def decoded(model: Any, exits: Exits, prompts: Sequence[Tensor], new: int, proposals: int) -> dict[str, list[int]]:
    """Per prompt (1, P), tokens and verifications of real decoding under ``verify``, always ``proposals`` ahead."""
    early = EarlyExit(exits, policy="verify", threshold=0.0, window=proposals + 1, engine="eager")
    found: dict[str, list[int]] = {"tokens": [], "verifications": []}
    for ids in prompts:
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=early, **options)
        found["verifications"].append(out.verification.windows)
        found["tokens"].append(out.verification.accepted + out.verification.windows)
    return found


def prompts_of(batches: Sequence[Batch], count: int, most: int, device: torch.device) -> list[Tensor]:
    """Beginnings (1, P) of ``count`` held-out documents spread over all: the prompt of an answer, or ``most`` tokens
    of a text."""
    rows = [batch.rows(slice(row, row + 1)) for batch in batches for row in range(len(batch.ids))]
    chosen = rows[:: max(1, len(rows) // count)][:count]
    ends = [min(most, one.tokens) if one.answers is None else int(one.answers[0].int().argmax()) + 1 for one in chosen]
    return [one.ids[:, :end].to(device) for one, end in zip(chosen, ends, strict=True)]


def sizes(backbone: Backbone, draft: Exits, block: Exits) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters, and multiply-accumulates of weights for one token, of the draft and of the first exit's block."""
    weights, readout, exit_readout = draft.readout_weights, draft.readout(backbone), block.readout(backbone)
    assert isinstance(weights, DraftWeights) and block.readout_weights is not None
    blocks: Any = block.readout_weights

    def parameters(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    counts = {"block": parameters(weights.block), "draft": parameters(weights)}
    counts["exit block"] = parameters(blocks.block(0))
    macs = {"draft step": readout.macs(0), "draft block": weights.block.macs(), "draft update": readout.update_macs(0)}
    return counts, {**macs, "exit": exit_readout.transform_macs(0), "full step": backbone.costs().total}
