"""What every engine promises of its sessions: the same cases on the eager engine and on the GPU engine, and on both
what the eager engine gives for one row.

On a machine without a GPU the latter runs in Triton's interpreter.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit, RowSettings, Session, Thresholds
from dynamax_llm.errors import UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.testing import random_ids
from tests.engines.test_cuda_engine import DEVICE, small

ENGINES = ("eager", "cuda")


def cases(*named: tuple[str, str]) -> list[tuple[str, str, str]]:
    """The same cases, family and policy, on every engine. Interpreted kernels are slow, so each test has a few."""
    return [(engine, *case) for engine in ENGINES for case in named]


NEW = 5


def early_exit(model: PreTrainedModel, engine: str, policy: str, **settings: object) -> EarlyExit:
    """Exits that leave at some tokens; the estimator is a recurrent head, so that exits have a state."""
    torch.manual_seed(5)
    backbone = adapt(model)
    config = ExitConfig((1, 2), 3, "mamba", ("hidden",), width=16)
    heads = ExitHeads(config, backbone.width).to(DEVICE)
    with torch.no_grad():
        heads.bank.out.normal_(std=2.0)
    exits = Exits.of(backbone, config, heads)
    return EarlyExit(exits, threshold=[0.55, 0.5], policy=policy, window=3, engine=engine, **settings)


def prompt(seed: int, length: int = 5) -> Tensor:
    return random_ids(1, length, vocab=19, seed=seed).to(DEVICE)


def run(session: Session, until: Callable[[], bool] | None = None) -> None:
    while session.live and not (until and until()):
        session.step()


@functools.cache
def alone(family: str, policy: str, *which: int) -> tuple[list[int], list[int]]:
    """Tokens and exits of one prompt in a session of its own, on the eager engine: what every engine must give."""
    model = small(family)
    session = early_exit(model, "eager", policy).open(model)
    slot = session.admit(prompt(*which), RowSettings(NEW))
    run(session)
    row = session.release(slot)
    session.close()
    return row.tokens, row.exits


def test_some_tokens_leave_and_some_do_not() -> None:
    """The exits of this suite decide something."""
    exits = [e for seed in range(3) for e in alone("mistral", "propagate", seed)[1][1:]]
    assert len(set(exits)) > 1


@pytest.mark.parametrize(("engine", "family", "policy"), cases(("mistral", "propagate"), ("mamba2", "verify")))
def test_interleaved_sessions_do_not_touch_each_other(engine: str, family: str, policy: str) -> None:
    """Law 11, and the defect it was written for: one plan, two sessions, steps in turns."""
    model = small(family)
    early = early_exit(model, engine, policy)
    sessions = [early.open(model) for _ in range(2)]
    slots = [session.admit(prompt(seed), RowSettings(NEW)) for seed, session in enumerate(sessions)]
    while any(session.live for session in sessions):
        for session in sessions:
            session.step()
    for seed, (session, slot) in enumerate(zip(sessions, slots, strict=True)):
        row = session.release(slot)
        assert (row.tokens, row.exits) == alone(family, policy, seed)
        session.close()


@pytest.mark.parametrize(("engine", "family", "policy"), cases(("mistral", "verify"), ("mamba2", "defer")))
def test_rows_enter_late_and_leave_early(engine: str, family: str, policy: str) -> None:
    """Law 6: a row equals the row alone, whatever the others do, whenever it enters or leaves."""
    model = small(family)
    session = early_exit(model, engine, policy).open(model, slots=2)
    first = session.admit(prompt(0), RowSettings(NEW))
    session.step()
    session.step()
    second = session.admit(prompt(1, 9), RowSettings(NEW))  # longer than what the first row has so far
    with pytest.raises(UsageError, match="all 2 slots are taken"):
        session.admit(prompt(2), RowSettings(NEW))
    session.step()
    gone = session.release(first)  # before its end
    third = session.admit(prompt(2, 3), RowSettings(NEW))
    assert third == first
    run(session)
    for slot, which in ((second, (1, 9)), (third, (2, 3))):
        row = session.release(slot)
        assert (row.tokens, row.exits) == alone(family, policy, *which)
    tokens, exits = alone(family, policy, 0)
    assert gone.tokens == tokens[: len(gone.tokens)] and gone.exits == exits[: len(gone.exits)]
    session.close()


@pytest.mark.parametrize(("engine", "family", "policy"), cases(("mistral", "propagate")))
def test_rows_have_thresholds_and_ends_of_their_own(engine: str, family: str, policy: str) -> None:
    model = small(family)
    session = early_exit(model, engine, policy).open(model, slots=2)
    never = session.admit(prompt(0), RowSettings(3, thresholds=Thresholds((None, None))))
    always = session.admit(prompt(0), RowSettings(5, thresholds=Thresholds((0.0, 0.0))))
    run(session)
    assert session.rows[never].exits == [2, 2, 2]
    assert session.rows[always].exits == [2, 0, 0, 0, 0]
    expected = model.generate(prompt(0), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert session.rows[never].tokens == expected[0, 5:].tolist()
    session.close()


@pytest.mark.parametrize(("engine", "family", "policy"), cases(("mamba2", "verify")))
def test_an_exception_in_the_middle_leaves_the_next_generation_right(engine: str, family: str, policy: str) -> None:
    """Also Ctrl-C, from a callback that is called between steps."""
    model, ids = small(family), prompt(0)
    early = early_exit(model, engine, policy)
    want = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, custom_generate=early_exit(model, "eager", policy), **want)
    for error in (ValueError, KeyboardInterrupt):

        def stop(tokens: Tensor, layers: Tensor, error: type[BaseException] = error) -> None:
            raise error

        with pytest.raises(error):
            model.generate(ids, custom_generate=early, on_token=stop, **want)
        again = model.generate(ids, custom_generate=early, **want)
        assert torch.equal(again.sequences, expected.sequences)
        assert torch.equal(again.exit_layers, expected.exit_layers)


@pytest.mark.parametrize(("engine", "family", "policy"), cases(("mistral", "propagate")))
def test_two_threads_get_what_one_gets(engine: str, family: str, policy: str) -> None:
    model = small(family)
    early = early_exit(model, engine, policy)
    want = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    eager = early_exit(model, "eager", policy)
    expected = [model.generate(prompt(seed), custom_generate=eager, **want).sequences for seed in range(2)]
    found: dict[int, Tensor] = {}

    def serve(seed: int) -> None:
        found[seed] = model.generate(prompt(seed), custom_generate=early, **want).sequences

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(2))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_session_refuses(engine: str) -> None:
    model = small("mistral")
    early = early_exit(model, engine, "propagate")
    with pytest.raises(UsageError, match="slots 0"):
        early.open(model, slots=0)
    session = early.open(model, slots=1)
    with pytest.raises(UsageError, match="slot 0 holds no row"):
        session.release(0)
    with pytest.raises(UsageError, match="max_new_tokens 0"):
        session.admit(prompt(0), RowSettings(0))
    with pytest.raises(UsageError, match="give token ids"):
        session.admit(prompt(0)[0], RowSettings(1))
    session.close()
