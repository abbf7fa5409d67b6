"""The command line does what it says: verbs, options, output for people, for pipes and for programs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from dynamax_llm import cli
from dynamax_llm.backbones import loading
from dynamax_llm.backbones.loading import load
from dynamax_llm.cli.options import count
from dynamax_llm.errors import UsageError
from dynamax_llm.exits.artifact import Exits
from tests.folders import copy, corpus, exits_folder, model_folder

FAMILIES = ("llama", "mamba2")


@pytest.fixture
def dynamax(capsys):
    """Run a command that must succeed; returns what it printed."""

    def run(*arguments: object) -> str:
        code = cli.run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return run


def test_help_names_every_verb_and_its_options(dynamax, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for verb in ("demo", "train", "generate"):
        assert verb in dynamax("--help")
        assert dynamax(verb, "--help")
    for option in ("--threshold", "--policy", "--measure", "--json"):
        assert option in dynamax("generate", "--help")
    for option in ("--head", "--exit-layers", "--readout", "--tokens", "--out"):
        assert option in dynamax("train", "--help")


def test_version(dynamax):
    assert dynamax("--version").startswith("dynamax ")


def generate(dynamax, model_type, *arguments) -> dict:
    return json.loads(dynamax("generate", model_folder(model_type), "--json", "--max-new-tokens", 12, *arguments))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_never_leaving_gives_the_models_own_text(model_type, dynamax):
    model, tokenizer = load(model_folder(model_type))
    inputs = tokenizer("The cat", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    found = generate(
        dynamax, model_type, "--exits", exits_folder(model_type), "--threshold", "never", "--prompt", "The cat"
    )
    assert found["results"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert found["mean_depth"] == 1.0
    assert found["counted_reduction"] == 0.0


@pytest.mark.parametrize("model_type", FAMILIES)
def test_always_leaving_runs_the_first_exit(model_type, dynamax):
    found = generate(
        dynamax, model_type, "--exits", exits_folder(model_type), "--threshold", "0", "--prompt", "The cat"
    )
    assert found["layers"] == 5
    assert found["state_policy"] == "propagate"
    (result,) = found["results"]
    assert result["prompt"] == "The cat"
    assert {token["depth"] for token in result["tokens"][1:]} <= {2}
    assert found["mean_depth"] < 0.6
    assert found["counted_reduction"] > 0


@pytest.mark.parametrize("model_type", FAMILIES)
def test_exact_policies_say_what_they_did(model_type, dynamax):
    options = ("--exits", exits_folder(model_type), "--prompt", "The cat", "--max-new-tokens", "12")
    full = generate(dynamax, model_type, *options, "--threshold", "never")
    found = generate(dynamax, model_type, *options, "--threshold", "0", "--policy", "verify", "--window", "4")
    assert found["results"][0]["text"] == full["results"][0]["text"]
    verification = found["verification"]
    assert verification["drafted"] == sum(verification[name] for name in ("accepted", "corrected", "rolled_back")) > 0
    assert found["window_bytes"] > 0
    deferred = generate(dynamax, model_type, *options, "--threshold", "0", "--policy", "defer", "--window", "4")
    assert deferred["verification"] is None
    # Eleven steps at depth 2 of 5; every fourth fills the window, and the other 3 layers catch up.
    assert deferred["pass_reduction"] == pytest.approx(1 - (11 * 2 + 2 * 3) / (11 * 5))


def test_thresholds_per_exit(dynamax):
    found = generate(
        dynamax, "llama", "--measure", "entropy", "--exit-layers", "1,3", "--threshold", "never,0", "--prompt", "a"
    )
    assert {token["depth"] for token in found["results"][0]["tokens"][1:]} <= {3}


def test_measure_needs_no_artifact_and_exits_may_be_shares(dynamax):
    found = generate(
        dynamax, "mamba2", "--measure", "softmax_max", "--exit-layers", "2/5", "--threshold", "0", "--prompt", "a"
    )
    assert {token["depth"] for token in found["results"][0]["tokens"][1:]} <= {2}


def test_prompts_of_a_file_in_one_batch_equal_each_alone(dynamax, tmp_path):
    (tmp_path / "prompts.txt").write_text("The cat\n\nA much longer prompt é\n", encoding="utf-8")
    options = ("--exits", exits_folder(), "--threshold", "0.5")
    together = generate(dynamax, "llama", *options, "--prompt-file", tmp_path / "prompts.txt")
    assert [result["prompt"] for result in together["results"]] == ["The cat", "A much longer prompt é"]
    for result in together["results"]:
        alone = generate(dynamax, "llama", *options, "--prompt", result["prompt"])
        assert alone["results"][0] == result


def test_sampling_repeats_with_its_seed(dynamax):
    options = ("--exits", exits_folder(), "--prompt", "The cat", "--temperature", "5")
    one, two, three = (generate(dynamax, "llama", *options, "--seed", seed)["results"] for seed in (1, 1, 2))
    assert one == two
    assert one != three


def test_plain_output_marks_depths_and_sums_up(dynamax):
    printed = dynamax("generate", model_folder(), "--exits", exits_folder(), "--threshold", "0", "--prompt", "The cat",
                      "--max-new-tokens", 6)  # fmt: skip
    assert printed.startswith("The cat")
    assert "[5]" in printed
    assert "[2]" in printed
    assert "\x1b" not in printed
    last = printed.rstrip().splitlines()[-1]
    assert last.startswith("6 tokens, mean depth 2.5 of 5 layers (50 %), counted reduction ")
    assert last.endswith("tokens/s")
    assert "speed-up" not in printed


@pytest.mark.parametrize("prompts", [1, 2])
def test_a_terminal_gets_tints_and_a_legend(prompts, dynamax, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    arguments = ("generate", model_folder(), "--exits", exits_folder(), "--threshold", "0", "--max-new-tokens", 4)
    arguments += ("--prompt", "The cat") * prompts
    printed = dynamax(*arguments)
    assert "38;2;" in printed
    assert "layers run:" in printed
    assert "[2]" not in printed
    plain = dynamax(*arguments, "--no-color")
    assert "38;2;" not in plain
    assert "[2]" in plain


def test_a_shipped_backbone_brings_its_exits(dynamax, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "REFERENCE_FOLDER", tmp_path)
    copy(model_folder("mamba2"), tmp_path / "mamba-ee")
    copy(exits_folder("mamba2", "mlp"), tmp_path / "mamba-ee" / "exits" / loading.DEFAULT_HEAD)
    printed = dynamax("generate", "mamba-ee", "--threshold", "0", "--prompt", "a", "--max-new-tokens", 3, "--json")
    assert json.loads(printed)["mean_depth"] == pytest.approx((5 + 2 + 2) / 15)
    assert Exits.from_pretrained("mamba-ee").config.head == "mlp"


TRAIN = ("--tokens", "3k", "--seq-length", 64, "--tokens-per-step", 256, "--heldout", "0.2", "--exit-layers", "2,3")


@pytest.mark.parametrize(
    ("model_type", "head", "readout"),
    [("llama", "mamba", "head"), ("mamba2", "linear", "tail"), ("llama", "mlp", "lens")],
)
def test_train_then_generate(model_type, head, readout, dynamax, tmp_path):
    out, model = tmp_path / "exits", model_folder(model_type)
    options = ("--data", corpus(), "--head", head, "--readout", readout, "--out", out)
    printed = dynamax("train", model, *options, *TRAIN)
    assert f"{head} head on" in printed
    assert f"Saved in {out}" in printed
    exits = Exits.from_pretrained(out)
    assert (exits.config.layers, exits.config.head, exits.config.readout) == ((2, 3), head, readout)
    assert exits.provenance["data"] == str(corpus())
    assert exits.provenance["tokens"] >= 3000
    before = (out / "exits.safetensors").read_bytes()
    dynamax("train", model, *options, *TRAIN)  # finished: the same command changes nothing
    assert (out / "exits.safetensors").read_bytes() == before
    found = generate(dynamax, model_type, "--exits", out, "--threshold", "0.5", "--prompt", "The cat")
    assert 0 < found["mean_depth"] <= 1


def test_inputs_and_label_reach_the_artifact(dynamax, tmp_path):
    options = ("--data", corpus(), "--head", "linear", "--inputs", "statistics", "--label", "topk", "--label-k", 3)
    dynamax("train", model_folder(), *options, "--out", tmp_path, *TRAIN)
    exits = Exits.from_pretrained(tmp_path)
    settings = exits.provenance["settings"]
    assert (exits.config.inputs, settings["label"], settings["label_k"]) == (("statistics",), "topk", 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("300k", 300_000), ("1M", 1_000_000), ("2.5M", 2_500_000), ("1_000", 1000), ("7", 7), ("1b", 10**9)],
)
def test_token_counts(text, expected):
    assert count(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-5", "many", "1MM", "0.0001"])
def test_impossible_token_counts(text):
    with pytest.raises(UsageError, match="give a positive number such as 300k"):
        count(text)


def test_interruption_is_130(capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("dynamax_llm.cli.generate.load_backbone", interrupted)
    assert cli.run(["generate", str(model_folder()), "--measure", "entropy", "--prompt", "a"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_interrupted_training_says_how_to_go_on(capsys, monkeypatch, tmp_path):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("dynamax_llm.training.trainer.train", interrupted)
    command = ["train", str(model_folder()), "--data", str(corpus()), "--out", str(tmp_path), "--exit-layers", "2"]
    assert cli.run(command) == 130
    assert "the same command goes on where it stopped" in capsys.readouterr().err


def test_other_failures_are_one_line_and_not_hidden(capsys, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr("dynamax_llm.cli.generate.load_backbone", broken)
    command = ["generate", str(model_folder()), "--measure", "entropy", "--prompt", "a"]
    assert cli.run(command) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("error: unexpected RuntimeError: a bug. This is a bug in DYNAMAX") and error.count("\n") == 1
    )
    monkeypatch.setenv("DYNAMAX_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(command)


def test_running_out_of_memory_is_a_clear_error(capsys, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("dynamax_llm.cli.generate.load_backbone", full)
    assert cli.run(["generate", str(model_folder()), "--measure", "entropy", "--prompt", "a"]) == 2
    assert "error: out of memory" in capsys.readouterr().err


def test_help_loads_no_model_library():
    code = "import sys, dynamax_llm.cli as c; c.run(['train', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_preset_is_a_beginning_and_options_win(monkeypatch, tmp_path, capsys):
    asked = {}

    def train(backbone, tokenizer, source, config, settings, out):
        asked.update(config=config, settings=settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("dynamax_llm.training.trainer.train", train)
    arguments = ["train", str(model_folder("llama")), "--data", str(corpus()), "--out", str(tmp_path / "out")]
    paper = [*arguments, "--preset", "dynamax-paper"]
    assert cli.run([*paper, "--lr", "1e-3", "--exit-layers", "2,3", "--head", "linear"]) == 130
    config, settings = asked["config"], asked["settings"]
    assert (config.layers, config.head, settings.label, config.readout) == ((2, 3), "linear", "topk", "tail")
    assert (settings.lr, settings.documents, settings.optimiser) == (1e-3, 1000, "schedule-free")
    assert settings.deciding()["preset"] == "dynamax-paper"
    assert cli.run([*arguments, "--tokens", "5k"]) == 130
    config, settings = asked["config"], asked["settings"]
    assert (config.head, settings.label, config.inputs) == ("mlp", "action", ("hidden", "statistics", "tokens"))
    assert (settings.lr, settings.documents, settings.optimiser, settings.max_tokens) == (1e-2, None, "adamw", 5000)
    assert cli.run([*arguments, "--preset", "paper"]) == 2
    assert "unknown preset 'paper'" in capsys.readouterr().err
