"""An evaluation from end to end on the shipped rows: figures, records, resumption, and one document of several."""

from __future__ import annotations

import json

import pytest

from dynamax_llm.errors import DataError, UsageError
from dynamax_llm.evaluation.harness import evaluate as module
from dynamax_llm.evaluation.harness.combine import add_to, combine, difference
from dynamax_llm.evaluation.harness.evaluate import Plan, evaluate
from dynamax_llm.evaluation.harness.records import Records, cell_path
from dynamax_llm.evaluation.harness.results import Evaluation
from dynamax_llm.evaluation.harness.settings import Variant, by_head, by_measure, full, pruned, static
from dynamax_llm.evaluation.harness.tasks import load_tasks
from tests.evaluation.conftest import LIMIT, NEW, ROWS, heads, subject, task


def settings(family: str) -> list[Variant]:
    who, exits = subject(family), heads(family)
    return [
        full(who, exits),
        by_measure(who, exits, "softmax_margin", 0.0),
        static(who, 2),
        by_head(who, exits, 0.0),
        by_head(who, exits, "never"),
        by_head(who, exits, 0.0, family="verified", policy="verify", window=4),
        pruned(who, 2),
    ]


def run(family, out, names=("triviaqa",), chosen=slice(2, 4), **plan) -> Evaluation:
    """Under the full model and those of ``settings`` that are chosen."""
    options = {"batch": 2, "timed": 0, "examples": 0, **plan}
    every = settings(family)
    variants = [every[0], *every[1:][chosen]]
    return evaluate(subject(family), variants, [task(name) for name in names], Plan(**options), out)


def test_cells_of_every_kind(family, tmp_path):
    found = run(family, tmp_path, ("triviaqa", "truthfulqa_mc1"), slice(None), timed=1)
    found.save(tmp_path)
    assert Evaluation.read(tmp_path) == found
    cells = {(cell.task, cell.setting): cell for cell in found.cells}
    assert len(cells) == 14
    for (name, setting), cell in cells.items():
        assert cell.samples == LIMIT
        assert sum(cell.histogram.values()) == cell.tokens > 0
        if setting in ("full", "mamba head@never", "verified@0"):
            assert all(metric.delta.value == 0.0 for metric in cell.metrics.values())
        if name == "truthfulqa_mc1":
            assert (cell.agreement, cell.rouge_l, cell.speed_up if setting != "full" else None) == (None, None, None)
            continue
        if setting in ("full", "mamba head@never", "verified@0"):
            assert (cell.agreement.value, cell.identical, cell.rouge_l.value) == (1.0, 1.0, 1.0)
            assert cell.first_divergence is None
        assert cell.timed_samples == (0 if setting == "full" else 1)
        assert cell.speed_up.value > 0
    tokens = cells["triviaqa", "static@2"].tokens
    assert cells["triviaqa", "static@2"].histogram == {2: tokens - LIMIT, 5: LIMIT}  # first tokens are the prompts'
    assert cells["triviaqa", "static@2"].pass_reduction == pytest.approx(0.6)
    assert cells["triviaqa", "pruned@3"].mean_depth.value == pytest.approx(0.6)
    assert cells["triviaqa", "pruned@3"].pass_reduction == pytest.approx(0.4)
    assert 0.2 < cells["triviaqa", "pruned@3"].counted_reduction.value < 0.4
    assert cells["triviaqa", "mamba head@0"].mean_depth.value < 1.0
    assert cells["truthfulqa_mc1", "mamba head@0"].mean_depth.value < 1.0
    facts = {item.name: item for item in found.tasks}
    assert (facts["triviaqa"].kind, facts["triviaqa"].shots, facts["triviaqa"].max_new_tokens) == ("generate", 2, NEW)
    assert facts["triviaqa"].source == "triviaqa_dev.jsonl, triviaqa_train_sample.jsonl"
    assert found.runs[0].versions["lm_eval"]


def test_examples_read_as_the_text_and_reliability_has_every_token(family, tmp_path):
    found = run(family, tmp_path, examples=1)
    assert [item.setting for item in found.examples] == ["mamba head@0", "mamba head@never"]
    for item in found.examples:
        record = next(record for record in samples(tmp_path, family, item.setting) if "full" in record)
        decode = subject(family).tokenizer.decode
        assert "".join(token.text for token in item.tokens) == decode(record["tokens"])
        assert [token.layers for token in item.tokens] == record["layers"]
        assert [token.agrees for token in item.tokens] == [
            own == full for own, full in zip(record["tokens"], record["full"], strict=True)
        ]
        if item.setting == "mamba head@never":
            assert all(token.agrees for token in item.tokens)
    steps = sum(len(record["tokens"]) - 1 for record in samples(tmp_path, family, "full"))
    heads_seen = {(item.family, item.layer): item for item in found.reliability}
    assert set(heads_seen) >= {("mamba head", 2), ("mamba head", 3)}
    for item in heads_seen.values():
        assert sum(part.tokens for part in item.bins) == steps
        assert 0.0 <= item.error <= 1.0


def samples(out, family, setting) -> list[dict]:
    lines = cell_path(out, family, "triviaqa", setting).read_text().splitlines()[1:]
    return [record for record in map(json.loads, lines) if record["kind"] == "sample"]


def test_a_finished_run_is_only_read(tmp_path, monkeypatch):
    first = run("llama", tmp_path, timed=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}

    def never(*arguments, **options):
        raise AssertionError("worked again")

    monkeypatch.setattr(module._Cells, "_answer", never)
    monkeypatch.setattr(module, "pair", never)
    again = run("llama", tmp_path, timed=1)
    assert again.cells == first.cells
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")} == before


def test_a_killed_run_goes_on_with_the_samples_it_lacks(tmp_path, monkeypatch):
    whole = run("llama", tmp_path / "whole", batch=1)
    answer, calls = module._Cells._answer, []

    def killed(self, task, variant, docs):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return answer(self, task, variant, docs)

    monkeypatch.setattr(module._Cells, "_answer", killed)
    with pytest.raises(KeyboardInterrupt):
        run("llama", tmp_path / "cut", batch=1)
    path = cell_path(tmp_path / "cut", "llama", "triviaqa", "full")
    with open(path, "ab") as file:
        file.write(b'{"kind": "sample", "doc": 7, "te')  # kill -9 in the middle of a line
    calls.clear()
    again = run("llama", tmp_path / "cut", batch=1)
    assert len(calls) == 3 * LIMIT - 4
    assert again.cells == whole.cells
    assert b'"te\n' not in path.read_bytes()


def test_records_of_other_settings_are_refused_and_kept(tmp_path):
    run("llama", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    changed = [full(subject("llama"), heads("llama")), by_head(subject("llama"), heads("llama", "mlp"), 0.0)]
    changed[1] = Variant(
        changed[1].facts.model_copy(update={"id": "mamba head@0"}), changed[1].model, changed[1].exits, {}
    )
    with pytest.raises(UsageError, match="holds records of another run: head 'mamba', now 'mlp'"):
        evaluate(subject("llama"), changed, [task("triviaqa")], Plan(batch=2), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")} == before


@pytest.mark.parametrize(
    ("line", "said"),
    [("{broken", "not valid JSON"), ('{"kind": "sample"}', "no 'doc'"), ('{"kind": "other", "doc": 1}', "'other'")],
)
def test_a_damaged_line_is_named(line, said, tmp_path):
    path = tmp_path / "r.jsonl"
    kept = Records(path, {"a": 1})
    kept.append({"kind": "sample", "doc": 0}, {"kind": "timing", "doc": 0})
    path.write_text(path.read_text().replace('{"kind": "sample", "doc": 0}', line))
    before = path.read_bytes()
    with pytest.raises(DataError, match=f"r.jsonl, line 2: .*{said}.*Nothing was changed"):
        Records(path, {"a": 1})
    assert path.read_bytes() == before


def test_records_come_back(tmp_path):
    path = tmp_path / "deep" / "r.jsonl"
    kept = Records(path, {"a": (1, 2)})
    assert not path.exists()
    kept.append({"kind": "sample", "doc": 3, "text": "zwei\nZeilen \u2028 ü"})
    kept.append({"kind": "timing", "doc": 3, "ratio": 1.5})
    again = Records(path, {"a": [1, 2]})
    assert (again.samples, again.timings) == (kept.samples, kept.timings)
    with pytest.raises(UsageError, match="another run: a \\[1, 2\\], now 5"):
        Records(path, {"a": 5})
    path.write_text(path.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(DataError, match="version 9"):
        Records(path, {"a": [1, 2]})


def test_two_backbones_in_one_document(tmp_path):
    parts = [run(name, tmp_path) for name in ("llama", "mamba2")]
    both = combine(parts, title="pair")
    assert [item.name for item in both.backbones] == ["llama", "mamba2"]
    assert len(both.cells) == 6 and len(both.tasks) == 1 and len(both.runs) == 2
    assert (both.title, set(both.settings)) == ("pair", {"llama", "mamba2"})
    other = parts[1].model_copy(update={"tasks": (parts[1].tasks[0].model_copy(update={"shots": 9}),)})
    with pytest.raises(UsageError, match="disagree about the task 'triviaqa': its shots is 2 in one and 9 in another"):
        combine([parts[0], other])
    with pytest.raises(UsageError, match="at least one"):
        combine([])


def test_other_tasks_and_settings_are_added_to_the_document(tmp_path):
    """What a folder's document holds is never lost: not by another task, another threshold, or the same again."""
    first = add_to(tmp_path, run("llama", tmp_path, examples=1))
    assert Evaluation.read(tmp_path) == first
    second = add_to(tmp_path, run("llama", tmp_path, ("coqa",), slice(1, 2)))
    places = {(cell.setting, cell.task) for cell in second.cells}
    assert places == {
        *((name, "triviaqa") for name in ("full", "mamba head@0", "mamba head@never")),
        *((name, "coqa") for name in ("full", "static@2")),
    }
    assert second.cells[:3] == first.cells and second.examples == first.examples
    assert [item.name for item in second.tasks] == ["triviaqa", "coqa"] and len(second.runs) == 2
    assert second.reliability == first.reliability
    third = add_to(tmp_path, run("llama", tmp_path, ("triviaqa",), slice(0, 1)))
    assert {cell.setting for cell in third.cells if cell.task == "triviaqa"} == {
        "full", "mamba head@0", "mamba head@never", "softmax_margin@0",
    }  # fmt: skip
    again = add_to(tmp_path, run("llama", tmp_path, ("triviaqa",), slice(2, 4), examples=1))
    assert sorted(map(repr, again.cells)) == sorted(map(repr, third.cells))
    assert [item.id for item in again.settings["llama"]] == [item.id for item in third.settings["llama"]]
    other = add_to(tmp_path, run("mamba2", tmp_path))
    assert [item.name for item in other.backbones] == ["llama", "mamba2"]
    assert set(map(repr, again.cells)) < set(map(repr, other.cells))


def changed(document: Evaluation, **changes: object) -> Evaluation:
    """The document with fields of its first backbone, task and (full model's) setting changed where they have them."""
    parts = {"backbones": document.backbones, "tasks": document.tasks, "settings": document.settings["llama"]}
    for name, items in parts.items():
        own = {key: value for key, value in changes.items() if key in type(items[0]).model_fields}
        parts[name] = (items[0].model_copy(update=own), *items[1:])
    parts["settings"] = {"llama": parts["settings"]}
    return document.model_copy(update=parts)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 9}, "another task 'triviaqa': limit 2, now 9"),
        ({"shots": 5}, "another task 'triviaqa': shots 2, now 5"),
        ({"max_new_tokens": 64}, "another task 'triviaqa': max_new_tokens 6, now 64"),
        ({"source": "hub"}, "another task 'triviaqa': source 'triviaqa_dev.jsonl.*, now 'hub'"),
        ({"sha256": "00"}, "another task 'triviaqa': sha256 '.*, now '00'"),
        ({"policy": "defer"}, "another setting of llama 'full': policy 'propagate', now 'defer'"),
        ({"window": 4}, "another setting of llama 'full': window 16, now 4"),
        ({"layers": (1,)}, r"another setting of llama 'full': layers \(2, 3\), now \(1,\)"),
        ({"fingerprint": "00"}, "another backbone 'llama': fingerprint '.*, now '00'"),
        ({"n_layers": 7, "fingerprint": "00"}, "another backbone 'llama': n_layers 5, now 7"),
    ],
)
def test_a_document_that_contradicts_is_kept_and_the_difference_named(changes, said, tmp_path):
    first = add_to(tmp_path, run("llama", tmp_path))
    before = (tmp_path / "eval.json").read_bytes()
    with pytest.raises(UsageError, match=f"{said}. Give another folder"):
        add_to(tmp_path, changed(first, **changes))
    assert (tmp_path / "eval.json").read_bytes() == before


def test_another_limit_is_refused_before_any_work(tmp_path, monkeypatch):
    """Also where the records would not tell: a setting that was not evaluated before."""
    add_to(tmp_path, run("llama", tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}

    def never(*arguments, **options):
        raise AssertionError("worked")

    monkeypatch.setattr(module._Cells, "_answer", never)
    more = load_tasks(["triviaqa"], data_dir=ROWS, limit=LIMIT + 2, max_new_tokens=NEW)
    variants = [settings("llama")[index] for index in (0, 1)]
    with pytest.raises(UsageError, match=f"'triviaqa': limit {LIMIT}, now {LIMIT + 2}. Give another folder"):
        evaluate(subject("llama"), variants, more, Plan(batch=2), tmp_path)
    (tmp_path / "eval.json").unlink()  # then the records say it
    with pytest.raises(UsageError, match=f"holds records of another run: limit {LIMIT}, now {LIMIT + 2}"):
        evaluate(subject("llama"), variants, more, Plan(batch=2), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")} == {
        path: content for path, content in before.items() if path.suffix == ".jsonl"
    }


def test_a_damaged_document_is_refused_and_kept(tmp_path):
    first = add_to(tmp_path, run("llama", tmp_path))
    (tmp_path / "eval.json").write_text("{")
    with pytest.raises(DataError, match="not a usable evaluation"):
        add_to(tmp_path, first)
    with pytest.raises(DataError, match="not a usable evaluation"):
        run("llama", tmp_path)
    assert (tmp_path / "eval.json").read_text() == "{"


def test_the_first_difference_is_the_telling_one():
    assert difference({"a": 1}, {"a": 1}) == ""
    assert difference({"asked": "x", "limit": 4}, {"asked": "y", "limit": 6}) == "limit 4, now 6"
    assert difference({"asked": "x"}, {"asked": "y"}) == "asked 'x', now 'y'"
    assert difference({"exits": {"head": "mlp"}}, {"exits": {"head": "linear"}}) == "head 'mlp', now 'linear'"
    assert difference({"seed": 0}, {}) == "seed 0, now None"


@pytest.mark.parametrize(("options", "said"), [({"batch": 0}, "batch = 0"), ({"timed": -1}, "timed = -1")])
def test_plans_that_cannot_be(options, said):
    with pytest.raises(UsageError, match=said):
        Plan(**options)
