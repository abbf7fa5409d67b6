"""Which mode of exits to train, from what is estimated of a draft and of blocks: time first."""

from __future__ import annotations

from collections.abc import Sequence

from dynamax_llm.backbones import Backbone
from dynamax_llm.evaluation.common.documents import Interval
from dynamax_llm.evaluation.scan import trained_modes
from dynamax_llm.evaluation.scan.collect import Kept
from dynamax_llm.evaluation.scan.costs import measure_chain_costs
from dynamax_llm.evaluation.scan.document import LEAST_DEPTH_SAVED, VERDICT_AT, EstimatedBlocks, EstimatedDraft, Modes
from dynamax_llm.evaluation.scan.law import BLOCKS, DRAFT, FITTED_ON

#: Where the exits of blocks are estimated, as shares of the depth: earlier than heads' exits, because a block there
#: knows much already.
SHARES = (2 / 15, 4 / 15, 1 / 2, 11 / 15)
#: A draft is worth training if it should be this much faster than single steps.
LEAST_SPEED_UP = 1.1


def block_layers(n_layers: int) -> tuple[int, ...]:
    """The depths of SHARES, each once."""
    return tuple(sorted({min(max(1, round(share * n_layers)), n_layers - 1) for share in SHARES}))


def modes_of(backbone: Backbone, kept: Kept, targets: Sequence[float]) -> Modes:
    """What is estimated from the tokens kept, the draft at costs that are timed now."""
    draft, blocks = _draft(backbone, kept), _blocks(backbone, kept, targets)
    depth = blocks.depth[list(targets).index(VERDICT_AT)]
    pays = draft is not None and draft.speed_up.value >= LEAST_SPEED_UP
    spares = 1.0 - depth.value >= LEAST_DEPTH_SAVED
    use = "draft" if pays else "blocks" if spares else None
    lines = [_draft_line(draft, pays), _block_line(depth, spares)]
    return Modes(draft=draft, blocks=blocks, law=FITTED_ON, use=use, lines=tuple(lines))


def _draft(backbone: Backbone, kept: Kept) -> EstimatedDraft | None:
    costs, one = measure_chain_costs(backbone)
    inputs = trained_modes.law_inputs(backbone, kept, kept.draft, trained_modes.DRAFT_RIDGE)
    told = trained_modes.estimate_draft(DRAFT, inputs, kept.row, costs)
    if told is None:
        return None
    value, error = told.choice.speed_up, DRAFT.error
    return EstimatedDraft(
        match=told.match,
        tokens=told.choice.tokens,
        proposals=told.choice.proposals,
        speed_up=Interval(value=value, low=value * (1 - error), high=value * (1 + error)),
        step_cost=costs.draft,
        pass_costs=costs.passes,
        pass_seconds=one,
    )


def _blocks(backbone: Backbone, kept: Kept, targets: Sequence[float]) -> EstimatedBlocks:
    layers = block_layers(backbone.n_layers)
    inputs = [trained_modes.law_inputs(backbone, kept, states, trained_modes.RIDGE) for states in kept.exits]
    told = trained_modes.estimate_blocks(BLOCKS, inputs, layers, backbone.n_layers, targets)
    depth = tuple(
        Interval(value=value, low=max(value - BLOCKS.error, 0.0), high=min(value + BLOCKS.error, 1.0))
        for value in told.depth
    )
    return EstimatedBlocks(layers=layers, agreement=told.agreement, targets=tuple(targets), depth=depth)


def _draft_line(draft: EstimatedDraft | None, pays: bool) -> str:
    """The verdict on a draft."""
    if draft is None:
        return "A draft: the texts are too short to say."
    speed = draft.speed_up
    range_ = f"about {speed.value:.2f}x ({speed.low:.2f} to {speed.high:.2f}) faster here, exact output"
    return f"A draft would make this model {range_}." + ("" if pays else " Not worth it.")


def _block_line(depth: Interval, spares: bool) -> str:
    """The verdict on blocks."""
    what = f"{depth.value:.2f} ({depth.low:.2f} to {depth.high:.2f}) of the depth at {VERDICT_AT:.0%} agreement"
    return f"Blocks should run {what}, states intact." + ("" if spares else " Not worth it.")
