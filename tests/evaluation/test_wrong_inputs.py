"""``dynamax eval``: what it prints and writes, and wrong inputs, each one clear line on stderr and exit code 2."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from dynamax_llm import cli
from dynamax_llm.evaluation.harness import tasks
from dynamax_llm.evaluation.harness.results import Evaluation
from tests.evaluation.conftest import ROWS
from tests.folders import exits_folder, model_folder

#: A run of a moment.
SMALL = ("--tasks", "triviaqa", "--limit", "1", "--timed", "0", "--max-new-tokens", "4", "--data-dir", str(ROWS))


def command(out: Path, *options: object, exits: bool = True) -> list[str]:
    """Later options override earlier ones."""
    chosen = ["--exits", str(exits_folder())] if exits else []
    return ["eval", str(model_folder()), *chosen, "--out", str(out), *SMALL, *map(str, options)]


def test_tables_and_document(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = command(tmp_path, "--threshold", "0,never", "--timed", 1)
    capsys.readouterr()  # of the folders that were made
    assert cli.run(arguments) == 0
    printed = capsys.readouterr()
    rows = ("mamba head@0", "mamba head@never", "softmax_margin@0", "static@2", "pruned@3")
    for text in (*rows, "exact_match", "2-shot"):
        assert text in printed.out
    assert "no speed-up" in printed.out
    assert printed.err == ""
    found = Evaluation.read(tmp_path)
    assert len(found.cells) == 9
    assert cli.run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == found.model_dump(mode="json")["cells"]


def test_another_task_and_threshold_are_added(tmp_path, capsys):
    """The folder's document keeps what was evaluated before, and a report shows both."""
    assert cli.run(command(tmp_path, "--threshold", "0")) == 0
    before = Evaluation.read(tmp_path)
    assert cli.run(command(tmp_path, "--threshold", "never", "--tasks", "coqa", "--no-baselines")) == 0
    found = Evaluation.read(tmp_path)
    assert [item.name for item in found.tasks] == ["triviaqa", "coqa"]
    assert found.cells[: len(before.cells)] == before.cells
    assert [(cell.setting, cell.task) for cell in found.cells[len(before.cells) :]] == [
        ("full", "coqa"),
        ("mamba head@never", "coqa"),
    ]
    assert len(found.runs) == 2 and found.runs[0] == before.runs[0]
    capsys.readouterr()
    assert cli.run(command(tmp_path, "--threshold", "0.5", "--limit", "2")) == 2
    assert "another task 'triviaqa': limit 1, now 2" in capsys.readouterr().err
    assert Evaluation.read(tmp_path) == found


def test_places_need_a_measure_and_no_heads(tmp_path, capsys):
    options = ("--exit-layers", "1,3", "--measure", "entropy", "--no-baselines", "--policy", "defer")
    assert cli.run(command(tmp_path, *options, exits=False)) == 0
    settings = Evaluation.read(tmp_path).settings["llama-0"]
    assert [(item.id, item.layers, item.policy) for item in settings[1:]] == [("entropy@0.9", (1, 3), "defer")]
    assert cli.run(command(tmp_path, "--exit-layers", "1,3", "--no-baselines", exits=False)) == 2
    assert "layers need --measure" in capsys.readouterr().err


WRONG = {
    "unknown task": (("--tasks", "trivaqa"), "unknown task 'trivaqa'. Did you mean 'triviaqa'?"),
    "no task": (("--tasks", " , "), "--tasks ' , '"),
    "no documents": (("--limit", 0), "--limit 0"),
    "negative shots": (("--shots", -1), "--shots -1"),
    "no tokens": (("--max-new-tokens", 0), "--max-new-tokens 0"),
    "no rows": (("--batch-size", 0), "--batch-size 0"),
    "threshold beyond 1": (("--threshold", "0.5,1.5"), "threshold '1.5'"),
    "unknown measure": (("--measure", "softmax_margn"), "Did you mean 'softmax_margin'?"),
    "unknown policy": (("--policy", "propagte"), "Did you mean 'propagate'?"),
    "policy of the other family": (("--policy", "stale"), "'stale' is not defined for the attention layers"),
    "no data folder": (("--data-dir", "./nowhere"), "no folder 'nowhere'"),
    "exits that are not there": (("--exits", "./nowhere"), "exits './nowhere'"),
    "places and folders": (("--exit-layers", "1,3"), "give either --exits DIR or --exit-layers"),
    "exits of another backbone": (("--exits", str(exits_folder("mamba2"))), "made for another backbone"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tasks, "_manager", small_manager(tasks._manager))
    options, said = WRONG[name]
    arguments = command(tmp_path / "out", *options, exits="exits" not in name or name.startswith("no"))
    capsys.readouterr()  # of the folders that were made
    assert cli.run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert said in printed.err
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


def small_manager(make):
    """The harness's index of one folder in place of all, which would take many seconds."""
    return lambda folder: make(folder or "triviaqa")


@pytest.mark.parametrize("task", ["triviaqa", "coqa", "truthfulqa_mc2"])
def test_offline_without_local_data(task, tmp_path, capsys, monkeypatch):
    arguments = command(tmp_path / "out", "--tasks", task)
    assert cli.run(arguments[: arguments.index("--data-dir")] + arguments[-2:]) == 2
    said = capsys.readouterr().err
    assert f"'{task}'" in said and tasks.LOCAL[task].documents in said and "--data-dir" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_data_folder_without_the_file(tmp_path, capsys):
    shutil.copy(ROWS / "triviaqa_dev.jsonl", tmp_path)
    assert cli.run(command(tmp_path / "out", "--data-dir", tmp_path)) == 2
    assert "needs triviaqa_train_sample.jsonl" in capsys.readouterr().err


def test_damaged_records_and_other_settings_lose_nothing(tmp_path, capsys):
    arguments = command(tmp_path, "--no-baselines")
    assert cli.run(arguments) == 0
    assert cli.run([*arguments, "--max-new-tokens", "5"]) == 2
    assert "holds an evaluation with another task 'triviaqa': max_new_tokens 4, now 5" in capsys.readouterr().err
    path = next((tmp_path / "records").rglob("full.jsonl"))
    before = path.read_bytes()
    path.write_bytes(before.replace(b'"kind": "sample"', b'"kind": sample'))
    damaged, document = path.read_bytes(), (tmp_path / "eval.json").read_bytes()
    assert cli.run(arguments) == 2
    assert "full.jsonl, line 2: not valid JSON" in capsys.readouterr().err
    assert path.read_bytes() == damaged
    assert (tmp_path / "eval.json").read_bytes() == document


def test_without_the_harness(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    monkeypatch.delitem(sys.modules, "dynamax_llm.evaluation.harness.model", raising=False)
    assert cli.run(command(tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: evaluation runs on lm-evaluation-harness, which is not installed")
    assert "pip install 'dynamax-llm[eval]'" in said
    assert not (tmp_path / "out").exists()
