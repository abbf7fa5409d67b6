"""Training batches out of answers, alone and mixed with text."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from dynamax_llm.backbones import adapt
from dynamax_llm.errors import DataError, UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.text.answer_files import Answers
from dynamax_llm.text.answer_source import AnswerSource, AnySource, MixedSource, stream_of
from dynamax_llm.text.answers import make_answers
from dynamax_llm.text.batches import Answered, Batch, Position, first_batches, is_held_out
from dynamax_llm.text.sources import find_source
from dynamax_llm.training.parallel import Group
from dynamax_llm.training.run import identity
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.trainer import train
from tests.text.conftest import few, prompts
from tests.text.tokenizers import byte_tokenizer

COUNT, SHARE, SEQUENCE = 40, 0.2, 64


@pytest.fixture
def answers(model, tokenizer, tmp_path: Path) -> Answers:
    return make_answers(model, tokenizer, prompts(COUNT), few(rows=40), tmp_path / "answers", name="p", quiet=True)


@pytest.fixture
def text(tmp_path: Path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} " + "layers and exits " * 6}) + "\n" for n in range(30)))
    return find_source(path)


def stream(source: AnySource, held_out: bool = False, sequence: int = SEQUENCE):
    return stream_of(source, byte_tokenizer(), held_out, SHARE, sequence, 256, 3)


def sequences(batches: list[Batch]) -> list[list[int]]:
    return [ids[mask].tolist() for batch in batches for ids, mask in zip(batch.ids, batch.mask, strict=True)]


def epoch(source: AnySource, **how) -> list[Batch]:
    return [batch for batch, _ in stream(source, **how).batches(Position(), epochs=1)]


def test_every_answer_is_in_one_split_chosen_by_its_prompt(answers: Answers) -> None:
    source = AnswerSource(answers)
    split = {held: sequences(epoch(source, held_out=held)) for held in (False, True)}
    assert sorted(split[False] + split[True]) == sorted(row.ids for row in answers)
    held = sorted(row.ids for row in answers if is_held_out(Answered(row.ids, row.prompt), SHARE))
    assert sorted(split[True]) == held and 2 <= len(held) <= 16
    other = Answered([*answers[0].ids[: answers[0].prompt], 7, 7], answers[0].prompt)
    assert all(is_held_out(other, s) == is_held_out(Answered(answers[0].ids, other.prompt), s) for s in (0.1, 0.5, 0.9))


def test_a_batch_marks_tokens_whose_next_belongs_to_an_answer(answers: Answers) -> None:
    by_ids = {tuple(row.ids): row.prompt for row in answers}
    marked = 0
    for batch in epoch(AnswerSource(answers)):
        assert batch.answers is not None and batch.answers.shape == batch.ids.shape
        assert not (batch.answers & ~batch.mask).any()
        for ids, mask, marks in zip(batch.ids, batch.mask, batch.answers, strict=True):
            whole = ids[mask].tolist()
            prompt = by_ids[tuple(whole)]
            assert marks.nonzero().flatten().tolist() == list(range(prompt - 1, len(whole) - 1))
            marked += int(marks.sum())
    assert marked > 50


def test_sequences_are_cut_and_those_without_an_answer_left_out(answers: Answers) -> None:
    most = sorted(row.prompt for row in answers)[COUNT // 2]
    source = AnswerSource(answers)
    found = sequences(epoch(source, sequence=most) + epoch(source, held_out=True, sequence=most))
    assert sorted(found) == sorted(row.ids[:most] for row in answers if row.prompt < most)
    assert 0 < len(found) < COUNT


def test_the_order_is_the_seeds_and_differs_between_epochs(answers: Answers) -> None:
    source = AnswerSource(answers)
    orders = [[row.ids for row in source.documents(seed)] for seed in (1, 1, 2, None)]
    assert orders[0] == orders[1] != orders[2] != orders[3] == [row.ids for row in answers]
    assert sorted(orders[0]) == sorted(orders[3])


@pytest.mark.parametrize("share", [None, 0.25, 0.6])
def test_a_resumed_stream_goes_on_in_the_same_order(answers: Answers, text, share: float | None) -> None:
    ours = AnswerSource(answers)
    source = ours if share is None else MixedSource(ours, text, share)
    unbroken = list(islice(stream(source).batches(Position()), 40))
    assert unbroken[-1][1].epoch >= 1
    for after in (1, 7, 22):
        saved = json.loads(json.dumps(dataclasses.asdict(unbroken[after - 1][1])))
        resumed = list(islice(stream(source).batches(Position.of(saved)), 40 - after))
        for (batch, position), (expected, at) in zip(resumed, unbroken[after:], strict=True):
            assert position == at and torch.equal(batch.ids, expected.ids)
            assert (batch.answers is None) == (expected.answers is None)
            assert batch.answers is None or torch.equal(batch.answers, expected.answers)


def test_a_mixture_takes_its_share_of_batches_from_the_text(answers: Answers, text) -> None:
    ours = AnswerSource(answers)
    mixed = MixedSource(ours, text, 0.25)
    batches = [batch for batch, _ in islice(stream(mixed).batches(Position()), 80)]
    plain = [batch.answers is None for batch in batches]
    assert plain == [turn % 4 == 3 for turn in range(80)]
    alone = [batch for batch, _ in islice(stream(ours).batches(Position()), 60)]
    assert sequences([b for b in batches if b.answers is not None]) == sequences(alone)
    texts = [batch for batch, _ in islice(stream(text).batches(Position()), 20)]
    assert sequences([b for b in batches if b.answers is None]) == sequences(texts)
    assert sequences(epoch(mixed, held_out=True)) == sequences(epoch(ours, held_out=True))
    assert {tuple(ids) for ids in sequences(epoch(mixed))} > {tuple(ids) for ids in sequences(epoch(ours))}
    for share in (0.0, 1.0):
        with pytest.raises(UsageError, match=rf"mix_share = {share}: give a share between 0 and 1"):
            MixedSource(ours, text, share)


def test_processes_share_the_marks_too(answers: Answers) -> None:
    batch = epoch(AnswerSource(answers))[0]
    parts = [Group(rank, 2).share(batch) for rank in (0, 1)]
    assert torch.equal(torch.cat([part.answers for part in parts]), batch.answers)
    idle = [Group(rank, len(batch.ids) + 1).share(batch) for rank in range(len(batch.ids) + 1)]
    assert sum(not part.mask.any() for part in idle) == 1
    assert all(part.answers is not None and part.answers.shape == part.ids.shape for part in idle)


def test_a_split_without_answers_is_refused(model, tokenizer, tmp_path: Path) -> None:
    one = make_answers(model, tokenizer, prompts(1), few(), tmp_path / "one", name="p.jsonl", quiet=True)
    held = is_held_out(Answered(one[0].ids, one[0].prompt), SHARE)
    with pytest.raises(DataError, match=r"data 'answers to p\.jsonl' has no (training|held-out) document"):
        first_batches(stream(AnswerSource(one), held_out=not held), 10)


def test_exits_learn_from_answers_and_their_run_knows_which(model, answers: Answers, text, tmp_path: Path) -> None:
    backbone, tokenizer = adapt(model), byte_tokenizer()
    settings = TrainSettings(
        max_tokens=900, sequence=SEQUENCE, batch_tokens=256, held_out=SHARE, eval_tokens=100, quiet=True
    )
    mixed = MixedSource(AnswerSource(answers), text, 0.25)
    config = ExitConfig((1,), 2, head="linear")
    exits = train(backbone, tokenizer, mixed, config, settings, tmp_path / "out")
    assert exits.provenance["tokens"] >= 900 and "answers to p" in exits.provenance["data"]
    again = train(backbone, tokenizer, mixed, config, settings, tmp_path / "out")
    assert isinstance(again, Exits) and again.provenance["wall_seconds"] == exits.provenance["wall_seconds"]
    found = identity(backbone, mixed, settings)
    assert found["answers"] == answers.sha256 and found["mix_share"] == 0.25
    assert found["mix_text"]["data"] == text.spec
    other = MixedSource(AnswerSource(answers), text, 0.5)
    with pytest.raises(UsageError, match=r"another training run: .*mix_share is 0\.5 here, and was 0\.25"):
        train(backbone, tokenizer, other, config, settings, tmp_path / "out")
