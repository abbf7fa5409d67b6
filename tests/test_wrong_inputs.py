"""Wrong inputs through the command line: each one clear error on stderr that names value and way out, exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamax_llm import cli
from tests.folders import copy, corpus, exits_folder, model_folder

#: From a scratch folder to a command line.
Command = Callable[[Path], list[object]]


def generate(*options: object, model: object = None, prompt: str = "The cat") -> list[object]:
    chosen = [] if "--prompt-file" in options else ["--prompt", prompt]
    return ["generate", model or model_folder(), *options, *chosen]


def with_exits(*options: object) -> list[object]:
    return generate("--exits", exits_folder(), *options)


def train(*options: object, data: object = None, out: object = None, model: object = None) -> list[object]:
    """A run that would take a second; later options override earlier ones."""
    short = ["--tokens", "2k", "--seq-length", 64, "--tokens-per-step", 256, "--exit-layers", "2,3", "--head", "linear"]
    return ["train", model or model_folder(), "--data", data or corpus(), "--out", out, *short, *options]


def damaged(tmp_path: Path, change: Callable[[Path], object]) -> list[object]:
    folder = copy(exits_folder(), tmp_path / "exits")
    change(folder)
    return generate("--exits", folder)


def edit_manifest(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        manifest = json.loads((folder / "exits.json").read_text())
        (folder / "exits.json").write_text(json.dumps(manifest | changes))

    return change


def edit_tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "exits.safetensors")
        tensors["heads.bank.conv"] = change(tensors["heads.bank.conv"])
        save_file(tensors, folder / "exits.safetensors")

    return apply


def truncate(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def model_with(tmp_path: Path, **changes: object) -> Path:
    folder = copy(model_folder(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def truncated_model(tmp_path: Path) -> Path:
    folder = copy(model_folder(), tmp_path / "model")
    truncate("model.safetensors")(folder)
    return folder


def file(tmp_path: Path, name: str, content: bytes | str) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def records(*rows: object) -> str:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


MODELS: dict[str, tuple[Command, str, str]] = {
    "no such model folder": (lambda t: generate(model="./nowhere/x"), "'./nowhere/x'", "Give an existing model folder"),
    "unreachable hub id": (lambda t: generate(model="who/what"), "'who/what'", "Check the name and the connection"),
    "training on an unknown model type": (
        lambda t: train(model=model_with(t, model_type="rwkv"), out=t / "o"),
        "'rwkv'",
        "Use a model of one of these families",
    ),
    "misspelt shipped backbone": (
        lambda t: generate(model="transfomer-ee"),
        "'transfomer-ee'",
        "Did you mean the shipped",
    ),
    "folder that is no model": (lambda t: generate(model=t), "no config.json", "Give the folder that save_pretrained"),
    "unknown model type": (
        lambda t: generate(model=model_with(t, model_type="gpt9")),
        "'gpt9'",
        "llama, mamba, mamba2, mistral",
    ),
    "encoder": (lambda t: generate(model=model_with(t, model_type="bert")), "'bert'", "Supported: "),
    "classifier": (
        lambda t: generate(model=model_with(t, architectures=["LlamaForTokenClassification"])),
        "LlamaForTokenClassification",
        "…ForCausalLM",
    ),
    "model config is no JSON": (
        lambda t: generate(model=file(copy(model_folder(), t / "m"), "config.json", "{").parent),
        "config.json is not valid JSON",
        "Save the model again",
    ),
    "truncated weights": (
        lambda t: (
            truncate("model.safetensors")(copy(model_folder(), t / "m")),
            generate("--measure", "entropy", model=t / "m"),
        )[1],
        "the weights cannot be loaded",
        "Fetch or save the model again",
    ),
    "dtype typo": (lambda t: with_exits("--dtype", "flaot32"), "'flaot32'", "Did you mean 'float32'"),
    "no such device": (lambda t: with_exits("--device", "gpu"), "'gpu'", "Use cpu, cuda"),
}

ARTIFACTS: dict[str, tuple[Command, str, str]] = {
    "no exits at all": (lambda t: generate(), "no trained exits", "--exits DIR"),
    "no such exits folder": (lambda t: generate("--exits", "./none"), "'./none'", "Give the folder that dynamax train"),
    "folder without exits": (lambda t: generate("--exits", t), "exits.json and exits.safetensors", "Give the folder"),
    "newer version": (lambda t: damaged(t, edit_manifest(version=99)), "version 99", "Upgrade: "),
    "manifest truncated": (lambda t: damaged(t, truncate("exits.json")), "exits.json is damaged", "train them anew"),
    "tensors truncated": (
        lambda t: damaged(t, truncate("exits.safetensors")),
        "exits.safetensors is damaged",
        "Copy the",
    ),
    "NaN in a tensor": (
        lambda t: damaged(t, edit_tensor(lambda x: x * float("nan"))),
        "'heads.bank.conv' holds NaN",
        "train them anew",
    ),
    "tensor of another shape": (
        lambda t: damaged(t, edit_tensor(lambda x: x[:, :1].clone())),
        "'heads.bank.conv' has shape",
        "Copy the exits again",
    ),
    "exits of another family": (
        lambda t: generate("--exits", exits_folder("mamba2")),
        "the model type is llama, not mamba2",
        "train exits for this one",
    ),
    "exits of another checkpoint": (
        lambda t: generate("--exits", exits_folder(), model=model_folder("llama", seed=1)),
        "the weights are not",
        "Load the backbone they were trained on",
    ),
    "measures alone have no head": (
        lambda t: generate("--exits", exits_folder("llama", None)),
        "have no trained head",
        "Name a confidence measure",
    ),
}

DECISIONS: dict[str, tuple[Command, str, str]] = {
    "threshold above 1": (lambda t: with_exits("--threshold", "1.7"), "1.7", "between 0 and 1"),
    "threshold below 0": (lambda t: with_exits("--threshold=-0.1"), "-0.1", "between 0 and 1"),
    "threshold is no number": (lambda t: with_exits("--threshold", "high"), "'high'", "or is 'never'"),
    "threshold is NaN": (lambda t: with_exits("--threshold", "nan"), "'nan'", "between 0 and 1"),
    "too many thresholds": (
        lambda t: with_exits("--threshold", "0.9,0.9,0.9"),
        "3 thresholds for 2",
        "give one for all",
    ),
    "unknown measure": (lambda t: with_exits("--measure", "entrpy"), "'entrpy'", "Did you mean 'entropy'"),
    "window of nothing": (
        lambda t: with_exits("--policy", "defer", "--window", "0"),
        "--window 0",
        "give at least 1",
    ),
    "unknown policy": (lambda t: with_exits("--policy", "propogate"), "'propogate'", "Did you mean 'propagate'"),
    "stale on a Transformer": (
        lambda t: with_exits("--policy", "stale"),
        "'stale'",
        "Use 'propagate', 'copy', 'defer' or 'verify'",
    ),
    "copy on Mamba": (
        lambda t: generate("--exits", exits_folder("mamba2"), "--policy", "copy", model=model_folder("mamba2")),
        "'copy'",
        "Use 'propagate', 'stale', 'defer' or 'verify'",
    ),
    "unknown schedule": (lambda t: with_exits("--threshold-schedule", "linear"), "'linear'", "fixed, decaying"),
    "exit 0 for a measure": (
        lambda t: generate("--measure", "entropy", "--exit-layers", "0"),
        "'0'",
        "after layers 1 to 4",
    ),
    "exit at the last layer": (
        lambda t: generate("--measure", "entropy", "--exit-layers", "5"),
        "'5'",
        "after layers 1 to 4",
    ),
    "exit past the depth": (lambda t: generate("--measure", "entropy", "--exit-layers", "9/8"), "'9/8'", "1 to 4"),
    "no such fraction": (
        lambda t: generate("--measure", "entropy", "--exit-layers", "1/0"),
        "'1/0'",
        "shares of the depth",
    ),
    "two exits on one layer": (lambda t: generate("--measure", "entropy", "--exit-layers", "2,2/5"), "'2/5'", "once"),
}

PROMPTS: dict[str, tuple[Command, str, str]] = {
    "no prompt": (
        lambda t: ["generate", model_folder(), "--exits", exits_folder()],
        "give the text",
        "--prompt-file FILE",
    ),
    "two kinds of prompt": (
        lambda t: [*with_exits("--prompt-file", file(t, "p", "a")), "--prompt", "b"],
        "either --prompt TEXT",
        "or --prompt-file FILE",
    ),
    "empty prompt": (lambda t: [*generate("--exits", exits_folder(), prompt="  ")], "'  ' is empty", "give some text"),
    "missing prompt file": (lambda t: with_exits("--prompt-file", t / "no.txt"), "no.txt", "Give a text file"),
    "prompt file is a folder": (lambda t: with_exits("--prompt-file", t), "Is a directory", "Give a text file"),
    "prompt file not UTF-8": (
        lambda t: with_exits("--prompt-file", file(t, "p.txt", "Müller".encode("latin-1"))),
        "p.txt is not UTF-8",
        "Save it as UTF-8",
    ),
    "prompt file without prompts": (
        lambda t: with_exits("--prompt-file", file(t, "p.txt", "\n\n")),
        "p.txt",
        "Write one",
    ),
    "prompt longer than the context": (
        lambda t: generate("--exits", exits_folder(), prompt="x" * 200),
        "200 tokens",
        "at most 127",
    ),
    "temperature 0": (lambda t: with_exits("--temperature", 0), "--temperature 0.0", "give above 0"),
    "top-p above 1": (lambda t: with_exits("--top-p", "1.5"), "--top-p 1.5", "at most 1"),
    "no new tokens": (lambda t: with_exits("--max-new-tokens", 0), "--max-new-tokens 0", "give at least 1"),
}

TRAINING: dict[str, tuple[Command, str, str]] = {
    "missing data": (lambda t: train(data=t / "no.jsonl", out=t / "o"), "no.jsonl", "Give a .jsonl"),
    "unreachable dataset": (lambda t: train(data="who/what", out=t / "o"), "'who/what'", "Check the name"),
    "folder without text": (lambda t: train(data=t, out=t / "o"), "no usable file", ".jsonl, .jsonl.xz, .txt"),
    "file of another kind": (lambda t: train(data=file(t, "a.pdf", "x"), out=t / "o"), "a.pdf", "Allowed: "),
    "empty data": (lambda t: train(data=file(t, "a.jsonl", ""), out=t / "o"), "a.jsonl", "the file is empty"),
    "data not UTF-8": (lambda t: train(data=file(t, "a.txt", b"caf\xe9 \xff"), out=t / "o"), "offset 3", "iconv"),
    "bad JSON line": (
        lambda t: train(data=file(t, "a.jsonl", records({"text": "fine"}, '{"text": ')), out=t / "o"),
        "line 2",
        "one JSON object per line",
    ),
    "no field with text": (
        lambda t: train(data=file(t, "a.jsonl", records({"id": 1, "label": 2})), out=t / "o"),
        "id, label",
        "Name one: --text-field",
    ),
    "named field is not there": (lambda t: train("--text-field", "body", out=t / "o"), "'body'", "It has text"),
    "damaged .xz": (lambda t: train(data=file(t, "a.jsonl.xz", b"no xz"), out=t / "o"), "a.jsonl.xz", "Copy it again"),
    "unknown head": (lambda t: train("--head", "mambo", out=t / "o"), "'mambo'", "Did you mean 'mamba'"),
    "unknown readout": (lambda t: train("--readout", "tial", out=t / "o"), "--readout 'tial'", "head, tail, lens"),
    "unknown label": (lambda t: train("--label", "top", out=t / "o"), "'top'", "action, topk"),
    "unknown input": (lambda t: train("--inputs", "hidden,logits", out=t / "o"), "logits", "hidden, statistics"),
    "exit 0": (lambda t: train("--exit-layers", "0,2", out=t / "o"), "'0'", "after layers 1 to 4"),
    "exit beyond the depth": (lambda t: train("--exit-layers", "2,9", out=t / "o"), "'9'", "after layers 1 to 4"),
    "exit that is no number": (
        lambda t: train("--exit-layers", "half", out=t / "o"),
        "'half'",
        "shares of the depth (1/2,0.75)",
    ),
    "tail too long": (
        lambda t: train("--readout", "tail", "--tail-layers", 3, out=t / "o"),
        "tail of 3",
        "1 to 2 layers",
    ),
    "batch 0": (lambda t: train("--tokens-per-step", 0, out=t / "o"), "--tokens-per-step 0", "give at least 1"),
    "batch below one chunk": (
        lambda t: train("--tokens-per-step", 32, out=t / "o"),
        "--tokens-per-step 32",
        "one chunk of 64",
    ),
    "negative tokens": (lambda t: train("--tokens=-5k", out=t / "o"), "'-5k'", "300k, 1M"),
    "seq-length 1": (lambda t: train("--seq-length", 1, out=t / "o"), "--seq-length 1", "at least 2"),
    "learning rate 0": (lambda t: train("--lr", 0, out=t / "o"), "--lr 0.0", "above 0"),
    "everything held out": (lambda t: train("--heldout", 1, out=t / "o"), "--heldout 1.0", "between 0 and 1"),
    "patience 0": (lambda t: train("--patience", 0, out=t / "o"), "--patience 0", "at least 1"),
    "output below a file": (lambda t: train(out=file(t, "f", "x") / "o"), "Not a directory", "Give a folder"),
    "output is a file": (lambda t: train(out=file(t, "f", "x")), "cannot write to", "Give a folder"),
    "output holds something else": (
        lambda t: train(out=file(t, "thesis.tex", "x").parent),
        "thesis.tex",
        "Give a new folder",
    ),
    "output is a model's folder": (
        lambda t: train(out=copy(model_folder(), t / "m")),
        "holds something else (config.json",
        "Give a new folder",
    ),
}

SYNTAX: dict[str, tuple[Command, str, str]] = {
    "unknown verb": (lambda t: ["generat"], "'generat'", "--help"),
    "unknown option": (lambda t: with_exits("--treshold", "0.9"), "--treshold", "See: dynamax generate --help"),
    "missing option": (lambda t: ["train", model_folder(), "--out", t], "--data", "See: dynamax train --help"),
    "missing argument": (lambda t: ["generate"], "MODEL", "See: dynamax generate --help"),
    "a word where a number belongs": (lambda t: with_exits("--max-new-tokens", "many"), "got 'many'", "valid integer"),
}

CASES = {
    f"{group}: {name}": case
    for group, cases in (
        ("model", MODELS),
        ("artifact", ARTIFACTS),
        ("decision", DECISIONS),
        ("prompt", PROMPTS),
        ("training", TRAINING),
        ("syntax", SYNTAX),
    )
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_error(name, capsys, tmp_path):
    command, value, way_out = CASES[name]
    words = [str(word) for word in command(tmp_path)]
    capsys.readouterr()  # the first to ask for a shared folder writes it, with a progress bar on stderr
    code = cli.run(words)
    printed = capsys.readouterr()
    assert code == 2, printed
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    line = printed.err.strip()
    assert line.startswith("error: ")
    assert value in line
    assert way_out in line
    assert "Traceback" not in line


def test_the_list_is_long_enough():
    assert len(CASES) >= 25


@pytest.mark.parametrize("name", ["decision: threshold above 1"])
def test_the_installed_command_refuses_the_same_way(name, tmp_path):
    command, value, _ = CASES[name]
    words = [str(word) for word in command(tmp_path)]
    code = "from dynamax_llm.cli import main; main()"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert value in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_refused_run_leaves_no_output_folder(capsys, tmp_path):
    for options in (["--exit-layers", "9"], ["--head", "mambo"]):
        assert cli.run([str(word) for word in train(*options, out=tmp_path / "o")]) == 2
    assert cli.run([str(word) for word in train(model="./nowhere", out=tmp_path / "o")]) == 2
    assert not (tmp_path / "o").exists()
    assert capsys.readouterr().err.count("error: ") == 3
