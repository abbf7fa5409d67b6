"""Faults that users reported, one test of each kind: pairs, limits, notes, interruption, stored configs, odd text."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

import dynamax_llm as dx
from dynamax_llm import cli
from dynamax_llm.backbones.loading import load
from dynamax_llm.cli import backbone as cli_backbone
from dynamax_llm.errors import UsageError
from tests.evaluation.conftest import ROWS
from tests.folders import copy, corpus, exits_folder, model_folder

INTERRUPTED = "interrupted\n"
RESUMES = "interrupted; the same command goes on where it stopped\n"


def run(capsys, *words) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def generate(capsys, *words, model=None) -> tuple[dict, str]:
    command = ("generate", model or model_folder(), "--json", "--prompt", "The cat", "--max-new-tokens", 8, *words)
    code, out, err = run(capsys, *command)
    assert code == 0, err
    return json.loads(out), err


def depths(document: dict) -> list[int]:
    return [token["depth"] for token in document["results"][0]["tokens"][1:]]


def model_with(tmp_path, **generation) -> object:
    folder = copy(model_folder(), tmp_path / "model")
    stored = folder / "generation_config.json"
    config = json.loads(stored.read_text()) if stored.exists() else {}
    stored.write_text(json.dumps(config | generation))
    return folder


@pytest.mark.parametrize(("layers", "thresholds"), [("1,3", "never,0"), ("3,1", "0,never"), ("3/5,1/5", "0,never")])
def test_layers_and_thresholds_are_sorted_as_pairs(layers, thresholds, capsys):
    options = ("--measure", "entropy", "--exit-layers", layers, "--threshold", thresholds)
    assert set(depths(generate(capsys, *options)[0])) == {3}


def test_generation_stops_at_the_context_and_says_so(capsys):
    found, err = generate(capsys, "--exits", exits_folder(), "--threshold", 0, "--max-new-tokens", 100_000)
    assert "note: the context holds 128 tokens: generation stops after " in err
    ids = load(model_folder())[1]("The cat").input_ids
    assert found["tokens"] <= 128 - len(ids)


def test_a_window_without_a_policy_that_waits_gets_a_note(capsys):
    exits = ("--exits", exits_folder(), "--threshold", 0)
    assert "note: --window has no effect under --policy propagate" in generate(capsys, *exits, "--window", 4)[1]
    assert generate(capsys, *exits, "--window", 4, "--policy", "defer")[1] == ""
    assert generate(capsys, *exits)[1] == ""


def test_an_exit_that_cannot_fire_gets_a_note(capsys, tmp_path):
    folder = copy(exits_folder(), tmp_path / "exits")
    manifest = json.loads((folder / "exits.json").read_text())
    manifest["drift_penalty"] = {"propagate": [0.2, 0.2]}
    (folder / "exits.json").write_text(json.dumps(manifest))
    found, err = generate(capsys, "--exits", folder, "--threshold", 0.9)
    assert found["mean_depth"] == 1.0
    assert err == "note: no exit can fire at this threshold: every token runs all layers.\n"
    assert generate(capsys, "--exits", folder, "--threshold", "never")[1] == ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--exit-layers", "2,3"), "layers need --measure NAME"),
        (("--exits", "2,3"), "For layers give --exit-layers 2,3 with --measure NAME"),
        (("--exits", "x", "--exit-layers", "2", "--measure", "entropy"), "give either --exits DIR or --exit-layers"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_layers_and_folders_are_told_apart(verb, options, says, capsys, tmp_path):
    own = ("--prompt", "a") if verb == "generate" else ("--out", tmp_path / "o", "--no-baselines")
    code, out, err = run(capsys, verb, model_folder(), *own, *options)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1


@pytest.mark.parametrize("verb", ["train", "calibrate", "tune", "scan"])
def test_an_empty_file_is_called_empty_and_leaves_nothing(verb, capsys, tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    own = {"calibrate": ("--promise", "agreement>=0.5", "--exits", exits_folder())}.get(verb, ())
    out = tmp_path / "new" / "out"
    code, _, err = run(capsys, verb, model_folder(), "--data", tmp_path / "a.jsonl", "--out", out, *own)
    assert code == 2 and "a.jsonl': the file is empty" in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("verb", ["train", "calibrate"])
def test_a_refusal_after_the_folder_was_made_removes_it(verb, capsys, tmp_path, monkeypatch):
    def refused(*arguments):
        raise UsageError("`data` cannot be used")

    monkeypatch.setattr(f"dynamax_llm.cli.{verb}.load_backbone", refused)
    own = ("--promise", "agreement>=0.5", "--exits", exits_folder()) if verb == "calibrate" else ()
    command = (verb, model_folder(), "--data", corpus(), *own)
    code, _, err = run(capsys, *command, "--out", tmp_path / "new" / "out")
    assert (code, err) == (2, "error: --data cannot be used\n")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    assert run(capsys, *command, "--out", tmp_path / "old")[0] == 2
    assert (tmp_path / "old").is_dir()


def test_folders_that_hold_something_stay(tmp_path):
    def work(folder):
        with cli_backbone.no_empty_folder(folder):
            folder.mkdir(parents=True)
            (folder.parent / "kept").touch()
            raise UsageError("no")

    with pytest.raises(UsageError, match="no"):
        work(tmp_path / "a" / "b")
    assert [item.name for item in (tmp_path / "a").iterdir()] == ["kept"]


EVAL = ("--tasks", "triviaqa", "--limit", "1", "--timed", "0", "--data-dir", ROWS)
WORK = {
    "generate": ("dynamax_llm.cli.generate.load_backbone", ("--measure", "entropy", "--prompt", "a"), INTERRUPTED),
    "scan": ("dynamax_llm.evaluation.scan.scan.scan", ("--data", corpus()), INTERRUPTED),
    "bench": ("dynamax_llm.evaluation.bench.bench", (), INTERRUPTED),
    "eval": ("dynamax_llm.evaluation.harness.evaluate.evaluate", (*EVAL, "--exits", exits_folder()), RESUMES),
    "train": ("dynamax_llm.training.trainer.train", ("--data", corpus()), RESUMES),
    "tune": ("dynamax_llm.cli.tune.load_backbone", ("--data", corpus()), RESUMES),
}


@pytest.mark.parametrize("verb", WORK)
def test_ctrl_c_is_one_line_and_130(verb, capsys, monkeypatch, tmp_path):
    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    place, words, says = WORK[verb]
    monkeypatch.setattr(place, interrupted)
    out = () if verb == "generate" else ("--out", tmp_path / "out")
    assert run(capsys, verb, model_folder(), *words, *out) == (130, "", says)


def test_ctrl_c_while_text_is_printed(capsys, monkeypatch):
    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(dx.EarlyExit, "__call__", interrupted)
    command = ("generate", model_folder(), "--measure", "entropy", "--prompt", "a")
    assert run(capsys, *command) == (130, "", INTERRUPTED)


def test_a_broken_pipe_is_quiet():
    words = ["generate", str(model_folder()), "--measure", "entropy", "--prompt", "The cat"]
    code = f"import sys; from dynamax_llm.cli import main; sys.argv[1:] = {words!r}; main()"
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([sys.executable, "-c", code], check=False, stdout=writing, stderr=subprocess.PIPE)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_terminal_without_unicode_gets_escapes(as_json, monkeypatch):
    words = ["generate", str(model_folder()), "--measure", "entropy", "--prompt", "snake 🐍", "--max-new-tokens", "2"]
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="latin-1"))
    monkeypatch.setattr(sys, "argv", ["dynamax", *words, *["--json"] * as_json])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    text = printed.getvalue().decode("latin-1")
    assert json.loads(text)["results"][0]["prompt"] == "snake 🐍" if as_json else "snake \\U0001f40d" in text


@pytest.mark.parametrize(
    "stored",
    [{"num_beams": 4}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}],
)
def test_a_stored_generation_config_does_not_stand_in_the_way(stored, capsys, tmp_path):
    options = ("--measure", "entropy", "--threshold", "never")
    plain = generate(capsys, *options)[0]
    found = generate(capsys, *options, model=model_with(tmp_path, **stored))[0]
    assert found["results"] == plain["results"]


def test_stored_stop_strings_stop(capsys, tmp_path):
    options = ("--measure", "entropy", "--threshold", "never")
    text = generate(capsys, *options)[0]["results"][0]["text"]
    stop = next(letter for letter in text[:-1] if letter.isascii() and letter.isprintable())
    found = generate(capsys, *options, model=model_with(tmp_path, stop_strings=[stop]))[0]["results"][0]["text"]
    assert found == text[: text.index(stop) + 1]


def test_two_prompts_without_a_pad_token(capsys, monkeypatch):
    command = ("generate", model_folder(), "--exits", exits_folder(), "--json", "--max-new-tokens", 4)
    prompts = ("--prompt", "The cat", "--prompt", "A much longer prompt")
    padded = json.loads(run(capsys, *command, *prompts)[1])["results"]

    def without(*arguments):
        model, tokenizer = cli_backbone.load_backbone(*arguments)
        tokenizer.pad_token = None
        return model, tokenizer

    monkeypatch.setattr("dynamax_llm.cli.generate.load_backbone", without)
    code, out, err = run(capsys, *command, *prompts)
    assert code == 0, err
    assert json.loads(out)["results"] == padded


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--prompt", "\udcff\udcfe"), "is not valid UTF-8 text"),
        (("--prompt", "a", "--sample", "--seed", "99999999999999999999999"), "--seed 99999999999999999999999: give"),
        (("--prompt", "a", "--seed", "-1"), "--seed -1: give between 0"),
    ],
)
def test_what_is_neither_text_nor_number_is_refused(words, says, capsys):
    code, out, err = run(capsys, "generate", model_folder(), "--measure", "entropy", *words)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1


def test_printed_text_is_the_text(capsys):
    for prompt in ("a[1:x:2] costs :100: at 12:up:30", "col1\tcol2\tcol3", "[bold]x[/bold]"):
        command = ("generate", model_folder(), "--measure", "entropy", "--prompt", prompt, "--max-new-tokens", 1)
        code, out, _ = run(capsys, *command)
        assert code == 0 and out.startswith(prompt)


def test_a_prompt_file_may_begin_with_a_mark(capsys, tmp_path):
    (tmp_path / "p.txt").write_text("The cat\n", encoding="utf-8-sig")
    command = ("generate", model_folder(), "--measure", "entropy", "--json", "--max-new-tokens", 2)
    document = json.loads(run(capsys, *command, "--prompt-file", tmp_path / "p.txt")[1])
    assert document["results"][0]["prompt"] == "The cat"


def test_a_misspelt_verb_has_one_question_mark(capsys):
    code, _, err = run(capsys, "genrate")
    assert (code, err) == (2, "error: No such command 'genrate'. Did you mean 'generate'? See: dynamax --help\n")


def test_bench_takes_the_heads_its_help_names(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    option = next(item.option for item in cli.VERBS["bench"].derived if item.flag == "--head")
    refused = run(capsys, "bench", "--shape", "tiny-mamba", "--head", "lstm")[2]
    assert f"--head 'lstm': give one of {', '.join(option.choices)}." in refused
    for name in option.choices:
        assert dx.evaluation.bench.BenchSettings(checks=1, estimator=name).estimator == name


def test_an_engine_can_be_named_where_text_is_generated(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    exits = ("--exits", exits_folder())
    assert generate(capsys, *exits, "--engine", "eager")[0]["engine"] == "eager"
    refusal = "engine 'cuda' cannot run this"
    code, _, err = run(
        capsys, "generate", model_folder(), *exits, "--prompt", "a", "--engine", "cuda", "--device", "cpu"
    )
    assert code == 2 and refusal in err
    command = ("eval", model_folder(), *exits, *EVAL, "--out", tmp_path, "--device", "cpu", "--no-baselines")
    code, _, err = run(capsys, *command, "--engine", "cuda")
    assert code == 2 and refusal in err
