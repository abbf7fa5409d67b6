"""Laws 1, 5 and 6 through Hugging Face's own ``generate``: the call that users make."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.errors import UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.testing import ScriptedConfidence, random_ids
from tests.laws.conftest import Case, left_padding, pattern

PROMPT, NEW = 7, 12


def early(case: Case, estimator: ScriptedConfidence | None = None, **options) -> EarlyExit:
    exits = Exits.untrained(case.backbone, case.exits)
    decoding = EarlyExit(exits, measure="softmax_margin", **options)
    if estimator is not None:
        decoding.estimator = estimator
    return decoding


def test_never_exiting_is_generate(case: Case) -> None:
    """Law 1, with left padding and rows that end early."""
    check_never_exiting(case, batch=4)


def test_never_exiting_is_generate_for_one_row(some_case: Case) -> None:
    check_never_exiting(some_case, batch=1)


def check_never_exiting(case: Case, batch: int) -> None:
    ids, model = random_ids(batch, PROMPT), case.backbone.model
    inputs = {"input_ids": ids, "attention_mask": left_padding(batch, PROMPT), "max_new_tokens": NEW}
    free = model.generate(**inputs, do_sample=False, eos_token_id=None)
    ending = int(free[0, PROMPT + 4])  # a token that is really produced, so that a row really ends
    for eos in (None, ending):
        plain = model.generate(**inputs, do_sample=False, eos_token_id=eos)
        out = model.generate(
            **inputs, do_sample=False, eos_token_id=eos, custom_generate=early(case, threshold="never")
        )
        assert out.sequences.tolist() == plain.tolist()
        depths = out.exit_layers
        assert set(depths.unique().tolist()) <= {0, case.backbone.n_layers}
        assert out.trace.mean_depth == 1.0
        assert out.trace.counted_reduction == 0.0


def test_processors_criteria_and_sampling_are_hugging_faces(some_case: Case) -> None:
    """Sampling, penalties, minimum length and stopping criteria act as in plain ``generate``."""
    case = some_case

    class StopAt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= PROMPT + 9)

    ids, model = random_ids(2, PROMPT), case.backbone.model
    request = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "repetition_penalty": 1.3,
        "min_new_tokens": 5,
        "max_new_tokens": NEW,
        "stopping_criteria": StoppingCriteriaList([StopAt()]),
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    torch.manual_seed(3)
    plain = model.generate(ids, **request)
    torch.manual_seed(3)
    ours = model.generate(ids, **request, custom_generate=early(case, threshold="never"))
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert ours.sequences.shape[1] <= PROMPT + 9
    assert len(ours.scores) == len(plain.scores)
    assert torch.allclose(torch.stack(ours.scores), torch.stack(plain.scores), atol=1e-4)


def test_a_generated_row_equals_the_row_alone(case: Case) -> None:
    """Law 6 in free generation, rows leaving at different depths."""
    check_generated_rows_alone(case, "propagate")


def test_a_generated_row_equals_the_row_alone_under_a_cheap_policy(cheap_case: Case) -> None:
    check_generated_rows_alone(cheap_case, cheap_case.cheap_policy())


def check_generated_rows_alone(case: Case, policy: str) -> None:
    batch, new, model = 4, 8, case.backbone.model
    ids, mask, script = random_ids(batch, PROMPT), left_padding(batch, PROMPT), pattern(batch, new, len(case.exits))
    request = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    together = model.generate(
        ids,
        attention_mask=mask,
        custom_generate=early(case, ScriptedConfidence(script), threshold=0.5, policy=policy),
        **request,
    )
    for row in range(batch):
        estimator = ScriptedConfidence(script[row : row + 1])
        alone = model.generate(
            ids[row : row + 1, row:], custom_generate=early(case, estimator, threshold=0.5, policy=policy), **request
        )
        assert together.sequences[row, row:].tolist() == alone.sequences[0].tolist()
        assert together.exit_layers[row].tolist() == alone.exit_layers[0].tolist()


def test_depth_per_token_follows_the_script(some_case: Case) -> None:
    case = some_case
    script = pattern(2, NEW, len(case.exits), seed=1)
    depths = torch.tensor([*case.exits, case.backbone.n_layers])
    seen: list[list[int]] = []
    decoding = early(
        case, ScriptedConfidence(script), threshold=0.5, on_token=lambda tokens, layers: seen.append(layers.tolist())
    )
    out = case.backbone.model.generate(
        random_ids(2, PROMPT), custom_generate=decoding, max_new_tokens=NEW, eos_token_id=None, do_sample=False
    )
    expected = torch.cat((torch.full((2, 1), case.backbone.n_layers), depths[script[:, : NEW - 1]]), dim=1)
    assert out.exit_layers.tolist() == expected.tolist()
    assert torch.tensor(seen).T.tolist() == expected.tolist()
    assert out.trace.mean_depth == pytest.approx(float(expected.float().mean()) / case.backbone.n_layers)
    assert sum(out.trace.histogram.values()) == out.trace.n_tokens == 2 * NEW


def test_depth_never_falls_as_the_threshold_rises(some_case: Case) -> None:
    """Law 8 on the first token that may leave: same state, so only the threshold decides."""
    case = some_case
    ids, depths = random_ids(3, PROMPT), []
    for threshold in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, "never"):
        out = case.backbone.model.generate(
            ids, custom_generate=early(case, threshold=threshold), max_new_tokens=2, eos_token_id=None, do_sample=False
        )
        depths.append(out.exit_layers[:, 1])
    assert (torch.stack(depths).diff(dim=0) >= 0).all()
    assert depths[0].tolist() == [case.exits[0]] * 3
    assert depths[-1].tolist() == [case.backbone.n_layers] * 3


def test_an_exception_leaves_the_model_as_it_was(some_case: Case) -> None:
    """Law 5: weights, config, hooks and results after a callback that raises mid-decode."""
    case = some_case
    model, ids = case.backbone.model, random_ids(1, PROMPT)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, hooks = model.config.to_dict(), [len(module._forward_hooks) for module in model.modules()]
    plain = model.generate(ids, max_new_tokens=5, do_sample=False)
    calls = []

    def explode(tokens, layers):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("callback failed")

    with pytest.raises(RuntimeError, match="callback failed"):
        model.generate(ids, custom_generate=early(case, threshold=0.0, on_token=explode), max_new_tokens=8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert model.generate(ids, max_new_tokens=5, do_sample=False).tolist() == plain.tolist()


def test_changed_weights_are_noticed(some_case: Case) -> None:
    """The stacked copy of skipped layers' weights follows the model's own, changed in place between generations."""
    script = torch.tensor([[0] * 3 + [9] * NEW])

    def run(exits: Exits, model: torch.nn.Module) -> torch.Tensor:
        decoding = EarlyExit(exits, measure="softmax_margin", threshold=0.5)
        decoding.estimator = ScriptedConfidence(script)
        request = {"max_new_tokens": NEW, "eos_token_id": None, "do_sample": False}
        wanted = {"return_dict_in_generate": True, "output_logits": True}
        out = model.generate(random_ids(1, PROMPT), custom_generate=decoding, **request, **wanted)
        return torch.stack(out.logits)

    model = some_case.backbone.model
    exits = Exits.untrained(some_case.backbone, some_case.exits)
    before = run(exits, model)
    with torch.no_grad():
        for name, parameter in some_case.backbone.layers[-1].named_parameters():
            if any(part in name for part in ("k_proj", "in_proj", "conv1d", "A_log", "norm")):
                parameter.mul_(1.5)
    after = run(exits, model)
    copied = copy.deepcopy(model)
    expected = run(Exits.untrained(adapt(copied), some_case.exits), copied)
    assert (after - before).abs().max() > 1e-3
    assert torch.allclose(after, expected, atol=1e-5)


def test_right_padding_is_refused(some_case: Case) -> None:
    case = some_case
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, -2:] = 0
    with pytest.raises(UsageError, match=r"prompts \[1\] are padded on the right.*padding_side = \"left\""):
        case.backbone.model.generate(
            random_ids(2, PROMPT), attention_mask=mask, custom_generate=early(case, threshold=0.5), max_new_tokens=3
        )
