"""Generation needs torch, transformers, safetensors, numpy and the command line's packages, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.folders import corpus, exits_folder, model_folder

#: What the extras and the development tools bring.
ABSENT = (
    "accelerate",
    "beartype",
    "bitsandbytes",
    "datasets",
    "evaluate",
    "hypothesis",
    "jaxtyping",
    "lm_eval",
    "matplotlib",
    "nltk",
    "pandas",
    "peft",
    "pyarrow",
    "rouge_score",
    "sacrebleu",
    "schedulefree",
    "scipy",
    "sklearn",
)
#: None in sys.modules: neither found nor imported. One process does everything, since starting one takes seconds.
SCRIPT = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
folder, exits_folder, corpus = sys.argv[1:]

import torch
import dynamax_llm as dx
from dynamax_llm.cli import run
from dynamax_llm.errors import DataError
from dynamax_llm.text.sources import documents

model, tokenizer = dx.load(folder)
exits = dx.Exits.from_pretrained(exits_folder)
prompt = tokenizer("the cat sat", return_tensors="pt")
want = dict(max_new_tokens=5, do_sample=False)
stock = model.generate(**prompt, **want)
for policy in ("propagate", "defer", "verify"):
    early = dx.EarlyExit(exits, threshold=0.4, policy=policy)
    out = model.generate(**prompt, **want, custom_generate=early).sequences
    assert out.shape[1] > prompt["input_ids"].shape[1]
    assert policy != "verify" or torch.equal(out, stock)
print("PYTHON generated")
assert len(list(documents(corpus))) == 60
print("TEXT read")
try:
    list(documents("owner/name"))
except DataError as error:
    print("HUB", error)
code = run(["generate", folder, "--exits", exits_folder, "--prompt", "the cat", "--max-new-tokens", "4"])
print("COMMAND", code)
print("HELP", run(["--help"]))
"""


@pytest.fixture(scope="module")
def output() -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, (model_folder(), exits_folder(), corpus()))],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_python_generates_with_the_minimum(output: str) -> None:
    assert "PYTHON generated" in output


def test_local_text_is_read_with_the_minimum_and_a_hub_dataset_names_what_it_needs(output: str) -> None:
    assert "TEXT read" in output
    assert "HUB no file or folder 'owner/name'" in output and "pip install 'dynamax-llm[text]'" in output


def test_the_command_line_generates_with_the_minimum(output: str) -> None:
    assert "the cat" in output and "COMMAND 0" in output
    assert "HELP 0" in output and all(verb in output for verb in ("generate", "train", "calibrate"))


def test_the_absent_packages_are_no_dependencies() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    base = {item.split(">")[0].replace("-", "_") for item in project["dependencies"]}
    assert not base & set(ABSENT) and {"torch", "transformers", "safetensors", "numpy"} <= base
