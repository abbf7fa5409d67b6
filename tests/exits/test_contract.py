"""What every registered readout, exit head and measure must satisfy, those of the documents' pages included."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dynamax_llm.backbones import adapt
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.features import STATISTICS, ExitFeatures, exit_features
from dynamax_llm.exits.readouts.base import Readout, build_readout
from dynamax_llm.exits.readouts.trained import TrainedReadout
from dynamax_llm.exits.registries import HEADS, MEASURES, READOUTS
from dynamax_llm.exits.state import ExitState, State, Stateful
from dynamax_llm.testing import tiny_model
from tests.exits.pages import page, registered

LAYERS, E, V = (1, 2, 3), 3, 61
BACKBONE = adapt(tiny_model("mistral", vocab=V))
D = BACKBONE.width
PAGES = ("add-a-readout.md", "add-a-confidence.md")


@pytest.fixture(autouse=True)
def pages():
    with registered(*PAGES):
        yield


def moved_off_zero(module: torch.nn.Module) -> torch.nn.Module:
    """The module with every parameter away from its initial value, so that nothing hides behind a zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.requires_grad_(False).eval()


def config(**changes) -> ExitConfig:
    kind = READOUTS[changes.get("readout", "head")]
    if issubclass(kind, TrainedReadout):
        changes["readout_options"] = kind.Options(vocabulary=0, block_window=6)
    return ExitConfig(**{"layers": LAYERS, "n_layers": 5, "head": None, "width": None, "candidates": 0, **changes})


def readout_of(kind: str) -> Readout:
    torch.manual_seed(1)
    made = config(readout=kind)
    weights = READOUTS[kind].new_weights(made, D)
    return build_readout(BACKBONE, made, None if weights is None else moved_off_zero(weights))


def heads_of(kind: str) -> ExitHeads:
    torch.manual_seed(1)
    return moved_off_zero(ExitHeads(config(head=kind), D))


def estimators() -> dict[str, Callable[[], ConfidenceEstimator]]:
    heads = {kind: lambda kind=kind: heads_of(kind) for kind in HEADS}
    return (
        heads
        | {name: lambda name=name: MEASURES[name] for name in MEASURES}
        | {"page": lambda: page(PAGES[1]).SteadyMargin(E)}
    )


with registered(*PAGES):
    # A draft reads no h of its own and one token at a time: its contract is in tests/laws/test_draft.py.
    READOUT_KINDS, ESTIMATORS = [name for name, kind in READOUTS.items() if not kind.drafts], estimators()
Use = Callable[[Stateful, int, Tensor, ExitFeatures, State | None, Tensor | None], tuple[Tensor, State | None]]


def use_of(part: Stateful) -> Use:
    """What decoding calls at an exit: ``transform`` of a readout, ``confidence`` of an estimator."""
    if isinstance(part, Readout):
        return lambda part, exit, h, features, state, padding: part.transform(exit, h, state, padding)
    return lambda part, exit, h, features, state, padding: part.confidence(exit, h, features, state, padding)


@pytest.fixture(params=[*(f"readout {kind}" for kind in READOUT_KINDS), *(f"estimator {name}" for name in ESTIMATORS)])
def part(request) -> Stateful:
    what, name = request.param.split()
    return readout_of(name) if what == "readout" else ESTIMATORS[name]()


def text(batch: int, count: int) -> tuple[Tensor, ExitFeatures]:
    """h and features as an exit has them, with the LM head's rows."""
    h = 2 * torch.randn(batch, count, D)
    features = exit_features(h, h + torch.randn_like(h), 3 * torch.randn(batch, count, V), None)
    return h, ExitFeatures(features.values, features.token, rows=torch.randn(batch, count, 2 * D))


def cut(h: Tensor, features: ExitFeatures, run: slice) -> tuple[Tensor, ExitFeatures]:
    return h[:, run], ExitFeatures(features.values[:, run], features.token[:, run], rows=features.rows[:, run])


def rows(h: Tensor, features: ExitFeatures, index: Tensor) -> tuple[Tensor, ExitFeatures]:
    return h[index], ExitFeatures(features.values[index], features.token[index], rows=features.rows[index])


def same(a: State | None, b: State | None) -> None:
    assert (a is None) == (b is None)
    for one, other in zip(a or (), b or (), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def start(part: Stateful, batch: int, exit: int) -> State | None:
    states = part.initial_state(batch)
    return None if states is None else states[exit]


def test_state_is_announced_and_has_the_batch_first(part: Stateful) -> None:
    states = part.initial_state(4)
    assert part.recurrent == (states is not None)
    if states is not None:
        assert len(states) == E
        assert all(value.shape[0] == 4 for state in states for value in state)
    h, features = text(4, 3)
    value, after = use_of(part)(part, 1, h, features, start(part, 4, 1), None)
    assert value.shape[:2] == (4, 3)
    assert bool(torch.isfinite(value).all())
    if part.recurrent:
        assert [item.shape for item in after] == [item.shape for item in states[1]]
    if isinstance(part, ConfidenceEstimator):
        assert value.shape == (4, 3)
        assert 0.0 <= float(value.min()) <= float(value.max()) <= 1.0


@pytest.mark.parametrize("cuts", [(), (1,), (69,), (3, 4, 66), (30, 64, 65)])
def test_a_sequence_cut_anywhere_gives_the_same_result(part: Stateful, cuts: tuple[int, ...]) -> None:
    use, count = use_of(part), 70
    h, features = text(2, count)
    whole, end = use(part, 1, h, features, start(part, 2, 1), None)
    fresh, _ = use(part, 1, h, features, None, None)
    torch.testing.assert_close(fresh, whole, atol=2e-5, rtol=1e-5)  # no state: a sequence begins
    state, pieces = start(part, 2, 1), []
    for first, last in itertools.pairwise((0, *cuts, count)):
        value, state = use(part, 1, *cut(h, features, slice(first, last)), state, None)
        pieces.append(value)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-5, rtol=1e-5)
    same(state, end)


def test_left_pads_leave_no_trace(part: Stateful) -> None:
    use = use_of(part)
    h, features = text(3, 20)
    padding = torch.ones(3, 20, dtype=torch.int64)
    padding[1, :7], padding[2, :19] = 0, 0
    padded, state = use(part, 0, h, features, start(part, 3, 0), padding)
    assert bool(torch.isfinite(padded).all())
    for row, pads in ((0, 0), (1, 7), (2, 19)):
        own = cut(*rows(h, features, torch.tensor([row])), slice(pads, None))
        alone, after = use(part, 0, *own, start(part, 1, 0), None)
        torch.testing.assert_close(padded[row, pads:], alone[0], atol=1e-5, rtol=1e-5)
        following = text(1, 1)
        kept = None if state is None else tuple(value[[row]] for value in state)
        torch.testing.assert_close(
            use(part, 0, *following, kept, None)[0], use(part, 0, *following, after, None)[0], atol=1e-5, rtol=1e-5
        )


def test_advance_leaves_what_a_use_would_leave(part: Stateful) -> None:
    states = part.initial_state(2)
    for count in (1, 1, 5):
        h, features = text(2, count)
        padding = torch.ones(2, count, dtype=torch.int64)
        padding[0, 0] = 0 if states is not None and count > 1 else 1
        advanced = part.advance(1, h, features, states, padding)
        if states is None:
            assert advanced is None
            continue
        assert all(one is other for one, other in zip(advanced[0], states[0], strict=True))
        for exit in (1, 2):
            same(advanced[exit], use_of(part)(part, exit, h, features, states[exit], padding)[1])
        states = advanced
    assert part.advance(E, h, features, states) == states  # left at the last exit: nothing later


def test_states_are_snapshots(part: Stateful) -> None:
    h, features = text(3, 4)
    _, state = use_of(part)(part, 0, h, features, start(part, 3, 0), None)
    before = None if state is None else tuple(value.clone() for value in state)
    more = text(3, 1)
    first, _ = use_of(part)(part, 0, *more, state, None)
    states = None if state is None else [state] * E
    part.advance(0, *more, states)
    again, _ = use_of(part)(part, 0, *more, state, None)
    assert torch.equal(first, again)
    if before is not None:
        assert all(torch.equal(one, other) for one, other in zip(before, state, strict=True))


def exit_state(part: Stateful, states: list[State] | None) -> ExitState:
    return ExitState(None, states) if isinstance(part, Readout) else ExitState(states, None)


def states_of(part: Stateful, state: ExitState) -> list[State] | None:
    return state.readout if isinstance(part, Readout) else state.estimator


def step(part: Stateful, state: ExitState, h: Tensor, features: ExitFeatures) -> tuple[Tensor, ExitState]:
    """Every exit used once, as for a token that goes to the end."""
    values = []
    for exit in range(E):
        estimator, readout = state.of(exit)
        own = readout if isinstance(part, Readout) else estimator
        value, after = use_of(part)(part, exit, h, features, own, None)
        values.append(value)
        pair = (None, after) if isinstance(part, Readout) else (after, None)
        state = state.with_exit(exit, *pair)
    return torch.stack(values), state


def test_rows_can_be_selected_put_and_rolled_back(part: Stateful) -> None:
    first, second, third = text(3, 4), text(3, 1), text(3, 1)
    state = exit_state(part, part.initial_state(3))
    history = []
    for piece in (first, second, third):
        _, state = step(part, state, *piece)
        history.append(state)
    following = text(3, 1)
    expected = [step(part, kept, *following)[0] for kept in history]

    index = torch.tensor([2, 0, 0, 1])
    chosen, _ = step(part, state.select(index), *rows(*following, index))
    torch.testing.assert_close(chosen, expected[-1][:, index], atol=1e-5, rtol=1e-5)

    counts = torch.tensor([1, 3, 2])
    rolled, _ = step(part, ExitState.after(history, counts), *following)
    for row, count in enumerate(counts.tolist()):
        torch.testing.assert_close(rolled[:, row], expected[count - 1][:, row], atol=1e-5, rtol=1e-5)

    _, newcomer = step(part, exit_state(part, part.initial_state(1)), *text(1, 6))
    admitted, _ = step(part, state.put(1, newcomer), *following)
    alone, _ = step(part, newcomer, *rows(*following, torch.tensor([1])))
    torch.testing.assert_close(admitted[:, [1]], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(admitted[:, [0, 2]], expected[-1][:, [0, 2]], atol=1e-5, rtol=1e-5)
    assert states_of(part, state) is states_of(part, history[-1])  # nothing was changed in place


def test_a_state_matters_later(part: Stateful) -> None:
    h, features = text(1, 6)
    values = features.values.clone()
    values[:, 1, STATISTICS.index("margin")] += 0.5
    changed = h.clone()
    changed[:, 1] += 1
    other = ExitFeatures(values, features.token, rows=features.rows)
    difference = (
        use_of(part)(part, 0, changed, other, None, None)[0] - use_of(part)(part, 0, h, features, None, None)[0]
    )
    difference = difference.abs().flatten(2).amax(2)[0] if difference.dim() == 3 else difference[0].abs()
    assert float(difference[0]) == 0  # causal
    assert (float(difference[2:].max()) > 1e-6) == part.recurrent


def test_costs_are_counted(part: Stateful) -> None:
    weights = part.weights if isinstance(part, Readout) else part if isinstance(part, ExitHeads) else None
    for exit in range(E):
        own = part.transform_macs(exit) if isinstance(part, Readout) else part.macs(exit)
        assert own >= 0 and part.macs(exit) >= own
        assert (own > 0) or (weights is None and not part.recurrent)
        assert (part.update_macs(exit) > 0) == part.recurrent
        if isinstance(part, Readout):
            assert part.macs(exit) == V * D + own
            assert part.read_macs(exit) == part.macs(exit)


@pytest.mark.parametrize("kind", READOUT_KINDS)
def test_steps_and_whole_sequences_read_the_same(kind: str) -> None:
    readout = readout_of(kind)
    h, before = torch.randn(2, 2, 9, D).unbind(0)
    whole, tokens = readout.features(1, h, before, None)
    state = start(readout, 2, 1)
    for place in range(9):
        one = slice(place, place + 1)
        moved, state = readout.transform(1, h[:, one], state)
        features, logits = readout.read(1, h[:, one], before[:, one], None, moved)
        torch.testing.assert_close(features.values, whole.values[:, one], atol=1e-5, rtol=1e-5)
        assert torch.equal(features.token, tokens[:, one])
        assert (logits is not None) == readout.decision_is_output
        torch.testing.assert_close(readout.logits(1, moved).argmax(-1), tokens[:, one])


@pytest.mark.parametrize("kind", READOUT_KINDS)
@pytest.mark.parametrize("head", [None, *HEADS])
def test_save_and_load(kind: str, head: str | None, tmp_path) -> None:
    made = config(readout=kind, head=head)
    weights = READOUTS[kind].new_weights(made, D)
    heads = None if head is None else heads_of(head)
    saved = Exits.of(BACKBONE, made, heads, None if weights is None else moved_off_zero(weights))
    saved.save(tmp_path)
    loaded = Exits.from_pretrained(tmp_path)
    assert loaded.config == made
    assert type(loaded.config.readout_options) is READOUTS[kind].Options
    h, features = text(2, 5)
    for exit in range(E):
        one, other = saved.readout(BACKBONE), loaded.readout(BACKBONE)
        assert torch.equal(one.transform(exit, h)[0], other.transform(exit, h)[0])
        if heads is not None:
            assert torch.equal(
                heads.confidence(exit, h, features, None)[0], loaded.heads.confidence(exit, h, features, None)[0]
            )
