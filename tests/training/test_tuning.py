"""Tuning: the loss and its gradient, adapters that leave no trace, a folder any tool loads, figures that are true."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dynamax_llm.backbones import adapt
from dynamax_llm.errors import ArtifactError, BackboneError, UsageError
from dynamax_llm.testing import tiny_model
from dynamax_llm.text.batches import Batch, Split, find_source, first_batches, pad
from dynamax_llm.training.multi_exit import Mixture, depth_weights
from dynamax_llm.training.run import Counters
from dynamax_llm.training.tuning import TuneSettings, tune
from dynamax_llm.training.tuning.learner import TuneLearner
from dynamax_llm.training.tuning.measure import measure
from dynamax_llm.training.tuning.student import Student, adaptable, student
from tests.folders import byte_tokenizer, model_folder
from tests.folders import corpus as text

LAYERS = (1, 2, 4)
SETTINGS = TuneSettings(
    max_tokens=1500, sequence=48, batch_tokens=192, eval_tokens=200, held_out=0.1, lr=5e-3, seed=3, quiet=True
)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    return pad([torch.randint(61, (length,), generator=generator).tolist() for length in (9, 14, 14)])


def perturb(pupil: Student) -> None:
    """Adapters begin as zero and a copy as the original: move them apart, so that teacher and student differ."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in pupil.parameters.values():
            parameter.add_(0.05 * torch.randn_like(parameter))


def explicit_loss(model: torch.nn.Module, teacher: Tensor, exits: tuple[int, ...], settings: TuneSettings) -> Tensor:
    """The loss from the stock model's own hidden states, all logits at once. The last state is normed already."""
    data = batch()
    states = model.model(data.ids, output_hidden_states=True).hidden_states
    speaks, targets = data.mask[:, 1:], data.ids[:, 1:][data.mask[:, 1:]]
    total = torch.zeros(())
    for layer in (*exits, 5):
        normed = states[5] if layer == 5 else model.model.norm(states[layer])
        logs = model.lm_head(normed)[:, :-1][speaks].log_softmax(-1)
        weight = 1.0 if layer == 5 else settings.exit_weight * layer / sum(exits)
        share = settings.distil if layer < 5 or settings.teacher == "original" else 0.0
        fixed = (teacher if settings.teacher == "original" else states[5] @ model.lm_head.weight.T).detach()
        log_q = fixed[:, :-1][speaks].log_softmax(-1)
        hard = -logs.gather(-1, targets[:, None]).mean()
        soft = (log_q.exp() * (log_q - logs)).sum(-1).mean()
        total = total + weight * ((1 - share) * hard + share * soft)
    return total


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("teacher", ["original", "current"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_loss_and_gradient_equal_an_explicit_computation(
    method: str, teacher: str, checkpointing: bool, monkeypatch
) -> None:
    monkeypatch.setattr("dynamax_llm.exits.readouts.base.LOGITS_AT_ONCE", 61 * 10)  # several slices
    settings = dataclasses.replace(
        SETTINGS, method=method, teacher=teacher, distil=0.6, exit_weight=0.7, checkpointing=checkpointing
    )
    backbone = adapt(tiny_model("mistral"))
    original = backbone.model(batch().ids).logits
    with student(backbone, settings) as pupil:
        perturb(pupil)
        learner = TuneLearner(pupil, LAYERS, settings)
        for exits in (LAYERS, (2,), (4,)):  # every exit beside others or alone
            learner.optimiser.zero_grad()
            found = learner.backward(batch(), exits)
            got = {name: p.grad.clone() for name, p in pupil.parameters.items()}
            learner.optimiser.zero_grad()
            expected = explicit_loss(pupil.backbone.model, original, exits, settings)
            expected.backward()
            assert found == pytest.approx(float(expected.detach()), rel=1e-5)
            for name, parameter in pupil.parameters.items():
                assert torch.allclose(got[name], parameter.grad, atol=1e-5, rtol=1e-3), name


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["mistral", "mamba2", "zamba2"])
def test_every_family_gets_a_gradient_and_its_teacher_is_the_untouched_model(family: str, method: str) -> None:
    backbone = adapt(tiny_model(family, layers=3))
    settings = dataclasses.replace(SETTINGS, method=method)
    original = backbone.model(batch().ids).logits
    with student(backbone, settings) as pupil:
        perturb(pupil)
        TuneLearner(pupil, (1, 2), settings).backward(batch(), (1, 2))
        norms = {name: float(p.grad.norm()) for name, p in pupil.parameters.items() if p.grad is not None}
        assert len(norms) >= 0.9 * len(pupil.parameters)
        assert sum(norm > 0 for norm in norms.values()) >= 0.9 * len(norms)
        moved = pupil.backbone.model(batch().ids).logits
        with pupil.teacher() as teacher:
            assert torch.equal(teacher.model(batch().ids).logits, original)
        assert float((moved - original).detach().abs().max()) > 1e-3
    assert torch.equal(backbone.model(batch().ids).logits, original)
    if method == "lora":
        mixers = [name for name in adaptable(backbone) if name.endswith(("out_proj", "dt_proj"))]
        assert mixers == [] and all(p.requires_grad for p in backbone.model.parameters())


def test_at_step_0_the_original_teaches_the_last_layer_nothing() -> None:
    """KL to the original is 0 where the student still is the original, and so is its gradient."""
    backbone = adapt(tiny_model("mistral"))
    with student(backbone, dataclasses.replace(SETTINGS, method="full")) as pupil:
        learner = TuneLearner(pupil, LAYERS, SETTINGS)
        assert learner.backward(batch(), ()) == pytest.approx(0.0, abs=1e-6)
        assert max(float(p.grad.abs().max()) for p in pupil.parameters.values() if p.grad is not None) < 1e-6
        assert learner.backward(batch(), (2,)) > 0.1


def test_weights_are_calms_and_the_shares_add_up() -> None:
    assert depth_weights(range(1, 5)) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    mixture = Mixture.of((2, 6), distil=0.25, exit_weight=0.8, last_distil=0.5)
    assert mixture.hard == pytest.approx((0.15, 0.45, 0.5))
    assert mixture.soft == pytest.approx((0.05, 0.15, 0.5))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A LoRA tuning of a saved tiny model: the backbone, its weights before, and the result."""
    backbone = adapt(AutoModelForCausalLM.from_pretrained(model_folder("mistral")).eval())
    weights = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    out = tmp_path_factory.mktemp("tuned") / "model"
    settings = dataclasses.replace(SETTINGS, distil=0.5)
    return backbone, weights, tune(backbone, byte_tokenizer(), find_source(text()), LAYERS, settings, out)


def held_out() -> list[Batch]:
    split = Split(find_source(text()), byte_tokenizer(), True, 0.1, 48, 192, SETTINGS.seed)
    return first_batches(split, SETTINGS.eval_tokens)


def test_the_source_is_untouched(tuned) -> None:
    backbone, weights, _ = tuned
    assert set(weights) == set(backbone.model.state_dict())
    assert all(torch.equal(value, weights[name]) for name, value in backbone.model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in backbone.model.parameters())
    assert not hasattr(backbone.model, "peft_config")


def test_the_folder_is_a_stock_model_with_the_tuned_logits(tuned) -> None:
    backbone, _, result = tuned
    assert sorted(item.name for item in result.folder.parent.iterdir()) == ["model"]  # no work folder is left
    names = {item.name for item in result.folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tuning.json", "README.md"} <= names
    model, report = AutoModelForCausalLM.from_pretrained(result.folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(model) is type(backbone.model)
    again = tune(
        backbone,
        byte_tokenizer(),
        find_source(text()),
        LAYERS,
        dataclasses.replace(SETTINGS, distil=0.5),
        result.folder.parent / "twin",
    )
    twin = AutoModelForCausalLM.from_pretrained(again.folder)
    ids = batch().ids
    assert torch.equal(model(ids).logits, twin(ids).logits)  # the same seed gives the same model
    assert float((model(ids).logits - backbone.model(ids).logits).detach().abs().max()) > 1e-2
    record = json.loads((result.folder / "tuning.json").read_text())
    assert record["settings"]["rank"] == 16 and record["versions"]["peft"] and record["tokens"] >= 1500
    assert f"{result.after.loss:.4f}" in (result.folder / "README.md").read_text()


def test_figures_are_the_saved_models_and_the_exits_improve(tuned) -> None:
    backbone, _, result = tuned
    batches = held_out()
    saved = AutoModelForCausalLM.from_pretrained(result.folder).eval()
    for model, figures in ((backbone.model, result.before), (saved, result.after)):
        total = count = 0.0
        for one in batches:
            logits = model(one.ids, attention_mask=one.mask.long()).logits
            labels = one.ids.masked_fill(~one.mask, -100)
            part = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
            )
            total, count = total + float(part.detach()), count + float((labels[:, 1:] >= 0).sum())
        assert figures.tokens == count
        assert figures.loss == pytest.approx(total / count, rel=1e-5)
        assert figures.agreement_per_layer[-1] == 1.0
        assert figures.oracle_depth <= figures.oracle_depth_at_exits < 1.0 >= figures.margin_depth
    assert result.after.exit_loss < 0.9 * result.before.exit_loss
    assert 0 < result.kept < 1
    losses = [row["loss"] for row in result.record["history"]]
    assert losses[-1] < losses[0]


def test_a_killed_tuning_ends_like_an_unbroken_one(tuned, tmp_path: Path, monkeypatch) -> None:
    backbone, _, unbroken = tuned
    settings = dataclasses.replace(SETTINGS, distil=0.5, checkpoint_seconds=0.0)
    arguments = (backbone, byte_tokenizer(), find_source(text()), LAYERS, settings, tmp_path / "model")
    original = TuneLearner.step

    def killed(self, one, counters) -> None:
        if counters.steps == 3:
            raise SystemError("killed")
        original(self, one, counters)

    with monkeypatch.context() as patch:
        patch.setattr(TuneLearner, "step", killed)
        with pytest.raises(SystemError):
            tune(*arguments)
    assert sorted(item.name for item in tmp_path.iterdir()) == [".model.tuning"]  # nothing half-written
    with pytest.raises(UsageError, match=r"holds another training run: layers is \[1, 2\] here"):
        tune(*arguments[:3], (1, 2), *arguments[4:])
    resumed = tune(*arguments)
    assert resumed.after.to_json() == unbroken.after.to_json()
    assert resumed.record["history"] == unbroken.record["history"]
    assert os.listdir(tmp_path) == ["model"]
    with pytest.raises(ArtifactError, match="is not empty"):
        tune(*arguments)


def test_full_tuning_rotates_and_saves_in_the_dtype_asked_for(tmp_path: Path) -> None:
    backbone = adapt(tiny_model("mamba2", layers=3, vocab=257))
    settings = dataclasses.replace(SETTINGS, method="full", schedule="rotating", teacher="current", max_tokens=400)
    result = tune(backbone, byte_tokenizer(), find_source(text()), (1, 2), settings, tmp_path / "o", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    assert model.dtype == torch.bfloat16
    assert result.record["trained_parameters"] == sum(p.numel() for p in backbone.model.parameters())
    rounded = measure(adapt(model.float().eval()), held_out(), (1, 2), 0.98)
    assert rounded.loss == pytest.approx(result.after.loss, rel=1e-6)
    with student(backbone, settings) as pupil:
        learner = TuneLearner(pupil, (1, 2), settings)
        assert {tuple(learner.exits(step)) for step in range(20)} == {(1,), (2,)}


@pytest.mark.parametrize(
    ("setting", "value"),
    [("method", "qlora"), ("rank", 0), ("schedule", "all"), ("distil", 1.2), ("lr", 0.0), ("exit_weight", 0.0)],
)
def test_settings_out_of_bounds_are_named(setting: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"tuning setting {setting} = {value!r}: give "):
        TuneSettings(**{setting: value})


def test_what_is_no_number_stops_the_run(tmp_path: Path) -> None:
    backbone = adapt(tiny_model("mistral", vocab=257))
    with student(backbone, SETTINGS) as pupil:
        list(pupil.parameters.values())[-1].data.fill_(float("nan"))
        with pytest.raises(UsageError, match=r"became nan in step 8: training at lr 0\.005 .*smaller learning rate"):
            TuneLearner(pupil, (1, 2), SETTINGS).step(batch(), Counters(tokens=750, steps=7))
    backbone.model.model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(BackboneError, match=r"gives no numbers .* load it in float32"):
        tune(backbone, byte_tokenizer(), find_source(text()), (1, 2), SETTINGS, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_exits_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    for layers in ((), (0, 2), (2, 5), (2, 1), (2, 2)):
        with pytest.raises(UsageError, match="give layers between 1 and 4, rising"):
            tune(adapt(tiny_model("mistral")), None, find_source(text()), layers, SETTINGS, tmp_path / "o")
    assert not list(tmp_path.iterdir())
