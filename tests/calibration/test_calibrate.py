"""Calibration on tiny backbones: losses equal their definitions, paths never rise, records hold what was done."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from dynamax_llm import cli
from dynamax_llm.backbones import adapt
from dynamax_llm.backbones.loading import load
from dynamax_llm.calibration.calibrate import CalibrationSettings, Request, _tests, calibrate
from dynamax_llm.calibration.path import Point, Trace, learn_path
from dynamax_llm.calibration.prompts import Item, draw, draw_questions
from dynamax_llm.calibration.risks import (
    AgreementRisk,
    Measured,
    TextRisk,
    best,
    inconsistency,
    shortfall,
)
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.errors import PromiseError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.promise import METHODS, Promise
from dynamax_llm.metrics import exact_match, f1, rouge_l
from dynamax_llm.testing import zero_tail
from dynamax_llm.text.sources import find_source
from dynamax_llm.traces.teacher_forced import step_by_step
from tests.folders import corpus, exits_folder, model_folder

SHORT = CalibrationSettings(prompts=40, prompt_tokens=6, new_tokens=6)


def trace(drift_penalty: tuple[float, ...] = ()) -> Trace:
    """Confidences that mean what they say, at two exits of four layers."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(2, 600, generator=generator, dtype=torch.float64).sqrt()
    agrees = torch.rand(2, 600, generator=generator) < confidence
    return Trace(confidence, agrees, torch.arange(600) % 2 == 1, (1, 2), 4, drift_penalty)


@pytest.mark.parametrize("drift_penalty", [(), (0.5, 0.0), (0.0, 0.5)])
def test_thresholds_never_rise_and_depth_never_falls_back(drift_penalty, monkeypatch):
    monkeypatch.setattr("dynamax_llm.calibration.path.LEVELS", 64)
    path = learn_path(trace(drift_penalty), 0.05, [step / 20 for step in range(1, 21)])
    assert len(path.points) >= 10
    for safe, risky in zip(path.points, path.points[1:], strict=False):
        assert safe.parameter < risky.parameter <= 1.0 and safe.depth > risky.depth
        for one, other in zip(safe.thresholds, risky.thresholds, strict=True):
            assert (1e9 if one is None else one) >= (1e9 if other is None else other)


def test_a_path_avoids_an_exit_that_harms_later_tokens(monkeypatch):
    monkeypatch.setattr("dynamax_llm.calibration.path.LEVELS", 64)
    first = learn_path(trace((2.0, 0.0)), 0.05, [0.1]).points[0]
    assert learn_path(trace((2.0, 0.0)), 0.05, [0.1]).family == "balanced"
    assert first.thresholds[0] is None and first.thresholds[1] is not None


@pytest.mark.parametrize(
    ("model_type", "policy"), [("llama", "propagate"), ("llama", "copy"), ("mamba2", "defer"), ("mamba2", "stale")]
)
def test_agreement_is_the_share_of_equal_tokens(model_type, policy):
    model, tokenizer = load(model_folder(model_type))
    exits = Exits.from_pretrained(exits_folder(model_type))
    items = draw(find_source(corpus()), tokenizer, 3, 6, 6).items
    risk = AgreementRisk(adapt(model), tokenizer, items, batch=2)
    nothing = risk.measure(EarlyExit(exits, threshold="never", policy=policy))
    assert nothing.losses.tolist() == [0.0] * 3 and nothing.depth.tolist() == [1.0] * 3
    always = risk.measure(EarlyExit(exits, threshold=0.0, policy=policy))
    assert always.depth.tolist() == pytest.approx([0.4] * 3)
    # By hand: the second layer's own token after each new one, its predecessors decoded the same way.
    backbone, plan, _ = EarlyExit(exits, threshold=0.0, policy=policy).attach(model)
    ids = torch.tensor([item.ids for item in items])
    slow = step_by_step(backbone, plan, ids, (0.0, 0.0), prompt_length=6).tokens[:, 6:]
    full = model(ids).logits[:, 6:].argmax(-1)
    assert always.losses.tolist() == pytest.approx((slow != full).double().mean(1).tolist())
    assert float(always.losses.mean()) > 0.0


def test_texts_are_compared_with_the_full_models_own():
    model, tokenizer = load(model_folder())
    exits = Exits.from_pretrained(exits_folder())
    items = [Item(tuple(tokenizer(text).input_ids), len(text)) for text in ("The cat sat", "A dog")]
    risk = TextRisk(adapt(model), tokenizer, items, new=8, loss=inconsistency)
    assert risk.measure(EarlyExit(exits, threshold="never")).losses.tolist() == [0.0, 0.0]
    found = risk.measure(EarlyExit(exits, threshold=0.0))
    for text, loss in zip(("The cat sat", "A dog"), found.losses.tolist(), strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        texts = []
        for threshold in ("never", 0.0):
            early = EarlyExit(exits, threshold=threshold)
            out = model.generate(**inputs, custom_generate=early, max_new_tokens=8, do_sample=False)
            new = out.sequences[0, len(text) :][out.exit_layers[0] > 0]
            texts.append(tokenizer.decode(new, skip_special_tokens=True))
        assert loss == pytest.approx(1.0 - rouge_l(texts[1], texts[0]))


def test_answers_are_scored_as_squad_scores_them():
    assert exact_match("The  Eiffel-Tower!", "eiffeltower") == 1.0
    assert f1("in the city of Paris", "Paris") == pytest.approx(2 * 1 / (4 - 0 + 1))
    assert f1("", "") == 1.0 and f1("cat", "dog") == 0.0
    assert best(exact_match, " Paris\nQuestion: next", ("Lyon", "paris")) == 1.0
    item = Item((), 0, ("Paris",))
    assert shortfall("f1")("Rome", "Paris", item) == 1.0
    assert shortfall("f1")("Paris", "Rome", item) == 0.0, "a gain does not pay for a loss"


def test_one_sequence_per_document_and_none_twice(tmp_path):
    _, tokenizer = load(model_folder())
    path = tmp_path / "texts.jsonl"
    texts = ["a long enough text", "a long enough text", "another that is long", "short"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    drawn = draw(find_source(path), tokenizer, 9, 4, 8)
    assert (len(drawn.items), drawn.left_out, drawn.tokens) == (2, 1, 24)
    assert drawn == draw(find_source(path), tokenizer, 9, 4, 8)
    assert drawn.sha256 != draw(find_source(path), tokenizer, 1, 4, 8).sha256
    rows = [
        {"question": "Where?", "answers": ["Paris", "paris", "Paris"]},
        {"question": "Who?", "answer": {"value": "Curie", "aliases": ["Marie Curie"]}},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = draw_questions(find_source(path), tokenizer, 9, 64).items
    path.write_text(json.dumps({"prompt": "Q: Where?\nA:", "answers": ["Paris"]}) + "\n")
    (whole,) = draw_questions(find_source(path), tokenizer, 9, 64).items
    assert tokenizer.decode(whole.ids) == "Q: Where?\nA:" and whole.answers == ("Paris",)
    assert sorted(item.answers for item in found) == [("Curie", "Marie Curie"), ("Paris", "paris")]
    assert {tokenizer.decode(item.ids) for item in found} == {f"Question: {q}\nAnswer:" for q in ("Where?", "Who?")}


@pytest.mark.parametrize(
    ("promise", "method"),
    [*(("agreement>=0.8", method) for method in METHODS), ("consistency>=0.6", "ltt")],
)
def test_a_backbone_whose_tail_does_nothing_keeps_every_promise(promise, method):
    model, tokenizer = load(model_folder())
    backbone = adapt(zero_tail(model, 2))
    exits = Exits.untrained(backbone, (2, 3))
    source = find_source(corpus())
    found = calibrate(backbone, tokenizer, exits, source, promise, measure="softmax_max", method=method, settings=SHORT)
    assert found.estimate == 1.0 and found.mean_depth == pytest.approx(0.4 if promise[0] == "a" else 0.52, abs=0.02)
    assert (found.n, found.n_path, found.estimator, found.method) == (32, 8, "softmax_max", method)
    assert all(test["kept"] for test in found.evidence) and found.evidence[-1]["thresholds"] == list(found.thresholds)
    depths = [test["mean_depth"] for test in found.evidence]
    assert depths == sorted(depths, reverse=True)
    assert (found.p_value is None) == (found.confidence is None) == (method == "crc")


def test_tests_come_near_by_halves_in_case_the_path_split_is_wrong(monkeypatch):
    points = [Point(place / 16, (place / 16,), 0.0, 1.0) for place in range(16)]

    def measured(exits, request, point, risk):
        fails = risk == "tested" and point.parameter > 13 / 16
        return Measured(torch.full((200,), float(fails), dtype=torch.float64), torch.ones(200))

    monkeypatch.setattr("dynamax_llm.calibration.calibrate._measure", measured)
    for method, limit in itertools.product(METHODS, ("0.98", "0.5")):
        request = Request.of(f"agreement>={limit}", 0.95, method, "propagate", 16, None)
        found = [test for test, _ in _tests(None, request, points, Split("path"), Split("tested"))]
        assert [test["parameter"] * 16 for test in found] == [8, 12, 14]
        assert [test["kept"] for test in found] == [True, True, False]


class Split(str):
    """A name that has 200 items."""

    items = [None] * 200


def test_a_risk_names_the_full_models_score_and_is_refused_where_an_empty_answer_would_keep_it(tmp_path):
    model, tokenizer = load(model_folder())
    backbone = adapt(zero_tail(model, 2))
    exits = Exits.untrained(backbone, (2, 3))
    rows = [{"prompt": f"The cat {place}", "answers": ["never said"]} for place in range(12)]
    source = tmp_path / "questions.jsonl"

    def asked() -> Promise:
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = replace(SHORT, prompt_tokens=16)
        given = {"measure": "softmax_max", "settings": settings, "method": "ltt"}
        return calibrate(backbone, tokenizer, exits, find_source(source), "risk<=0.5", **given)

    with pytest.raises(PromiseError, match=r"own mean f1 is 0\.0000 there, so that an empty answer would keep it"):
        asked()
    for row in rows:  # what it says itself is the reference
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        row["answers"] = [tokenizer.decode(new, skip_special_tokens=True)]
    found = asked()
    assert found.measure == "risk:f1" and found.estimate == 0.0
    assert found.data["full_score"] > 0.9


def test_the_command_records_what_generation_uses(tmp_path, capsys):
    model, tokenizer = load(model_folder())
    zero_tail(model, 2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    exits = Exits.untrained(adapt(load(tmp_path / "model")[0]), (2, 3))
    exits.save(tmp_path / "exits")
    command = [
        "calibrate",
        tmp_path / "model",
        "--exits",
        tmp_path / "exits",
        "--data",
        corpus(),
        "--measure",
        "entropy",
    ]
    short = ["--prompts", 40, "--prompt-tokens", 6, "--max-new-tokens", 8, "--promise", "agreement>=0.8"]
    assert cli.run([str(part) for part in (*command, *short)]) == 0
    printed = capsys.readouterr().out
    assert "At most 20 % of tokens differ from the full model's given the same prefix, with 95 % confidence" in printed
    assert "It says nothing about text of another kind" in printed and "p-value" in printed
    (promise,) = Exits.from_pretrained(tmp_path / "exits").promises
    assert promise.text == "agreement>=0.8" and promise.data["source"] == str(corpus()) and promise.n == 32
    given = [
        "generate",
        tmp_path / "model",
        "--exits",
        tmp_path / "exits",
        "--prompt",
        "A",
        "--promise",
        "agreement>=.8",
    ]
    assert cli.run([str(part) for part in given]) == 0
    assert "promise agreement>=0.8" in capsys.readouterr().out


def test_shipped_exits_get_a_copy(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dynamax_llm.calibration.calibrate.PARAMETERS", (0.5,))
    shipped = ["calibrate", "transformer-ee", "--data", corpus(), "--promise", "agreement>=0.6", "--prompts", 11]
    short = ["--prompt-tokens", 8, "--max-new-tokens", 8, "--out", tmp_path / "copy"]
    assert cli.run([str(part) for part in (*shipped, *short)]) == 0
    (promise,) = Exits.from_pretrained(tmp_path / "copy").promises
    assert promise.estimator == "mlp" and Exits.from_pretrained("transformer-ee").promises == ()
    assert "Saved in" in capsys.readouterr().out
