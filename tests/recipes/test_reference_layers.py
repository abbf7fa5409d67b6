"""The recipe's fast forward, objective and data split equal their plain twins."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from dynamax_llm.backbones.loading import REFERENCE_FOLDER
from dynamax_llm.training.multi_exit import Mixture, readout_loss, rotate_exits
from tests.recipes.scripts import script

Stack, ssd = script("reference/layers").Stack, script("reference/layers").ssd
held_out_key, is_held_out = script("reference/mixture").held_out_key, script("reference/mixture").is_held_out
MultiExitLoss, config = script("reference/objective").MultiExitLoss, script("reference/shapes").config
learning_rate, orthogonalise = script("reference/optim").learning_rate, script("reference/optim").orthogonalise
table, validation = script("reference/evaluate").table, script("reference/evaluate").validation
card = script("reference/finish").card


def tiny(kind: str) -> torch.nn.Module:
    """A tiny stock model whose parameters are all away from their defaults, fp32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(kind, smoke=True), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("kind", ["transformer", "mamba"])
@pytest.mark.parametrize("length", [150, 64])
def test_fast_forward_equals_stock_in_output_and_gradient(kind: str, length: int) -> None:
    model = tiny(kind)
    ids = torch.randint(8192, (2, length))
    probe = torch.randn(2, length, 8192) / length

    slow = model(ids, use_cache=False).logits
    (slow * probe).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    stack = Stack(model)
    fast = stack.normed(stack.states(ids)[-1]) @ stack.head.T
    (fast * probe).sum().backward()

    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_ssd_equals_the_recurrence() -> None:
    torch.manual_seed(1)
    batch, length, heads, width, size = 2, 70, 3, 4, 5
    x, dt = torch.randn(batch, length, heads, width), torch.rand(batch, length, heads)
    b, c = torch.randn(batch, length, size), torch.randn(batch, length, size)
    a_log, d = torch.log(torch.rand(heads) * 3), torch.randn(heads)
    a = -torch.exp(a_log)
    state, rows = torch.zeros(batch, heads, size, width), []
    for t in range(length):
        fed = dt[:, t, :, None, None] * b[:, t, None, :, None] * x[:, t, :, None, :]
        state = torch.exp(dt[:, t] * a)[..., None, None] * state + fed
        rows.append(torch.einsum("bn,bhnp->bhp", c[:, t], state) + d[:, None] * x[:, t])
    torch.testing.assert_close(ssd(x, dt, a_log, b, c, d), torch.stack(rows, 1), atol=1e-5, rtol=1e-4)


def test_objective_gradient_equals_autograd() -> None:
    torch.manual_seed(2)
    model = tiny("transformer")
    stack, loss = Stack(model), MultiExitLoss(distil=0.7, exit_weight=0.8)
    ids, exits = torch.randint(8192, (2, 17)), [1, 3]

    def normed() -> list[torch.Tensor]:
        states = stack.states(ids[:, :-1])
        return [stack.normed(states[e - 1]) for e in (*exits, 4)]

    entropies = loss.backward(normed(), exits, ids[:, 1:], stack.head)
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    readouts = [(h @ stack.head.T).flatten(0, 1) for h in normed()]
    targets = ids[:, 1:].flatten()
    hard = [torch.nn.functional.cross_entropy(logits, targets) for logits in readouts]
    mixture, teacher = Mixture.of(exits, 0.7, 0.8), readouts[-1].detach().log_softmax(-1)
    parts = zip(readouts, mixture.hard, mixture.soft, strict=True)
    total = sum(readout_loss(logits, targets, teacher, one, other) for logits, one, other in parts)
    (total / len(targets)).backward()

    torch.testing.assert_close(entropies, torch.stack(hard).detach(), atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_exits_rotate_over_every_earlier_layer_and_depend_only_on_the_step() -> None:
    for depth in (16, 24):
        seen = {e for step in range(400) for e in rotate_exits(step, range(1, depth), 3)}
        assert seen == set(range(1, depth))
    assert rotate_exits(7, range(1, 16), 3) == [5, 7, 11]
    assert rotate_exits(7, range(1, 16), 0) == []


def test_orthogonalised_singular_values_are_near_one() -> None:
    torch.manual_seed(3)
    for shape in ((3, 48, 16), (3, 16, 48)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape), torch.float32))
        assert values.min() > 0.5 and values.max() < 1.35


def test_learning_rate_rises_then_falls_to_almost_nothing() -> None:
    rates = [learning_rate(p / 100) for p in range(101)]
    assert rates[0] < 0.05 and max(rates) == 1.0 and rates[100] < 0.01
    assert all(a >= b for a, b in pairwise(rates[40:]))


def test_held_out_split_is_pinned_and_shared_between_wikipedia_and_squad() -> None:
    row = {"title": "New_York_City", "context": "x", "text": "y", "part": 3, "question": "z"}
    assert held_out_key("squad", row) == held_out_key("wikipedia", row | {"title": "New York City"})
    share = sum(is_held_out("wikipedia", {"title": str(i)}) for i in range(20_000)) / 20_000
    assert 0.007 < share < 0.013
    assert [i for i in range(300) if is_held_out("dialogues", {"text": str(i)})] == [92, 250]


def test_validation_is_the_stock_models() -> None:
    model, held_out = tiny("transformer"), torch.randint(8192, (3, 33))
    result = validation(model, held_out, bytes_per_token=4.0)
    with torch.no_grad():
        logits = model(held_out[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
    assert result["loss"] == pytest.approx(float(expected), abs=1e-4)
    assert result["tokens"] == 96 and result["agreement_per_layer"][-1] == 1.0
    assert result["accuracy"] == pytest.approx(float((logits.argmax(-1) == held_out[:, 1:]).double().mean()))
    assert f"validation loss {result['loss']:.4f}; bits per byte" in table(result)


@pytest.mark.parametrize("name", ["transformer-ee", "mamba-ee"])
def test_a_shipped_card_is_made_of_its_metrics(name: str) -> None:
    folder = REFERENCE_FOLDER / name
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    parameters = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert card(name, parameters, metrics).split() == (folder / "README.md").read_text(encoding="utf-8").split()
