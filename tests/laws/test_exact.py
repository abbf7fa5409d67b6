"""Law 4, and laws 1, 2, 3, 5 and 6 for the policies that claim exactness: ``defer`` (state) and ``verify`` (output)."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.engines.plan import POLICIES, ExitPlan
from dynamax_llm.errors import PolicyMismatchError, UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.readouts.base import build_readout
from dynamax_llm.exits.readouts.head import HeadReadout
from dynamax_llm.testing import ScriptedConfidence, random_ids, tiny_model, zero_tail
from dynamax_llm.traces.teacher_forced import step_by_step, teacher_forced
from tests.laws.conftest import EACH_CASES, Case, left_padding, make_case, pattern, random_heads
from tests.stepping import Stepper

PROMPT, STEPS = 6, 10
PATTERNS = ["always", "never", "alternating", "random"]
WINDOWS = [("always", 3), ("alternating", 16), ("random", 1), ("random", 5)]


@pytest.fixture(params=EACH_CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """One of each family."""
    return make_case(*request.param)


def script(kind: str, batch: int, steps: int, n_exits: int) -> torch.Tensor:
    """Exits to take (B, S); ``n_exits`` means full depth."""
    steps_of = torch.arange(steps).expand(batch, -1)
    rows = torch.arange(batch).unsqueeze(1)
    return {
        "always": torch.zeros(batch, steps, dtype=torch.long),
        "never": torch.full((batch, steps), n_exits),
        "alternating": torch.where((steps_of + rows) % 2 == 0, 0, n_exits),
        "random": pattern(batch, steps, n_exits, seed=7),
    }[kind]


def deferred(case: Case, estimator, window: int, policy: str = "defer") -> ExitPlan:
    config = ExitConfig(case.exits, case.backbone.n_layers, head=None)
    return ExitPlan(case.exits, estimator, build_readout(case.backbone, config), POLICIES[policy], window)


@pytest.mark.parametrize(("kind", "window"), WINDOWS)
def test_deferred_state_is_the_state_of_never_leaving(case: Case, kind: str, window: int) -> None:
    """Law 4: once every layer has caught up, the caches are those of full depth."""
    ids, padding = random_ids(3, PROMPT + STEPS), left_padding(3, PROMPT)
    states = []
    for moves in (script(kind, 3, STEPS, len(case.exits)), script("never", 3, STEPS, len(case.exits))):
        decoder = Stepper(case.backbone, deferred(case, ScriptedConfidence(moves), window), padding)
        with torch.no_grad():
            decoder.prefill(ids[:, :PROMPT])
            assert decoder.engine.pending() == 0  # the prompt never waits
            for place in range(PROMPT, PROMPT + STEPS):
                decoder.step(ids[:, [place]], [0.5] * len(case.exits))
                assert decoder.engine.pending() < window
            if decoder.engine.pending():
                decoder.engine.catch_up()
        states.append(decoder.engine.cache.snapshot())
        assert decoder.engine.stats().window_bytes <= (window + 1) * 3 * case.backbone.width * 4 * 2
    assert states[0].lengths == states[1].lengths
    for tensor, expected in zip(states[0].tensors, states[1].tensors, strict=True):
        assert (tensor - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(("batch", "window"), [(1, 16), (4, 1), (4, 4)])
def test_deferred_step_by_step_equals_one_pass(case: Case, batch: int, window: int) -> None:
    """Law 2: what a token says, and where it leaves, are those of intact states."""
    ids, padding = random_ids(batch, PROMPT + STEPS), left_padding(batch, PROMPT + STEPS)
    plan = deferred(case, ScriptedConfidence(pattern(batch, STEPS, len(case.exits))), window)
    half = [0.5] * len(case.exits)
    slow = step_by_step(case.backbone, plan, ids, half, prompt_length=PROMPT, padding=padding)
    fast = teacher_forced(case.backbone, plan, ids, half, prompt_length=PROMPT, padding=padding, keep_logits=True)
    assert slow.exit_index[:, PROMPT:].tolist() == plan.estimator.pattern.tolist()
    assert fast.exit_index.tolist() == slow.exit_index.tolist()
    read = slice(PROMPT - 1, None)
    assert (fast.logits[:, read] - slow.logits[:, read]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["mlp", "transformer", "mamba"])
def test_learned_heads_decide_alike_under_defer(head_case: Case, kind: str) -> None:
    """Law 2 with real judges: a token that left is remembered as it was then, though its true h moves on."""
    case = head_case
    estimator = random_heads(case, kind, 6)
    config = ExitConfig(case.exits, case.backbone.n_layers, head=kind, candidates=6)
    plan = ExitPlan(case.exits, estimator, build_readout(case.backbone, config), POLICIES["defer"], 5)
    ids, padding, half = random_ids(3, PROMPT + STEPS), left_padding(3, PROMPT + STEPS), [0.5] * len(case.exits)
    slow = step_by_step(case.backbone, plan, ids, half, prompt_length=PROMPT, padding=padding)
    fast = teacher_forced(case.backbone, plan, ids, half, prompt_length=PROMPT, padding=padding, keep_logits=True)
    assert fast.exit_index.tolist() == slow.exit_index.tolist()
    assert len(slow.exit_index[:, PROMPT:].unique()) >= 2
    read = slice(PROMPT - 1, None)
    assert (fast.logits[:, read] - slow.logits[:, read]).abs().max() < 1e-4


def test_a_deferred_row_equals_the_row_alone(case: Case) -> None:
    """Law 6: rows share passes, never decisions: depth and logits are those of the row by itself."""
    ids, padding, half = random_ids(4, PROMPT + STEPS), left_padding(4, PROMPT + STEPS), [0.5] * len(case.exits)
    moves = pattern(4, STEPS, len(case.exits), seed=3)
    plan = deferred(case, ScriptedConfidence(moves), 4)
    together = step_by_step(case.backbone, plan, ids, half, prompt_length=PROMPT, padding=padding)
    for row in range(4):
        alone_plan = deferred(case, ScriptedConfidence(moves[[row]]), 4)
        alone = step_by_step(case.backbone, alone_plan, ids[[row], row:], half, prompt_length=PROMPT - row)
        assert together.exit_index[row, PROMPT:].tolist() == moves[row].tolist()
        read = slice(PROMPT - 1, None)
        assert (together.logits[row, read] - alone.logits[0, PROMPT - 1 - row :]).abs().max() < 1e-4


def test_update_state_over_several_tokens_leaves_what_layer_leaves(case: Case) -> None:
    """Law 3 for a replay: the state-only twin of a pass over a window, layer by layer, rows padded to the left."""
    backbone, ids, padding = case.backbone, random_ids(3, PROMPT + 5), left_padding(3, PROMPT + 5)
    inputs: list[torch.Tensor] = []  # of every layer, for the last five tokens
    after = []
    for state_only in (False, True):
        cache = backbone.new_cache()
        with torch.no_grad():
            h = backbone.embed(ids[:, :PROMPT])
            ctx = backbone.context(h, padding=padding[:, :PROMPT])
            for index in range(backbone.n_layers):
                h = backbone.layer(index, h, cache, ctx)
            h = embedded = backbone.embed(ids[:, PROMPT:])
            ctx = backbone.context(h, past=PROMPT, padding=padding, embedded=embedded)
            for index in range(backbone.n_layers):
                if state_only:
                    backbone.update_state(index, inputs[index], cache, ctx)
                else:
                    inputs.append(h)
                    h = backbone.layer(index, h, cache, ctx)
        after.append(cache.snapshot())
    assert after[0].lengths == after[1].lengths
    for tensor, expected in zip(after[1].tensors, after[0].tensors, strict=True):
        assert (tensor - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))


class Liar(HeadReadout):
    """Says another token than it sees, whenever the script says so; one entry per time that a proposal is read."""

    def __init__(self, case: Case, lies: list[bool]) -> None:
        super().__init__(case.backbone, ExitConfig(case.exits, case.backbone.n_layers, head=None, candidates=0))
        self.lies, self.calls = lies, 0

    def logits(self, exit, h):
        lie, self.calls = self.lies[self.calls % len(self.lies)], self.calls + 1
        honest = super().logits(exit, h)
        return honest.roll(1, dims=-1) if lie else honest


class FirstExit(ScriptedConfidence):
    """Every token leaves at the first exit."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(1, 1, dtype=torch.long))

    def confidence(self, exit, h, features, state, padding=None):
        return torch.ones(h.shape[:2]), state


def verifying(case: Case, window: int = 16, estimator=None, lies: list[bool] | None = None, **options) -> EarlyExit:
    early = EarlyExit(
        Exits.untrained(case.backbone, case.exits),
        measure="softmax_margin",
        policy="verify",
        window=window,
        **{"threshold": 0.5, "adaptive": False, **options},
    )
    early.estimator = early.estimator if estimator is None else estimator
    if lies is not None:
        early.exits.readout = lambda backbone: Liar(case, lies)  # type: ignore[method-assign]
    return early


def greedy(case: Case, ids, custom=None, eos=None, new: int = STEPS, **options):
    extra = options if custom is None else {**options, "custom_generate": custom}
    padding = left_padding(*ids.shape)
    return case.backbone.model.generate(
        ids, attention_mask=padding, do_sample=False, eos_token_id=eos, max_new_tokens=new, **extra
    )


#: Patterns, and with each: whether a row ends inside a draft, new tokens, and the window (longer than the text, too).
VERIFIED = [
    ("always", False, STEPS, 4),
    ("always", True, 3, 64),
    ("never", False, 1, 16),
    ("alternating", True, STEPS, 16),
    ("random", True, STEPS, 16),
    ("random", False, STEPS, 3),
]


@pytest.mark.parametrize(("kind", "ends", "new", "window"), VERIFIED)
def test_verified_text_is_generates(case: Case, kind: str, ends: bool, new: int, window: int) -> None:
    """Law 4: greedy, whatever leaves where, with rows that end inside a draft, and with one new token."""
    ids = random_ids(4, PROMPT)
    eos = int(greedy(case, ids, new=6)[0, -1]) if ends else None
    expected = greedy(case, ids, eos=eos, new=new)
    estimator = ScriptedConfidence(script(kind, 4, 200, len(case.exits)))
    out = greedy(case, ids, verifying(case, window, estimator), eos=eos, new=new)
    assert out.sequences.tolist() == expected.tolist()
    assert out.exit_layers.shape == (4, expected.shape[1] - PROMPT)
    ended = expected[:, PROMPT:] == eos if ends else torch.zeros_like(expected[:, PROMPT:]).bool()
    after = (ended.cumsum(1) - ended.long()) > 0
    assert (out.exit_layers == 0).tolist() == after.tolist()


@pytest.mark.parametrize(
    ("lies", "accepted"), [([True], 0.0), ([False], 1.0), ([False, False, True], None)], ids=["none", "all", "some"]
)
def test_scripted_acceptance(case: Case, lies: list[bool], accepted: float | None) -> None:
    """A zero tail makes an honest proposal the full model's token, so the script decides what is accepted."""
    zero_tail(case.backbone.model, case.exits[0])
    ids = random_ids(3, PROMPT)
    out = greedy(case, ids, verifying(case, 5, FirstExit(), lies))
    assert out.sequences.tolist() == greedy(case, ids).tolist()
    found = out.verification
    assert found.drafted == found.accepted + found.corrected + found.rolled_back
    if accepted is None:
        assert found.accepted > 0 and found.corrected > 0 and found.rolled_back > 0
        assert 0.3 < found.acceptance_rate < 0.9
    else:
        assert found.acceptance_rate == accepted
        assert (found.corrected > 0, found.accepted > 0) == (accepted == 0.0, accepted == 1.0)


def test_a_zero_tail_is_accepted_and_saves_passes(some_case: Case) -> None:
    """Every window of 5: four drafts at the exit's depth, the fifth token deep, one pass of the rest over all."""
    case = some_case
    n_layers, depth = case.backbone.n_layers, case.exits[0]
    zero_tail(case.backbone.model, depth)
    out = greedy(case, random_ids(1, PROMPT), verifying(case, 5, FirstExit()), new=21)
    assert (out.verification.acceptance_rate, out.verification.windows) == (1.0, 4)
    assert out.trace.stats.passes == 20 * depth + 4 * (n_layers - depth)
    assert out.trace.pass_reduction == pytest.approx(1 - out.trace.stats.passes / (20 * n_layers))
    assert out.exit_layers[0].tolist() == [n_layers] + [depth, depth, depth, depth, n_layers] * 4
    assert out.trace.counted_reduction < 0  # nothing is computed less often: only weights are read less often


def test_verified_drafts_are_what_defer_would_do(head_case: Case) -> None:
    """After a rejection caches and the estimator's own states are those of the accepted text: every later decision is
    the one that decoding the final text takes."""
    case = head_case
    estimator = random_heads(case, "mamba", 0)
    config = ExitConfig(case.exits, case.backbone.n_layers, head="mamba", candidates=0)
    early = verifying(case, 64, estimator, threshold=0.5)
    early.exits.config = config
    out = greedy(case, random_ids(1, PROMPT), early, new=24)
    assert out.verification.corrected >= 3 and out.trace.stats.left_at is not None
    plan = ExitPlan(case.exits, estimator, build_readout(case.backbone, config), POLICIES["defer"])
    forced = teacher_forced(case.backbone, plan, out.sequences, [0.5] * len(case.exits), prompt_length=PROMPT)
    depths = torch.tensor([*case.exits, case.backbone.n_layers])
    for place in range(PROMPT, out.sequences.shape[1] - 1):
        agrees = int(forced.tokens[0, place]) == int(out.sequences[0, place + 1])
        expected = int(depths[forced.exit_index[0, place]]) if agrees else case.backbone.n_layers
        assert int(out.exit_layers[0, place - PROMPT + 1]) == expected


def test_processors_and_criteria_see_each_rows_own_text(some_case: Case) -> None:
    """Penalties, a minimum length and custom criteria act on accepted text alone; scores are those of ``generate``."""
    case = some_case

    class StopAfterPair(StoppingCriteria):
        """Ends a row once its newest token occurred before."""

        def __call__(self, input_ids, scores, **kwargs):
            return (input_ids[:, :-1] == input_ids[:, -1:]).any(1) & (input_ids.shape[1] > PROMPT + 6)

    ids = random_ids(3, PROMPT)
    request = {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 4,
        "return_dict_in_generate": True,
        "output_scores": True,
        "stopping_criteria": StoppingCriteriaList([StopAfterPair()]),
        "pad_token_id": 0,
    }
    plain = greedy(case, ids, eos=5, new=16, **request)
    ours = greedy(case, ids, verifying(case, 6, FirstExit()), eos=5, new=16, **request)
    width = min(plain.sequences.shape[1], ours.sequences.shape[1])
    ends = (ours.exit_layers > 0).sum(1)
    for row in range(3):
        kept = slice(0, PROMPT + int(ends[row]))
        assert ours.sequences[row, kept].tolist() == plain.sequences[row, kept].tolist()
        for step in range(int(ends[row])):
            finite = plain.scores[step][row].isfinite()
            assert torch.allclose(ours.scores[step][row][finite], plain.scores[step][row][finite], atol=1e-3)
    assert width == ours.sequences.shape[1]


def test_columns_are_handed_out_in_order(some_case: Case) -> None:
    """Streaming: every column once, when all rows have it; together they are the result."""
    case = some_case
    columns: list[tuple[list[int], list[int]]] = []
    early = verifying(
        case, 6, FirstExit(), on_token=lambda tokens, layers: columns.append((tokens.tolist(), layers.tolist()))
    )
    out = greedy(case, random_ids(3, PROMPT), early)
    assert torch.tensor([tokens for tokens, _ in columns]).T.tolist() == out.sequences[:, PROMPT:].tolist()
    assert torch.tensor([layers for _, layers in columns]).T.tolist() == out.exit_layers.tolist()


@pytest.mark.parametrize("policy", ["defer", "verify"])
def test_an_exception_leaves_the_model_as_it_was(some_case: Case, policy: str) -> None:
    """Law 5."""
    case = some_case
    model, ids, calls = case.backbone.model, random_ids(1, PROMPT), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, plain = model.config.to_dict(), greedy(case, ids)

    def explode(tokens, layers):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("callback failed")

    early = EarlyExit(
        Exits.untrained(case.backbone, case.exits), measure="softmax_margin", threshold=0.0, policy=policy, window=3
    )
    early.on_token = explode
    with pytest.raises(RuntimeError, match="callback failed"):
        greedy(case, ids, early)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert greedy(case, ids).tolist() == plain.tolist()


@pytest.mark.parametrize("family", ["mamba2", "nemotron_h", "zamba2", "falcon_h1"])
def test_windows_are_single_steps_where_stock_passes_clamp(family: str) -> None:
    """The stock pass clamps dt, the stock step does not; a window must do what as many steps do, and leave no trace."""
    limits = {"time_step_min": 0.05} if family in ("zamba2", "nemotron_h") else {"time_step_limit": (0.05, 0.1)}
    backbone = adapt(tiny_model(family, **limits))
    assert backbone.clamps_dt
    mixers = [module for module in backbone.model.modules() if hasattr(module, "time_step_limit")]
    before = [(mixer.chunk_size, mixer.time_step_limit) for mixer in mixers]
    case, ids = Case(backbone, (2, 3)), random_ids(2, PROMPT)
    out = greedy(case, ids, verifying(case, 7, FirstExit()))
    assert out.sequences.tolist() == greedy(case, ids).tolist()
    assert [(mixer.chunk_size, mixer.time_step_limit) for mixer in mixers] == before
    plan = deferred(case, ScriptedConfidence(torch.tensor([[0] * 8 + [2]] * 2)), 16)
    never = deferred(case, ScriptedConfidence(torch.full((2, 9), 2)), 16)
    text = random_ids(2, PROMPT + 9)
    found = [step_by_step(backbone, p, text, [0.5] * 2, prompt_length=PROMPT).logits[:, -1] for p in (plan, never)]
    assert (found[0] - found[1]).abs().max() < 1e-4


def test_never_leaving_is_generate(some_case: Case) -> None:
    """Law 1 for the decoders of exact state."""
    case = some_case
    ids = random_ids(3, PROMPT)
    for policy in ("defer", "verify"):
        early = EarlyExit(
            Exits.untrained(case.backbone, case.exits), measure="softmax_margin", threshold="never", policy=policy
        )
        out = greedy(case, ids, early)
        assert out.sequences.tolist() == greedy(case, ids).tolist()
        assert (out.trace.mean_depth, out.trace.pass_reduction, out.trace.counted_reduction) == (1.0, 0.0, 0.0)


def test_what_cannot_be_exact_is_refused(some_case: Case) -> None:
    case = some_case
    tail = Exits.untrained(case.backbone, case.exits, readout="tail")
    for policy in ("defer", "verify"):
        early = EarlyExit(tail, measure="softmax_margin", policy=policy)
        with pytest.raises(
            PolicyMismatchError, match=f"'{policy}' cannot be used with the readout 'tail'.*'propagate'"
        ):
            greedy(case, random_ids(1, PROMPT), early)
    for window in (0, -1, 2.5):
        with pytest.raises(UsageError, match=r"window .*: give the number of tokens that may wait, .* from 1"):
            EarlyExit(tail, measure="softmax_margin", policy="defer", window=window)  # type: ignore[arg-type]
