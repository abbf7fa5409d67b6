"""Timing saved exits on prompts: modes beside plain generate, equal lengths, pairs in turns, a verdict in words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dynamax_llm as dx
from dynamax_llm import cli
from dynamax_llm.backbones import adapt
from dynamax_llm.backbones.loading import load
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.errors import ArtifactMismatchError, DataError, UsageError
from dynamax_llm.evaluation.bench import device
from dynamax_llm.evaluation.bench.exits import run
from dynamax_llm.evaluation.bench.exits.document import ExitBench
from dynamax_llm.evaluation.bench.exits.modes import modes
from dynamax_llm.evaluation.bench.exits.settings import ExitBenchSettings
from dynamax_llm.evaluation.bench.exits.work import batched, check_room, encode
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.text.prompts import Prompt
from tests.calibration.promised import record
from tests.folders import backbone, byte_tokenizer, exits_folder, model_folder

SETTINGS = ExitBenchSettings(thresholds=(0.4,), new=6, repeats=1, windows=(3,), quiet=True)
PROMPTS = [Prompt.of("The cat", "pets"), Prompt.of("Once", "tales"), Prompt.of("A dog", "pets"), Prompt.of("It was")]


@pytest.fixture(scope="module", autouse=True)
def _short_copies() -> Iterator[None]:
    """The bandwidth of a copy, which every document notes, is measured on a megabyte."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(device.COPIED, "cpu", 1 << 20)
        yield


def saved(model_type: str) -> Exits:
    """Random heads at two exits, one promise that leaves at the first and one under a policy of another family."""
    exits = Exits.from_pretrained(exits_folder(model_type))
    other = "copy" if model_type == "mamba2" else "stale"
    return exits.keep(record(exits)).keep(record(exits, policy=other))


@pytest.fixture(scope="module", params=["llama", "mamba2"])
def benched(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, Exits, ExitBench, list[ExitBench]]:
    model, tokenizer = load(model_folder(request.param))
    exits, parts = saved(request.param), []
    found = run.bench_exits(model, tokenizer, exits, PROMPTS, SETTINGS, name="tiny", on_part=parts.append)
    return model, exits, found, parts


def test_every_mode_that_is_supported_is_timed(benched):
    model, _, found, parts = benched
    rows = {row.label: row for row in found.rows}
    promise = "agreement>=0.9 (propagate, mamba)"
    assert list(rows) == ["never exit", promise, "propagate at 0.4", "defer at 0.4", "verify at 0.4"]
    assert found.complete and [(len(part.rows), part.complete) for part in parts] == [(5, False)]
    (left,) = found.left_out
    other = "copy" if model.config.model_type == "mamba2" else "stale"
    assert left.label == f"agreement>=0.9 ({other}, mamba)" and f"state policy '{other}' is not defined" in left.reason
    assert found.run.commit is None and found.load.kinds == {"pets": 2, "tales": 1, "other": 1}
    for row in found.rows:
        assert [sample.prompts for sample in row.samples] == [(1,), (3,), (2,), (4,)]
        assert set(row.kinds) == {"pets", "tales", "other"} and row.kinds["pets"].prompts == 2
        assert all(len(sample.seconds) == len(sample.plain_seconds) == 1 for sample in row.samples)
        assert row.overall.tokens == sum(len(sample.prompts) * sample.new for sample in row.samples)
        assert row.overall.ratio.low <= row.overall.ratio.value <= row.overall.ratio.high
        assert row.exact == (row.label in ("never exit", "verify at 0.4"))
        assert (row.window, row.threshold) == (
            (3 if row.policy in ("defer", "verify") else None),
            (None if row.mode != "threshold" else 0.4),
        )
    assert rows["never exit"].overall.mean_depth == 1.0
    assert rows[promise].promise == "agreement>=0.9" and rows[promise].overall.mean_depth < 0.7


def test_exact_modes_write_the_text_and_the_verdict_says_so(benched):
    _, _, found, _ = benched
    for row in found.rows:
        if row.exact:
            assert (row.overall.equal, row.overall.same, row.first_difference) == (1.0, 4, None)
            assert f"{row.label}: all 4 texts are plain generate's, token for token (float32)." in found.verdict
    promise = next(row for row in found.rows if row.mode == "promise")
    assert promise.overall.equal < 1.0 and promise.first_difference is not None
    place, token = promise.first_difference
    assert place == next(sample.prompts[0] for sample in promise.samples if sample.equal < 1.0)
    assert 2 <= token <= 6, "the first token comes from the prompt's own pass"


def test_counts_are_those_of_the_same_generation(benched):
    model, exits, found, _ = benched
    for name in ("propagate", "verify"):
        row = next(row for row in found.rows if row.label == f"{name} at 0.4")
        early = EarlyExit(exits, threshold=0.4, policy=name, window=3)
        depths, reductions, tokens, windows, checked = [], [], 0, 0, 0
        for sample in row.samples:
            ids = torch.tensor([byte_tokenizer()(PROMPTS[sample.prompts[0] - 1].text)["input_ids"]])
            options = {"max_new_tokens": sample.new, "do_sample": False, "eos_token_id": None}
            out = model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=early, **options)
            depths.append(out.trace.mean_depth * sample.new)
            reductions.append(out.trace.counted_reduction * sample.new)
            tokens += sample.new
            if out.verification is not None:
                windows += out.verification.windows
                checked += out.verification.accepted + out.verification.corrected
        assert row.overall.mean_depth == pytest.approx(sum(depths) / tokens)
        assert row.overall.counted_reduction == pytest.approx(sum(reductions) / tokens)
        assert row.overall.tokens_per_verification == (checked / windows if windows else None)
    assert windows > 0, "verify checked drafts"


def test_the_document_is_read_back(benched, tmp_path):
    _, _, found, _ = benched
    found.save(tmp_path)
    assert ExitBench.read(tmp_path) == found
    assert json.loads((tmp_path / "exit-bench.json").read_text())["format"] == "dynamax-exit-bench"
    (tmp_path / "exit-bench.json").write_text("{}")
    with pytest.raises(DataError, match="is not a usable benchmark of exits: complete"):
        ExitBench.read(tmp_path)


def test_all_modes_write_as_many_tokens_as_plain_generate():
    """Its end-of-text token is the third token of one prompt's text, and of none of the others'."""
    model, tokenizer = load(model_folder())
    ids = torch.tensor([tokenizer("The cat")["input_ids"]])
    text = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    end = int(text[0, ids.shape[1] + 2])
    assert end not in text[0, ids.shape[1] : ids.shape[1] + 2].tolist()
    model.generation_config.eos_token_id = end
    found = run.bench_exits(model, tokenizer, saved("llama"), PROMPTS[:1], SETTINGS)
    assert {sample.new for row in found.rows for sample in row.samples} == {3}
    assert {row.overall.tokens for row in found.rows} == {3}
    assert model.generation_config.eos_token_id == end


def test_batches_are_padded_and_each_batch_size_has_its_rows():
    model, tokenizer = load(model_folder("mamba2"))
    settings = dataclasses.replace(SETTINGS, batches=(1, 2), policies=("verify",))
    plain = [Prompt.of(prompt.text) for prompt in PROMPTS[:3]]
    found = run.bench_exits(model, tokenizer, Exits.from_pretrained(exits_folder("mamba2")), plain, settings)
    assert [(row.label, row.batch) for row in found.rows] == [
        (label, batch) for batch in (1, 2) for label in ("never exit", "verify at 0.4")
    ]
    assert [sample.prompts for sample in found.rows[2].samples] == [(1, 2), (3,)]
    assert all(row.overall.same == 3 and row.kinds == {} for row in found.rows)
    assert [list(plain.tokens_per_second) for plain in found.plain] == [["all"], ["all"]]
    assert any(sentence.startswith("Batch 2: verify at 0.4: all 3 texts") for sentence in found.verdict)


def test_pairs_take_turns_and_a_ratio_is_speed(monkeypatch):
    """With a clock that is told: plain 4 s, every mode 2 s, on the first prompt 1 s; at a mode's first call 100 s."""
    model, tokenizer = load(model_folder())
    calls: list[tuple[str, int]] = []
    real = run._Run._call

    def told(self, work, mode=None):
        label = "plain" if mode is None else mode.label
        first = mode is not None and label not in [name for name, _ in calls]
        calls.append((label, work.items[0].place))
        _, out = real(self, work, mode)
        return 100.0 if first else 4.0 if mode is None else 1.0 if work.items[0].place == 1 else 2.0, out

    monkeypatch.setattr(run._Run, "_call", told)
    settings = dataclasses.replace(SETTINGS, policies=("propagate",), repeats=2)
    plain = [Prompt.of(prompt.text) for prompt in PROMPTS[:3]]
    found = run.bench_exits(model, tokenizer, Exits.from_pretrained(exits_folder()), plain, settings)
    never, own = found.rows
    for row in (never, own):
        assert (row.overall.ratio.value, row.overall.ratio.low, row.overall.ratio.high) == (2.0, 2.0, 4.0)
        assert row.overall.tokens_per_second == pytest.approx(18 / (1 + 2 + 2))
        assert row.overall.plain_tokens_per_second == pytest.approx(18 / 12)
    assert found.plain[0].tokens_per_second == {"all": pytest.approx(1.5)}
    assert [label for label, _ in calls[:2]] == ["never exit", "propagate at 0.4"], "first calls are not timed"
    pairs = list(zip(calls[2::2], calls[3::2], strict=True))
    expected = []
    for repeat in (0, 1):
        for index, place in enumerate((1, 2, 3)):
            for label in ("never exit", "propagate at 0.4"):
                pair = (("plain", place), (label, place))
                expected.append(pair if (repeat + index) % 2 == 0 else pair[::-1])
    assert pairs == expected


def test_modes_that_are_not_supported_or_cannot_fire_are_left_out():
    model = backbone("llama")
    tail = Exits.from_pretrained(exits_folder("llama", "mlp", "tail"))
    found, left = modes(tail, adapt(model), SETTINGS)
    assert [mode.label for mode in found] == ["never exit", "propagate at 0.4"]
    assert [item.label for item in left] == ["defer at 0.4", "verify at 0.4"]
    assert all("cannot be used with the readout 'tail'" in item.reason for item in left)
    closed = dataclasses.replace(saved("llama"), drift_penalty={"propagate": (0.7, 0.7)}, promises=())
    settings = dataclasses.replace(SETTINGS, policies=("propagate", "defer", "stale"), windows=(3, 8))
    found, left = modes(closed, adapt(model), settings)
    assert [mode.label for mode in found] == ["never exit", "defer at 0.4, window 3", "defer at 0.4, window 8"]
    assert left[0].label == "propagate at 0.4" and left[0].reason.startswith("no exit can fire at this threshold")
    assert left[1].label == "stale at 0.4" and "is not defined for the attention layers" in left[1].reason


def test_prompts_are_chosen_from_all_kinds_and_padded_on_the_left():
    tokenizer = byte_tokenizer()
    many = [Prompt.of(f"a{index}", "first") for index in range(6)] + [Prompt.of("bcd", "second"), Prompt.of("e")]
    items = encode(tokenizer, many, 5)
    assert [(item.place, item.kind) for item in items] == [
        (1, "first"), (2, "first"), (3, "first"), (7, "second"), (8, "other"),
    ]  # fmt: skip
    assert [item.place for item in encode(tokenizer, many, 100)] == list(range(1, 9))
    first = batched(items, 2, 0, torch.device("cpu"))
    assert [[item.place for item in work.items] for work in first] == [[1, 2], [3], [7], [8]]
    assert {item.kind for item in encode(tokenizer, [Prompt.of("a")], 3)} == {None}
    both = batched([dataclasses.replace(item, kind=None) for item in items[2:4]], 2, 0, torch.device("cpu"))
    assert both[0].mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert both[0].ids[0, 1:].tolist() == tokenizer("a2")["input_ids"]
    with pytest.raises(UsageError, match=r"prompt 7 has 3 tokens, and 126 new ones .* has 128 positions"):
        check_room(items, adapt(backbone("llama")), 126)
    with pytest.raises(DataError, match="no prompt to time"):
        encode(tokenizer, [], 5)
    with pytest.raises(UsageError, match="no chat template"):
        encode(tokenizer, many, 5, chat=True)


def test_a_chat_goes_through_the_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    framed = encode(tokenizer, [Prompt.of("Hi")], 1, chat=True, system="Be brief.")
    assert tokenizer.decode(framed[0].ids) == "<system>Be brief.<user>Hi<assistant>"
    assert tokenizer.decode(encode(tokenizer, [Prompt.of("Hi")], 1)[0].ids) == "Hi"
    settings = dataclasses.replace(SETTINGS, policies=("verify",), chat=True)
    found = run.bench_exits(
        load(model_folder())[0], tokenizer, Exits.from_pretrained(exits_folder()), PROMPTS, settings
    )
    assert found.load.chat and found.rows[1].samples[0].prompt_tokens == len("<user>The cat<assistant>")


def test_from_python_with_plain_strings_and_a_folder():
    model, tokenizer = load(model_folder())
    settings = dataclasses.replace(SETTINGS, policies=("propagate",), threads=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = dx.bench_exits(model, tokenizer, exits_folder(), ["The cat", "A dog"], settings)
        assert "1 thread" in found.run.hardware and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert [row.label for row in found.rows] == ["never exit", "propagate at 0.4"] and found.load.prompts == 2
    with pytest.raises(ArtifactMismatchError, match="made for another backbone"):
        dx.bench_exits(model, tokenizer, exits_folder("mamba2"), ["The cat"], settings)
    with pytest.raises(UsageError, match="no trained head"):
        dx.bench_exits(model, tokenizer, exits_folder("llama", None), ["The cat"], settings)
    measured = dataclasses.replace(settings, measure="state_similarity", thresholds=(0.0,))
    by_measure = dx.bench_exits(model, tokenizer, exits_folder("llama", None), ["The cat"], measured)
    assert by_measure.exits.estimator == "state_similarity" and by_measure.rows[1].overall.mean_depth < 0.6


def test_a_mode_that_runs_out_of_memory_is_left_out(monkeypatch):
    model, tokenizer = load(model_folder())
    real = EarlyExit.__call__

    def small(self, *arguments, **options):
        if self.policy.name == "defer":
            raise torch.OutOfMemoryError("too much")
        return real(self, *arguments, **options)

    monkeypatch.setattr(EarlyExit, "__call__", small)
    settings = dataclasses.replace(SETTINGS, policies=("defer", "propagate"))
    found = run.bench_exits(model, tokenizer, Exits.from_pretrained(exits_folder()), PROMPTS[:1], settings)
    assert [row.label for row in found.rows] == ["never exit", "propagate at 0.4"]
    assert [(item.label, item.batch, item.reason) for item in found.left_out] == [("defer at 0.4", 1, "out of memory")]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    path.write_text('{"prompt": "The cat", "kind": "pets"}\n{"question": "Who?", "kind": "quiz"}\n')
    return path


def test_the_command(capsys, tmp_path, prompts):
    words = ["bench", str(model_folder()), "--exits", str(exits_folder()), "--data", str(prompts)]
    words += ["--threshold", "0.4", "--policy", "propagate,stale,verify", "--window", "3"]
    words += ["--max-new-tokens", "4", "--repeats", "1"]
    assert cli.run([*words, "--out", str(tmp_path / "x" / "own.json")]) == 0
    printed = capsys.readouterr()
    first = printed.out.splitlines()[0]
    assert first.startswith(("Fastest here: ", "None pays here", "No exit pays here"))
    assert "x plain by kind of prompt" in printed.out and "pets (1)" in printed.out
    assert "Left out: stale at 0.4: state policy 'stale' is not defined" in printed.out
    assert "verify at 0.4: all 2 texts are plain generate's, token for token (float32)." in printed.out
    assert [line for line in printed.err.splitlines() if line.endswith("…")] == [
        "plain generate …", "first calls …", "timing …",
    ]  # fmt: skip
    found = ExitBench.read(tmp_path / "x" / "own.json")
    assert found.complete and found.verdict[0] == first and found.run.command.startswith("dynamax bench")
    assert [item.name for item in (tmp_path / "x").iterdir()] == ["own.json"]
    assert cli.run([*words, "--policy", "propagate", "--prompts", "1", "--json"]) == 0
    assert ExitBench.model_validate_json(capsys.readouterr().out).load.prompts == 1


REFUSED = [
    (("--repeats", "0"), "--repeats 0: give at least 1"),
    (("--prompts", "0"), "--prompts 0: give at least 1"),
    (("--threshold", "high"), "--threshold 'high': give numbers separated by commas"),
    (("--threshold", "2"), "--threshold '2': give between 0 and 1"),
    (("--policy", "verfy"), "Did you mean 'verify'?"),
    (("--checks", "2"), "--checks is about random tokens, not about prompts: leave --data out, or leave --checks out."),
    (("--chat",), "this tokenizer has no chat template: leave --chat out"),
    (("--system", "Be brief."), "--system 'Be brief.': only a chat has a system message. Give --chat too."),
    (("--exits", "8,12"), "--exits takes a folder"),
    (("--exits", str(exits_folder("mamba2"))), "these exits were made for another backbone"),
    (("--exits", str(exits_folder("llama", None))), "these exits have no trained head"),
    (("--max-new-tokens", "126"), "this backbone has 128 positions. Shorten the prompt, or lower --max-new-tokens."),
    (("--engine", "cuda", "--device", "cpu", "--max-new-tokens", "4"), "engine 'cuda' cannot run this"),
]


@pytest.mark.parametrize(
    ("words", "says"), REFUSED, ids=[f"{number} {words[0]}" for number, (words, _) in enumerate(REFUSED)]
)
def test_refusals(words, says, capsys, prompts, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # without it a CPU has one engine
    exits = () if "--exits" in words else ("--exits", str(exits_folder()))
    assert cli.run(["bench", str(model_folder()), "--data", str(prompts), *exits, *words]) == 2
    printed = capsys.readouterr()
    assert says in printed.err.splitlines()[-1] and printed.out == "" and "Traceback" not in printed.err


def test_refusals_of_files_and_of_half_a_command(capsys, tmp_path, prompts):
    def refused(*words: object) -> str:
        assert cli.run(["bench", *map(str, words)]) == 2
        return capsys.readouterr().err

    model, exits = model_folder(), ("--exits", exits_folder())
    (tmp_path / "none.jsonl").write_text("\n")
    assert "holds no prompt" in refused(model, *exits, "--data", tmp_path / "none.jsonl")
    assert "no file or folder" in refused(model, *exits, "--data", tmp_path / "nowhere.jsonl")
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    assert "no prompt in a field messages, prompt or question" in refused(
        model, *exits, "--data", tmp_path / "other.jsonl"
    )
    assert "no trained exits for" in refused(model, "--data", prompts)
    about = "is about saved exits and prompts: give --data too, or leave"
    assert f"--exits {about} --exits out." in refused(model, *exits)
    assert f"--threshold {about} --threshold out." in refused("--shape", "tiny-mamba", "--threshold", "0.5")
    assert "--shape is about random tokens" in refused("--shape", "tiny-mamba", "--data", prompts)
