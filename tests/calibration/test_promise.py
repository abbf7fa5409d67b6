"""Promises in words, their records on disk, and what generation makes of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamax_llm import cli
from dynamax_llm.backbones.loading import load
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.errors import ArtifactCorruptError, PolicyMismatchError, PromiseError, UsageError
from dynamax_llm.exits.artifact import MANIFEST, TENSORS, Exits
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.promise import METHODS, Promise, Target, digest
from tests.calibration.promised import promised_folder, record
from tests.folders import copy, exits_folder, make_exits, model_folder


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


#: Another value for every field of a record, some with the fields that must agree with it.
RECORD_EDITS: dict[str, dict[str, Any]] = {
    "text": {"text": "agreement>=0.95", "bound": 0.95},
    "measure": {"text": "consistency>=0.9", "measure": "consistency"},
    "bound": {"text": "agreement>=0.8", "bound": 0.8},
    "confidence": {"confidence": 0.99},
    "method": {"method": "ltt-hb"},
    "n": {"n": 400},
    "n_path": {"n_path": 11},
    "unit": {"unit": "tokens"},
    "parameter": {"parameter": 0.4},
    "thresholds": {"thresholds": [0.0, 0.5]},
    "estimate": {"estimate": 0.999},
    "p_value": {"p_value": 0.001},
    "mean_depth": {"mean_depth": 0.4},
    "policy": {"policy": "copy"},
    "window": {"window": 8},
    "readout": {"readout": "head"},
    "estimator": {"estimator": "entropy"},
    "data": {"data": {"source": "another corpus"}},
    "fingerprint": {"fingerprint": "0" * 64},
    "dynamax": {"dynamax": "0.2.0"},
    "date": {"date": "2026-02-01"},
    "evidence": {"evidence": [{"kept": True}, {"kept": True}]},
    "dtype": {"dtype": "bfloat16"},
    "digest": {"digest": "0" * 64},
}
CONFIG_EDITS: dict[str, dict[str, Any]] = {
    "layers": {"layers": [1, 3]},
    "n_layers": {"n_layers": 6},
    "inputs": {"inputs": ["statistics", "hidden"]},
    "readout": {"readout": "head", "readout_options": {}},
    "readout_options": {"readout_options": {"tail_layers": 2}},
    "candidates": {"candidates": 32},
    "shortlist": {"shortlist": "top"},
}
#: Changed sizes do not fit the tensors, which is noticed before.
SIZES = {"head", "width"}
EDITS = [
    *(("promise", change) for change in RECORD_EDITS.values()),
    *(("config", change) for change in CONFIG_EDITS.values()),
    ("fingerprint", {"weights": "0" * 64}),
    ("fingerprint", {"dtype": "bfloat16"}),
]


@pytest.fixture(scope="module")
def sealed(tmp_path_factory) -> Path:
    """Exits with a tail and one promise."""
    exits, folder = make_exits(head="mlp", readout="tail"), tmp_path_factory.mktemp("sealed") / "exits"
    exits.keep(record(exits, readout="tail", estimator="mlp", dtype="float32", evidence=({"kept": True},))).save(folder)
    return folder


@pytest.mark.parametrize(
    ("where", "change"), EDITS, ids=lambda part: part if isinstance(part, str) else next(iter(part))
)
def test_whatever_a_promise_rests_on_cannot_be_edited(where: str, change: dict, sealed: Path, tmp_path) -> None:
    folder = copy(sealed, tmp_path / "exits")
    assert len(Exits.from_pretrained(folder).promises) == 1
    manifest = json.loads((folder / MANIFEST).read_text())
    place = manifest["promises"][0] if where == "promise" else manifest[where]
    assert all(place[name] != value for name, value in change.items())
    place |= change
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactCorruptError, match=r"promise '.*calibrate again: dynamax calibrate"):
        Exits.from_pretrained(folder)


def test_every_field_is_among_the_edited() -> None:
    assert set(RECORD_EDITS) == set(Promise.model_fields)
    assert set(CONFIG_EDITS) | SIZES == {field.name for field in dataclasses.fields(ExitConfig)}


def test_other_tensors_void_a_promise(sealed: Path, tmp_path) -> None:
    """Even where the manifest names their hash."""
    folder = copy(sealed, tmp_path / "exits")
    tensors = load_file(folder / TENSORS)
    tensors["heads.prior"] = tensors["heads.prior"] + 1
    save_file(tensors, folder / TENSORS)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["tensors_sha256"] = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactCorruptError, match=r"promise '.*calibrate again"):
        Exits.from_pretrained(folder)


def test_exits_that_changed_since_calibration_are_not_saved_with_the_promise(sealed: Path, tmp_path) -> None:
    exits = Exits.from_pretrained(sealed)
    exits.heads.prior.add_(1.0)
    with pytest.raises(PromiseError, match="Calibrate again"):
        exits.save(tmp_path / "changed")
    with pytest.raises(PromiseError, match="Calibrate again"):
        dataclasses.replace(exits, promises=(record(exits),)).save(tmp_path / "never kept")
    dataclasses.replace(exits, promises=()).save(tmp_path / "without")
    assert Exits.from_pretrained(tmp_path / "without").promises == ()
