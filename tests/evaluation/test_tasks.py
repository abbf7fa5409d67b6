"""Tasks on local files: the harness's prompts and metrics, deterministic documents, nothing left behind."""

from __future__ import annotations

import json
import shutil

import pytest

from dynamax_llm.errors import DataError, UsageError
from dynamax_llm.evaluation.harness import tasks
from dynamax_llm.evaluation.harness.tasks import LOCAL, load_tasks
from tests.evaluation.conftest import ROWS, TASKS, task


def test_all_five_are_there():
    assert tuple(LOCAL) == TASKS
    found = {name: task(name).facts for name in TASKS}
    assert [facts.shots for facts in found.values()] == [2, 0, 1, 1, 1]
    assert [facts.kind for facts in found.values()] == ["generate"] * 3 + ["loglikelihood"] * 2
    assert len({facts.sha256 for facts in found.values()}) == 4  # the two multiple-choice tasks share a file


def test_prompts_are_the_harnesses_own():
    prompt = task("triviaqa").docs[0].prompt
    assert prompt.count("Question: ") == 3  # two worked examples
    assert prompt.endswith("?\nAnswer:")
    assert task("truthfulqa_mc1").docs[0].instances[0].args[1].startswith(" ")
    assert task("coqa").docs[0].prompt.endswith("A:")
    assert task("triviaqa").docs[0].instances[0].args[1]["max_gen_toks"] == 6
    assert task("triviaqa").docs[0].instances[0].args[1]["until"] == ["\n", ".", ","]


def test_scores_are_the_harnesses_own():
    trivia = task("triviaqa")
    doc = trivia.docs[0]
    right = {"exact_match,remove_whitespace": 1.0}
    assert trivia.score(doc, [f" {doc.fields['answer']['aliases'][0]}"]) == right
    assert trivia.score(doc, ["no such thing"]) == {"exact_match,remove_whitespace": 0.0}
    coqa = task("coqa")
    doc = coqa.docs[0]
    answer = doc.fields["answers"]["input_text"][-1]
    assert coqa.score(doc, [f" {answer}\n more"]) == {"em,none": 1.0, "f1,none": 1.0}
    assert coqa.aggregate("f1,none", [0.5, 1.0]) == 0.75
    choices = task("truthfulqa_mc1")
    doc = choices.docs[0]
    responses = [(-float(place), False) for place in range(len(doc.instances))]  # the right choice comes first
    assert choices.score(doc, responses) == {"acc,none": 1.0}


def test_documents_depend_on_the_seed_alone():
    one, two, other = (load_tasks(["coqa"], data_dir=ROWS, limit=5, seed=seed)[0] for seed in (0, 0, 1))
    assert [doc.prompt for doc in one.docs] == [doc.prompt for doc in two.docs]
    assert [doc.prompt for doc in one.docs] != [doc.prompt for doc in other.docs]
    assert one.identity == two.identity != other.identity
    whole = load_tasks(["coqa"], data_dir=ROWS, limit=None)[0]
    assert len(whole.docs) == 12
    assert [doc.prompt for doc in whole.docs[:5]] == [doc.prompt for doc in one.docs]


def test_nothing_is_left_beside_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "rows"
    shutil.copytree(ROWS, folder)
    before = sorted(folder.iterdir())
    load_tasks(["truthfulqa_gen"], data_dir=folder, limit=1)
    assert sorted(folder.iterdir()) == before
    assert not (tmp_path / "cache").exists()


def test_damaged_and_empty_files_are_named(tmp_path):
    shutil.copytree(ROWS, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "triviaqa_dev.jsonl"
    path.write_text(json.dumps({"question": "?"}) + "\n{\n")
    with pytest.raises(DataError, match=r"triviaqa_dev.jsonl, line 2, column 1: not valid JSON"):
        load_tasks(["triviaqa"], data_dir=tmp_path)
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no document"):
        load_tasks(["triviaqa"], data_dir=tmp_path)
    path.write_text(json.dumps({"query": "?"}) + "\n")
    with pytest.raises(DataError, match=r"cannot be made from .*triviaqa_dev.jsonl"):
        load_tasks(["triviaqa"], data_dir=tmp_path)


def test_tasks_of_another_kind_are_refused():
    class Rolling:
        OUTPUT_TYPE = "loglikelihood_rolling"

    with pytest.raises(UsageError, match="task 'wikitext' requires loglikelihood_rolling"):
        tasks._ready("wikitext", Rolling(), {}, 1, 1, 0)
