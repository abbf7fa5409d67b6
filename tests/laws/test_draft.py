"""The lossless law: whatever a draft proposes, verified text is plain ``generate``'s; its state is that of the text."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import Counter

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.decoding.rows import RowSettings
from dynamax_llm.decoding.thresholds import Thresholds
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.readouts.head import HeadReadout
from dynamax_llm.testing import TINY, random_ids, tiny_model
from tests.drafting import ScriptedDraft, draft_exits, ended_rows_known
from tests.laws.conftest import left_padding

#: Draws per family: over 300 in all.
DRAWS = 22
V = 61


@functools.cache
def backbone_of(family: str) -> Backbone:
    return adapt(tiny_model(family, layers=3, vocab=V, seed=3))


class StopAfter(StoppingCriteria):
    """A stop string of two tokens, as Hugging Face's own criterion sees it: the end of the row's text."""

    def __init__(self, pair: list[int]) -> None:
        self.pair = torch.tensor(pair)

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -2:] == self.pair).all(1)


def draw(rng: random.Random, number: int) -> dict:
    """A random request, and the draft's script; some are made long and drafted well, with and without an
    end inside a draft, and some have no room for a draft."""
    batch, prompt = rng.randint(1, 3), rng.choice((4, 7))
    drawn = {
        "block": rng.choice(("transformer", "mamba")),
        "vocabulary": rng.choice((0, 0, 40)),
        "batch": batch,
        "prompt": prompt,
        "pads": [rng.choice((0, 0, 1, 2)) for _ in range(batch)],
        "new": rng.choice((1, 2, 5, 9)),
        "window": rng.choice((1, 2, 4, 8, 16, 40)),
        "honest": rng.choice((0.0, 0.6, 0.9, 1.0)),
        "threshold": rng.choice((0.0, 0.0, 0.5, 0.8, "never")),
        "ends": rng.choice((None, None, "token", "string")),
        "processors": {
            **rng.choice(({}, {}, {"repetition_penalty": 1.3})),
            **rng.choice(({}, {}, {"no_repeat_ngram_size": 2})),
            **rng.choice(({}, {}, {"min_new_tokens": 3})),
        },
    }
    if number % 4 < 2:
        ends = "token" if number % 4 else None
        drawn |= {"honest": 1.0, "threshold": 0.0, "vocabulary": 0, "new": 10, "window": rng.choice((7, 16))}
        drawn |= {"ends": ends, "processors": {}}
    elif number % 4 == 2:
        drawn |= {"honest": 0.3, "threshold": 0.0, "window": 4, "vocabulary": 0, "new": 6, "ends": None}
    elif number % 8 == 3:
        drawn |= {"window": 1, "threshold": 0.0, "new": 5}
    return drawn


def plain(backbone: Backbone, drawn: dict, rng: random.Random) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """Prompts, the request, and the text of plain ``generate``."""
    ids = random_ids(drawn["batch"], drawn["prompt"], seed=rng.randrange(10_000))
    mask = (torch.arange(drawn["prompt"]) >= torch.tensor(drawn["pads"]).unsqueeze(1)).long()
    request = {"attention_mask": mask, "do_sample": False, "max_new_tokens": drawn["new"], "pad_token_id": 0}
    request |= {"eos_token_id": None, **drawn["processors"]}
    if drawn["ends"]:
        if "min_new_tokens" in request:
            request["eos_token_id"] = V - 1  # a minimum length asks for one; seldom said
        free = backbone.model.generate(ids, **request)
        place = min(drawn["prompt"] + drawn["new"] // 2, free.shape[1] - 1)
        if drawn["ends"] == "token":
            request["eos_token_id"] = int(free[0, place])
        else:
            pair = free[0, place - 1 : place + 1].tolist()
            request["stopping_criteria"] = StoppingCriteriaList([StopAfter(pair)])
    elif "min_new_tokens" in request:
        del request["min_new_tokens"]
    return ids, request, backbone.model.generate(ids, **request)


def texts_of(sequences: torch.Tensor, drawn: dict, request: dict) -> list[list[int]]:
    """Every row's own tokens, without pads, up to its end."""
    texts, eos, first = [], request["eos_token_id"], drawn["prompt"]
    criteria = request.get("stopping_criteria", ())
    for row, pads in zip(sequences, drawn["pads"], strict=True):
        end = len(row)
        for place in range(first, len(row)):
            stops = any(bool(each(row[None, : place + 1], None)) for each in criteria)
            if int(row[place]) == eos or stops:
                end = place + 1
                break
        texts.append(row[pads:end].tolist())
    return texts


@pytest.mark.parametrize("family", sorted(TINY))
def test_drafted_text_is_generates(family: str) -> None:
    """In float32, token for token; and after every window the draft's state is that of the whole text read at once."""
    seen: Counter[str] = Counter()
    for number in range(DRAWS):
        rng = random.Random(f"{family} {number}")
        drawn = draw(rng, number)
        backbone = backbone_of(family)
        ids, request, expected = plain(backbone, drawn, rng)
        exits = draft_exits(backbone, drawn["block"], drawn["vocabulary"], seed=number)
        texts = texts_of(expected, drawn, request)
        readout = ScriptedDraft(backbone, exits, texts, drawn["window"])
        readout.script(rng, drawn["honest"])
        exits.readout = lambda backbone, readout=readout: readout  # type: ignore[method-assign]
        early = EarlyExit(
            exits,
            measure="softmax_max",
            threshold=drawn["threshold"],
            policy="verify",
            adaptive=False,
            window=drawn["window"],
        )
        with ended_rows_known():
            out = backbone.model.generate(ids, custom_generate=early, **request)
        for row, text in enumerate(texts):
            start = drawn["pads"][row]
            assert out.sequences[row, start : start + len(text)].tolist() == text, (family, number)
        if request["eos_token_id"] is not None or "stopping_criteria" not in request:
            assert out.sequences.tolist() == expected.tolist(), (family, number)
        found = out.verification
        assert found.drafted == found.accepted + found.corrected + found.rolled_back
        if drawn["threshold"] == "never":
            assert found.drafted == 0
        seen += readout.seen
        seen["accepted"] += found.accepted
        seen["corrected"] += found.corrected
        for row, text in enumerate(texts):
            length = len(text) + drawn["pads"][row] - drawn["prompt"]
            seen["ends within a draft"] += length < drawn["new"] and int(out.trace.exit_index[row, length - 1]) == 0
    few = {"states": 40, "accepted": 60, "corrected": 10, "long chains": 1, "early rejections": 2, "full windows": 3}
    few |= {"rounds without a draft": 1, "ends within a draft": 2}
    assert all(seen[name] >= count for name, count in few.items()), seen


class Bigram(HeadReadout):
    """A draft without a state and without taps: final norm and LM head on the embedding."""

    drafts = True


@pytest.mark.parametrize("family", ["llama", "mamba2", "falcon_h1"])
def test_a_draft_without_a_state_begins_a_chain_in_every_window(family: str) -> None:
    """Its chain may be as long as its proposals are likely, however unlikely those of earlier windows were."""
    backbone = backbone_of(family)
    exits = Exits.untrained(backbone, (1,))
    exits.config = dataclasses.replace(exits.config, layers=(0,))
    exits.readout = lambda backbone: Bigram(backbone, exits.config)  # type: ignore[method-assign]
    early = EarlyExit(exits, measure="softmax_max", threshold=0.01, policy="verify", adaptive=False, window=6)
    ids = random_ids(2, 6, seed=4)
    request = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None}
    out = backbone.model.generate(ids, custom_generate=early, **request)
    assert out.sequences.tolist() == backbone.model.generate(ids, **request).tolist()
    found = out.verification
    assert found.drafted > 3.5 * found.windows  # of two rows: chains of about two, to the end


def greedy(backbone: Backbone, ids: torch.Tensor, custom=None, new: int = 12, **options):
    extra = {} if custom is None else {"custom_generate": custom}
    request = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, "eos_token_id": None, **options}
    return backbone.model.generate(ids, **request, **extra)


@pytest.mark.parametrize("block", ["transformer", "mamba"])
@pytest.mark.parametrize("family", ["llama", "mamba2", "jamba"])
def test_a_draft_with_random_weights_is_lossless(family: str, block: str) -> None:
    backbone = backbone_of(family)
    ids = random_ids(3, 6, seed=2)
    mask = left_padding(3, 6)
    expected = greedy(backbone, ids, attention_mask=mask)
    for vocabulary, threshold, window in ((0, 0.0, 5), (30, 0.05, 8)):
        exits = draft_exits(backbone, block, vocabulary, seed=vocabulary)
        early = EarlyExit(
            exits, measure="softmax_max", threshold=threshold, policy="verify", adaptive=False, window=window
        )
        out = greedy(backbone, ids, early, attention_mask=mask)
        assert out.sequences.tolist() == expected.tolist()
        assert out.verification.drafted > 20 and out.verification.corrected > 5
        assert out.trace.exit_layers.max() == backbone.n_layers


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_rows_of_a_session_come_and_go(family: str) -> None:
    """A row that enters while others are under way has the state of its own text, and every row its own tokens."""
    backbone = backbone_of(family)
    prompts = [random_ids(1, length, seed=length) for length in (5, 9, 3)]
    new = (14, 6, 9)
    expected = [greedy(backbone, ids, new=count)[0].tolist() for ids, count in zip(prompts, new, strict=True)]
    early = EarlyExit(
        draft_exits(backbone), measure="softmax_max", threshold=0.0, policy="verify", adaptive=False, window=4
    )
    session = early.open(backbone.model, slots=2)
    waiting, found = [0, 1, 2], {}
    slots: dict[int, int] = {}
    while waiting or slots:
        while waiting and len(slots) < 2:
            number = waiting.pop(0)
            slots[session.admit(prompts[number], RowSettings(new[number]))] = number
        session.step()
        for slot in [slot for slot in slots if not session.is_live(session.rows[slot])]:
            found[slots.pop(slot)] = session.release(slot).ids[0].tolist()
    assert [found[number] for number in range(3)] == expected
    assert session.verification.drafted > 20


def scripted(
    backbone: Backbone, ids: torch.Tensor, window: int, new: int, **request
) -> tuple[EarlyExit, ScriptedDraft]:
    """An honest and sure draft for these prompts."""
    texts = greedy(backbone, ids, new=new, **request).tolist()
    exits = draft_exits(backbone)
    readout = ScriptedDraft(backbone, exits, texts, window)
    exits.readout = lambda backbone: readout  # type: ignore[method-assign]
    return EarlyExit(
        exits, measure="softmax_max", threshold=0.5, policy="verify", adaptive=False, window=window
    ), readout


def test_a_row_that_has_ended_does_not_shorten_the_chains_of_others() -> None:
    backbone, ids = backbone_of("llama"), random_ids(2, 6, seed=8)
    free = greedy(backbone, ids, new=24)
    eos = next(token for token in free[0, 8:].tolist() if token not in free[1].tolist())
    early, readout = scripted(backbone, ids, 8, 24)
    readout.texts[0] = readout.texts[0][: readout.texts[0].index(eos, 6) + 1]
    out = greedy(backbone, ids, early, new=24, eos_token_id=eos)
    assert out.sequences[1].tolist() == free[1].tolist()
    assert out.verification.acceptance_rate == 1.0
    # 23 tokens after the prompt's own: windows of 8, however early the other row ended.
    assert out.verification.windows == 3


def test_a_row_that_may_never_leave_is_not_drafted_for() -> None:
    backbone, ids = backbone_of("llama"), random_ids(2, 6, seed=8)
    early = EarlyExit(
        draft_exits(backbone), measure="softmax_max", threshold=0.0, policy="verify", adaptive=False, window=4
    )
    session = early.open(backbone.model, slots=2)
    session.admit(ids[:1], RowSettings(8))
    session.admit(ids[1:], RowSettings(8, thresholds=Thresholds((None,))))
    while session.live:
        session.step()
    assert [row.ids[0].tolist() for row in session.rows] == greedy(backbone, ids, new=8).tolist()
    assert set(session.rows[1].exits) == {1} and session.verification.drafted == 0


def test_costs_of_a_draft_are_counted() -> None:
    """Three right proposals and a deep token a window: the layers run once for each token, the draft beside them."""
    backbone, ids = backbone_of("llama"), random_ids(1, 6, seed=8)
    early, readout = scripted(backbone, ids, 4, 13)
    out = greedy(backbone, ids, early, new=13)
    full, found = backbone.costs().total, out.trace
    assert found.exit_index[0].tolist() == [1] + [0, 0, 0, 1] * 3
    assert found.stats.passes == 3 * backbone.n_layers and found.pass_reduction == pytest.approx(0.75)
    proposals = readout.macs(0) * 9 + readout.update_macs(0) * 13
    assert found.counted_reduction == pytest.approx(-proposals / (13 * full))
    assert found.mean_depth == pytest.approx(4 / 13) and found.histogram == {0: 9, 3: 4}
