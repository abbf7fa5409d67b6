"""The paper's grid on tiny backbones: one command, resumable, with its report; and its refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamax_llm import cli
from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.harness import evaluate as module
from dynamax_llm.evaluation.harness.results import Evaluation
from dynamax_llm.paper import MODELS, PaperPlan
from dynamax_llm.paper.grid import notes
from tests.folders import corpus, model_folder

ROWS = Path(__file__).resolve().parent.parent / "data" / "tasks"


def grid(out: Path, *options: object) -> list[str]:
    """Two tiny backbones, one head, one task of two documents."""
    words = [
        *("paper", model_folder("llama"), model_folder("mamba2"), "--heads", "linear", "--tasks", "triviaqa"),
        *(
            "--threshold",
            "0.5",
            "--limit",
            2,
            "--batch-size",
            2,
            "--timed",
            0,
            "--max-new-tokens",
            4,
            "--data-dir",
            ROWS,
        ),
        *("--train-data", corpus(), "--train-tokens", "1k", "--out", out, *options),
    ]
    return [str(word) for word in words]


def test_one_command_makes_the_grid_and_the_same_command_again_repeats_nothing(tmp_path, capsys, monkeypatch):
    words = grid(tmp_path)
    capsys.readouterr()
    assert cli.run(words) == 0, capsys.readouterr().err
    assert all(line.endswith("…") for line in capsys.readouterr().err.splitlines())  # progress of training alone
    found = Evaluation.read(tmp_path)
    assert [item.name for item in found.backbones] == ["llama-0", "mamba2-0"]
    kinds = [setting.kind for setting in found.settings["llama-0"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {"full": 1, "measure": 1, "head": 1, "static": 3, "pruned": 3}
    assert len(found.cells) == 2 * len(kinds)
    assert {cell.samples for cell in found.cells} == {2}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f"{note[:40]}" in page for note in found.notes)
    assert any("answer hardly any question" in note for note in found.notes)
    assert len(list((tmp_path / "figures").iterdir())) > 0

    heads = {path: path.stat().st_mtime_ns for path in (tmp_path / "exits").rglob("exits.safetensors")}
    assert len(heads) == 2
    monkeypatch.setattr("dynamax_llm.report.write_report", lambda *_: [])  # drawn once is enough
    monkeypatch.setattr(module._Cells, "_answer", lambda *_: pytest.fail("a finished cell was answered again"))
    assert cli.run(grid(tmp_path)) == 0, capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in heads} == heads
    again = Evaluation.read(tmp_path)
    assert again.cells == found.cells
    assert again.examples == found.examples


def test_the_defaults_are_the_papers():
    plan = PaperPlan()
    assert plan.models == MODELS == ("mistralai/Mistral-7B-v0.3", "mistralai/Mamba-Codestral-7B-v0.1")
    assert plan.heads == ("linear", "transformer", "mamba")
    assert plan.tasks == ("triviaqa", "coqa", "truthfulqa_gen")
    assert plan.max_new_tokens == 32
    assert plan.names == {MODELS[0]: "Mistral-7B-v0.3", MODELS[1]: "Mamba-Codestral-7B-v0.1"}
    assert PaperPlan(models=("a/m", "b/m")).names == {"a/m": "a--m", "b/m": "b--m"}


def test_nothing_is_said_of_small_models_where_none_is():
    run = {"command": "c", "created": "2026-01-01", "seconds": 1.0, "hardware": "h", "versions": {}}
    facts = {"model_type": "llama", "n_layers": 32, "fingerprint": "f"}
    for size, said in ((7_000_000_000, False), (7_000_000, True)):
        document = Evaluation(
            title="t",
            runs=(run,),
            backbones=({"name": "m", "parameters": size, **facts},),
            settings={"m": ()},
            tasks=(),
            cells=(),
        )
        assert any("answer hardly any question" in note for note in notes(document)) == said


@pytest.mark.parametrize(
    ("options", "said", "way_out"),
    [
        (("--heads", "mambo"), "'mambo'", "Did you mean 'mamba'"),
        (("--heads", "linear,linear"), "linear given twice", "name each once"),
        (("--threshold", "0.5,2"), "2.0", "between 0 and 1"),
        (("--threshold", "never"), "'never'", "leave never out"),
        (("--threshold", ","), "','", "separated by commas"),
        (("--limit", "0"), "limit 0", "at least 1"),
        (("--policy", "propagat"), "'propagat'", "propagate"),
        (("--data-dir", "none"), "'none'", "--data-dir"),
        (("--train-tokens", "many"), "'many'", "300k"),
    ],
)
def test_one_clear_error(options, said, way_out, tmp_path, capsys):
    words = grid(tmp_path / "out", *options)
    capsys.readouterr()
    assert cli.run(words) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1, printed.err
    assert said in printed.err and way_out in printed.err
    assert not (tmp_path / "out").exists()


def test_missing_exits_need_text():
    plan = PaperPlan(train_data=None)
    from dynamax_llm.paper.heads import exits_of

    with pytest.raises(UsageError, match="`train_data`"):
        exits_of("elsewhere", None, None, plan.heads, plan.train_data, plan.training, Path("/nowhere"))
