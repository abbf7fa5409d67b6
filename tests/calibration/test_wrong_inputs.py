"""Everything that can be asked wrongly of a promise: exit code 2, one line with the way out, and nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynamax_llm import cli
from dynamax_llm.exits.artifact import Exits
from tests.calibration.promised import promised_folder
from tests.folders import copy, corpus, exits_folder, model_folder

SHORT = ["--prompt-tokens", 8, "--max-new-tokens", 8]


def calibrate(*options: object, exits: object = None, promise: str = "agreement>=0.5", prompts: int = 50) -> list:
    folder = exits if exits is not None else exits_folder()
    given = ["calibrate", model_folder(), "--exits", folder, "--data", corpus(), "--promise", promise]
    return [*given, "--prompts", prompts, *SHORT, *options]


def generate(folder: Path | None, *options: object, model: object = None) -> list:
    chosen = [] if folder is None else ["--exits", folder]
    return ["generate", model or model_folder(), *chosen, "--prompt", "The cat", *options]


PROMISED = ("--promise", "agreement>=0.9")

ASKED = {
    "no promise": (lambda t: calibrate(promise="quality=high"), "'quality=high'", "agreement>=0.98"),
    "wrong side": (lambda t: calibrate(promise="agreement<=0.98"), "'agreement<=0.98'", "Write one of"),
    "no number": (lambda t: calibrate(promise="agreement>=e.+"), "'agreement>=e.+'", "between 0 and 1"),
    "bound of 1": (lambda t: calibrate(promise="agreement>=1"), "'agreement>=1'", "between 0 and 1"),
    "bound of 98": (lambda t: calibrate(promise="consistency>=98"), "'consistency>=98'", "between 0 and 1"),
    "metric": (lambda t: calibrate(promise="risk[bleu]<=0.1"), "'bleu'", "f1, exact_match"),
    "metric of agreement": (lambda t: calibrate(promise="agreement[f1]>=0.1"), "cannot be read", "risk[f1]<=0.02"),
    "confidence": (lambda t: calibrate("--confidence", 1.5), "--confidence 1.5", "between 0 and 1"),
    "method": (lambda t: calibrate("--method", "hope"), "'hope'", "ltt, ltt-hb, crc"),
    "policy": (lambda t: calibrate("--policy", "hope"), "'hope'", "propagate"),
    "verify": (lambda t: calibrate("--policy", "verify"), "'verify'", "nothing to calibrate"),
    "policy of another family": (lambda t: calibrate("--policy", "stale"), "'stale'", "Use 'propagate'"),
    "measure": (lambda t: calibrate("--measure", "hope"), "'hope'", "softmax_margin"),
    "five prompts": (
        lambda t: calibrate(prompts=5, promise="agreement>=0.98"),
        "--prompts 5: 1 beside the 4",
        "That takes 150, so at least 187 prompts in all",
    ),
    "five prompts, in expectation": (
        lambda t: calibrate("--method", "crc", prompts=5, promise="agreement>=0.98"),
        "in expectation (crc)",
        "That takes 49, so at least 61 prompts in all",
    ),
    "too little data": (
        lambda t: calibrate(promise="agreement>=0.98", prompts=500),
        "gives 60 prompts: 48 beside",
        "That takes 150",
    ),
    "no threshold keeps it": (
        lambda t: calibrate(promise="agreement>=0.92"),
        "no threshold keeps agreement>=0.92 on these 40 prompts",
        "Nothing was saved",
    ),
    "settings": (lambda t: calibrate("--path-share", 1.0), "--path-share 1.0", "between 0 and 1"),
    "too long": (lambda t: calibrate("--max-new-tokens", 999), "999 new tokens", "context of 128"),
    "no such data": (lambda t: calibrate("--data", "./nowhere.jsonl"), "./nowhere.jsonl", "Give a"),
    "documents too short": (
        lambda t: calibrate("--prompt-tokens", 120, "--data", short(t)),
        "at least 128 tokens",
        "--prompt-tokens",
    ),
    "risk without references": (
        lambda t: calibrate(promise="risk<=0.5"),
        "no question with answers",
        '"question" and "answers"',
    ),
    "shipped exits without a folder": (
        lambda t: ["calibrate", "transformer-ee", "--data", corpus(), "--promise", "agreement>=0.5"],
        "'transformer-ee' ship with DYNAMAX",
        "--out DIR",
    ),
    "no exits": (
        lambda t: ["calibrate", model_folder(), "--data", corpus(), "--promise", "agreement>=0.5"],
        "no exits for",
        "--exits DIR",
    ),
    "exits of another backbone": (
        lambda t: calibrate(exits=exits_folder("mamba2")),
        "another backbone",
        "train exits for this one",
    ),
}

USED = {
    "unknown promise": (
        lambda t: generate(promised_folder(t), "--promise", "agreement>=0.98"),
        "'agreement>=0.98' is not recorded",
        "(there: agreement>=0.9)",
    ),
    "no promise at all": (
        lambda t: generate(exits_folder(), *PROMISED),
        "(there: none)",
        "dynamax calibrate MODEL --exits DIR",
    ),
    "another policy": (
        lambda t: generate(promised_folder(t), *PROMISED, "--policy", "defer"),
        "under policy 'propagate', estimator 'mamba'; it guarantees nothing under policy 'defer'",
        "dynamax calibrate",
    ),
    "another estimator": (
        lambda t: generate(promised_folder(t), *PROMISED, "--measure", "entropy"),
        "it guarantees nothing under estimator 'entropy'",
        "dynamax calibrate",
    ),
    "another window": (
        lambda t: generate(promised_folder(t), *PROMISED, "--window", "4"),
        "window of 16",
        "Leave it out",
    ),
    "a threshold": (
        lambda t: generate(promised_folder(t), *PROMISED, "--threshold", "0.9"),
        "beside the promise",
        "Give only one",
    ),
    "a schedule": (
        lambda t: generate(promised_folder(t), *PROMISED, "--threshold-schedule", "decaying"),
        "schedule 'decaying' beside the promise",
        "Give only one",
    ),
    "two that fit": (
        lambda t: generate(promised_folder(t, {}, {"policy": "defer"}), *PROMISED),
        "recorded several times",
        "name the policy",
    ),
    "another backbone": (
        lambda t: generate(promised_folder(t), *PROMISED, model=model_folder("llama", 1)),
        "another backbone",
        "the weights are not",
    ),
    "a record of another backbone": (
        lambda t: generate(promised_folder(t, {"fingerprint": "f" * 64}), *PROMISED),
        "was calibrated on another backbone",
        "dynamax calibrate",
    ),
    "places instead of exits": (
        lambda t: generate(None, *PROMISED, "--exit-layers", "2,3", "--measure", "entropy"),
        "is not recorded",
        "dynamax calibrate",
    ),
}

DAMAGE = {
    "no list": ({}, None, "'promises' cannot be {}: input should be a valid list"),
    "no object": ("promise", None, "promise 1 cannot be used: it is not a JSON object"),
    "missing": ({"n": None}, "drop", "'n' is missing"),
    "unknown": ({"colour": 1}, None, "'colour' is unknown"),
    "bound": ({"bound": 1.5}, None, "'bound' cannot be 1.5"),
    "thresholds": ({"thresholds": [0.5, "high"]}, None, "'thresholds.1' cannot be 'high'"),
    "one threshold": ({"thresholds": [0.5]}, None, "'thresholds' is not one per exit"),
    "contradiction": ({"bound": 0.5}, None, "contradict each other"),
    "no text": ({"text": "agreement"}, None, "'text' cannot be 'agreement'"),
}


def short(folder: Path) -> Path:
    path = folder.with_suffix(".jsonl")
    path.write_text('{"text": "too short"}\n')
    return path


def refused(command: list, capsys) -> str:
    assert cli.run([str(argument) for argument in command]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("name", ASKED)
def test_calibration_refuses(name, tmp_path, capsys):
    command, *expected = ASKED[name]
    arguments = command(tmp_path / "exits")
    before = (exits_folder() / "exits.json").read_bytes()
    capsys.readouterr()
    message = refused(arguments, capsys)
    assert all(part in message for part in expected), message
    assert (exits_folder() / "exits.json").read_bytes() == before, "nothing is saved"


@pytest.mark.parametrize("name", USED)
def test_generation_refuses(name, tmp_path, capsys):
    command, *expected = USED[name]
    arguments = command(tmp_path / "exits")
    model_folder("llama", 1)
    capsys.readouterr()
    message = refused(arguments, capsys)
    assert all(part in message for part in expected), message


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_records_are_refused(name, tmp_path, capsys):
    changes, drop, expected = DAMAGE[name]
    folder = promised_folder(tmp_path / "exits")
    manifest = json.loads((folder / "exits.json").read_text())
    if name == "no list":
        manifest["promises"] = changes
    elif isinstance(changes, str):
        manifest["promises"] = [changes]
    else:
        manifest["promises"][0].update(changes)
        for field in changes if drop else ():
            del manifest["promises"][0][field]
    (folder / "exits.json").write_text(json.dumps(manifest))
    message = refused(generate(folder, *PROMISED), capsys)
    assert "is damaged" in message and expected in message


def test_older_exits_have_no_promises(tmp_path):
    folder = copy(exits_folder(), tmp_path / "exits")
    manifest = json.loads((folder / "exits.json").read_text())
    del manifest["promises"]
    (folder / "exits.json").write_text(json.dumps(manifest))
    assert Exits.from_pretrained(folder).promises == ()
