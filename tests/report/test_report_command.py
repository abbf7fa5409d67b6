"""``dynamax report`` and its wrong inputs: one line that names the value and the way out, and nothing half-written."""

from __future__ import annotations

import json
import sys

import pytest

from dynamax_llm import cli
from dynamax_llm.errors import DataError, UsageError
from dynamax_llm.report import combine, write_report
from tests.report import synthetic


@pytest.fixture
def folder(tmp_path):
    synthetic.single().save(tmp_path / "eval")
    return tmp_path / "eval"


def refused(capsys, *arguments: object) -> str:
    assert cli.run(["report", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_it_writes_page_and_figures(folder, tmp_path, capsys):
    out, plots = tmp_path / "new" / "r.html", tmp_path / "plots"
    document = synthetic.single()
    counted = document.cells[0].model_copy(update={"histogram": {8: 3, 16: 7}})
    document.model_copy(update={"cells": (counted,)}).save(folder)
    assert cli.run(["report", str(folder), "--out", str(out), "--figures", str(plots)]) == 0
    said = capsys.readouterr().out
    assert "r.html" in said and "2 figures in" in said
    assert "One cell" in out.read_text(encoding="utf-8")
    names = sorted(path.name for path in plots.iterdir())
    assert names == ["depth-tfm-demo-truthfulqa-mc2.png", "depth-tfm-demo-truthfulqa-mc2.svg"]


def test_the_document_itself_will_do(folder, tmp_path, capsys):
    assert cli.run(["report", str(folder / "eval.json"), "--out", str(tmp_path / "r.html")]) == 0
    assert "self-contained" in capsys.readouterr().out


def test_wrong_folders(folder, tmp_path, capsys):
    out = tmp_path / "r.html"
    (tmp_path / "empty").mkdir()
    assert "Give the folder that dynamax eval wrote" in refused(capsys, tmp_path / "empty", "--out", out)
    assert "'nowhere'" in refused(capsys, "./nowhere", "--out", out)
    (folder / "eval.json").write_text(json.dumps(json.loads((folder / "eval.json").read_text()) | {"cells": 3}))
    assert "cells" in refused(capsys, folder, "--out", out)
    (folder / "eval.json").write_text('{"title":')
    assert "Run dynamax eval again" in refused(capsys, folder, "--out", out)
    assert not out.exists()


def test_wrong_targets(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    said = refused(capsys, folder, "--out", folder)
    assert "is a folder" in said and "report.html" in said
    assert "does not end in .html" in refused(capsys, folder, "--out", folder / "eval.json")
    assert "is a file. Give a folder" in refused(
        capsys, folder, "--out", tmp_path / "r.html", "--figures", tmp_path / "file"
    )
    assert "nothing can be written below it" in refused(capsys, folder, "--out", tmp_path / "file" / "r.html")
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "r.html").exists()


def test_clashing_evaluations(folder, tmp_path, capsys):
    document = synthetic.single()
    other = document.backbones[0].model_copy(update={"fingerprint": "another"})
    document.model_copy(update={"backbones": (other,)}).save(tmp_path / "second")
    said = refused(capsys, folder, tmp_path / "second", "--out", tmp_path / "r.html")
    assert "disagree about the backbone 'tfm-demo'" in said and "'another'" in said and "a1b2c3d4" in said
    assert not (tmp_path / "r.html").exists()


def test_no_matplotlib(folder, tmp_path, capsys, monkeypatch):
    document = synthetic.single()
    counted = document.cells[0].model_copy(update={"histogram": {16: 7}})
    document.model_copy(update={"cells": (counted,)}).save(folder)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'dynamax-llm[eval]'" in refused(capsys, folder, "--out", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_two_backbones_evaluated_apart_are_one_report():
    whole = synthetic.evaluation()
    apart = [synthetic.evaluation(backbones=(backbone,)) for backbone in synthetic.BACKBONES]
    assert combine(apart) == whole
    assert combine([whole, whole]) == whole


@pytest.mark.parametrize("part", ["cells", "tasks", "settings"])
def test_what_clashes_is_named(part):
    document = synthetic.single()
    name = document.backbones[0].name
    changed = {
        "cells": (document.cells[0].model_copy(update={"tokens": 7}),),
        "tasks": (document.tasks[0].model_copy(update={"samples": 7}),),
        "settings": {name: (document.settings[name][0].model_copy(update={"window": 7}),)},
    }
    with pytest.raises(UsageError, match=f"disagree about the {part[:-1]}.* 7 in another"):
        combine([document, document.model_copy(update={part: changed[part]})])


def test_what_is_not_described_is_refused():
    with pytest.raises(DataError, match="refers to the task 'truthfulqa_mc2'"):
        combine([synthetic.single().model_copy(update={"tasks": ()})])
    with pytest.raises(UsageError, match="at least one"):
        write_report([], "r.html")
