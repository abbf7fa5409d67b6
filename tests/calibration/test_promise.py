"""Promises in words, their records on disk, and what generation makes of them."""

from __future__ import annotations

import json

import pytest
import torch

from dynamax_llm import cli
from dynamax_llm.backbones.loading import load
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.errors import PolicyMismatchError, PromiseError, UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.promise import METHODS, Promise, Target, digest
from tests.calibration.promised import promised_folder, record
from tests.folders import exits_folder, model_folder


@pytest.mark.parametrize(
    ("text", "canonical", "measure", "limit"),
    [
        (" agreement >= .98 ", "agreement>=0.98", "agreement", 0.02),
        ("consistency>=0.90", "consistency>=0.9", "consistency", 0.1),
        ("risk<=0.02", "risk[f1]<=0.02", "risk:f1", 0.02),
        ("risk[ exact_match ] <= 5e-2", "risk[exact_match]<=0.05", "risk:exact_match", 0.05),
    ],
)
def test_a_promise_has_one_spelling(text, canonical, measure, limit):
    target = Target.parse(text)
    assert (target.text, target.measure, target.limit) == (canonical, measure, limit)
    assert Target.parse(target.text) == target


@pytest.mark.parametrize("text", ["", "agreement", "agreement=0.9", "risk>=0.1", "agreement>=0", "agreement>=1.0.0"])
def test_what_is_no_promise_is_refused(text):
    with pytest.raises(UsageError, match=r"agreement>=0\.98"):
        Target.parse(text)


def test_records_survive_save_and_load(tmp_path):
    exits = Exits.from_pretrained(promised_folder(tmp_path, {}, {"policy": "defer", "evidence": ({"kept": True},)}))
    assert [promise.policy for promise in exits.promises] == ["propagate", "defer"]
    assert exits.promises[0] == exits.keep(record(exits)).promises[-1]
    assert Promise.from_json(exits.promises[1].to_json()) == exits.promises[1]
    newer = record(exits, n=99)
    assert [promise.n for promise in exits.keep(newer).promises] == [40, 99], "the same key is replaced"


def test_a_promise_decides_threshold_policy_window_and_judge(tmp_path):
    exits = Exits.from_pretrained(promised_folder(tmp_path, {"policy": "defer", "window": 3, "estimator": "entropy"}))
    early = EarlyExit(exits, promise="agreement >= 0.90")
    assert early.thresholds.values == (0.0, None)
    assert (early.policy.name, early.window, early.measure) == ("defer", 3, "entropy")
    assert early.promise == exits.promises[0]
    model, tokenizer = load(model_folder())
    inputs = tokenizer("The cat", return_tensors="pt")
    out = model.generate(**inputs, custom_generate=early, max_new_tokens=8, do_sample=False)
    assert out.exit_layers[0, 1:].tolist() == [2] * 7
    same = EarlyExit(exits, promise="agreement>=0.9", policy="defer", measure="entropy", window=3)
    assert same.thresholds == early.thresholds


def test_nothing_may_contradict_a_promise(tmp_path):
    exits = Exits.from_pretrained(promised_folder(tmp_path))
    with pytest.raises(UsageError, match="Give only one"):
        EarlyExit(exits, promise="agreement>=0.9", threshold=0.9)
    with pytest.raises(PolicyMismatchError, match="under policy 'verify'"):
        EarlyExit(exits, promise="agreement>=0.9", policy="verify")
    with pytest.raises(PolicyMismatchError, match="window of 16"):
        EarlyExit(exits, promise="agreement>=0.9", window=2)
    with pytest.raises(PromiseError, match=r"there: agreement>=0\.9"):
        EarlyExit(exits, promise="agreement>=0.8")


def test_generate_names_the_promise(tmp_path, capsys):
    folder = promised_folder(tmp_path / "exits")
    command = ["generate", model_folder(), "--exits", folder, "--prompt", "The cat", "--max-new-tokens", 6]
    assert cli.run([str(part) for part in (*command, "--promise", "agreement>=0.9")]) == 0
    expected = "promise agreement>=0.9: At most 10 % of tokens differ from the full model's given the same prefix, with"
    assert expected in capsys.readouterr().out
    assert cli.run([str(part) for part in (*command, "--promise", "agreement>=0.9", "--json")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["promise"] == "agreement>=0.9"
    assert {token["depth"] for token in document["results"][0]["tokens"][1:]} <= {2}


def test_the_weaker_promise_says_so():
    exits = Exits.from_pretrained(exits_folder())
    weak = record(exits, method="crc", confidence=None, p_value=None)
    assert "on average over draws of 40 prompts" in weak.sentence() and "confidence" not in weak.sentence()
    risk = record(exits, text="risk[f1]<=0.05", measure="risk:f1", bound=0.05)
    assert risk.sentence().startswith("The mean f1 against reference answers drops by at most 0.05, with 95 %")
    assert record(exits, text="consistency>=0.9", measure="consistency").sentence().startswith("The mean ROUGE-L")


def test_the_dtype_is_no_part_of_who_a_backbone_is():
    identity = Exits.from_pretrained(exits_folder()).fingerprint
    assert digest({**identity, "dtype": str(torch.bfloat16)}) == digest(identity)
    assert digest({**identity, "weights": "other"}) != digest(identity)


def test_records_of_every_method_are_read():
    exits = Exits.from_pretrained(exits_folder())
    for method in METHODS:
        made = record(exits, method=method)
        assert Promise.from_json(made.to_json()).method == method
    with pytest.raises(ValueError, match="'method' cannot be 'hope'"):
        Promise.from_json({**record(exits).to_json(), "method": "hope"})
