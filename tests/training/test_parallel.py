"""Two processes end where one does: same batches, sums in place of wholes."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from torch import distributed

from dynamax_llm.backbones import adapt
from dynamax_llm.errors import UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.testing import tiny_model
from dynamax_llm.text.batches import Batch, find_source
from dynamax_llm.training.parallel import Group
from dynamax_llm.training.phases import Phases
from dynamax_llm.training.trainer import train_many
from tests.training.conftest import ByteTokenizer
from tests.training.test_trainer import CONFIG, SETTINGS

BASE = dataclasses.replace(SETTINGS, max_tokens=2500, eval_every=1000)
CONFIGS = {
    "head": {kind: dataclasses.replace(CONFIG, head=kind) for kind in ("mlp", "mamba")},
    "lens": {"mamba": dataclasses.replace(CONFIG, readout="lens")},
}
#: What the second process does; the first one is the test's own.
SECOND = """
import sys
from pathlib import Path
from tests.training.test_parallel import both
both(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def both(corpus: Path, out: Path) -> None:
    """One process's part: every run, the first of them interrupted in its fourth step and started again."""
    torch.set_num_threads(1)
    original = Phases.step

    def step(self, batch, counters) -> None:
        if counters.steps == 3:
            raise KeyboardInterrupt
        original(self, batch, counters)

    for name, configs in CONFIGS.items():
        arguments = (adapt(tiny_model("mistral")), ByteTokenizer(), find_source(corpus), configs, BASE, out / name)
        if name == "head":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Phases, "step", step)
                with pytest.raises(KeyboardInterrupt):
                    train_many(*arguments)
            distributed.barrier()
        train_many(*arguments)
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture
def two(corpus: Path, tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """What two processes made; the environment is the one that ``accelerate launch`` gives each of them."""
    root, out = Path(__file__).parents[2], tmp_path / "two"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **group, "PYTHONPATH": f"{root}:{root / 'src'}", "RANK": "1", "LOCAL_RANK": "1"}
    second = subprocess.Popen([sys.executable, "-c", SECOND, str(corpus), str(out)], env=environment)
    try:
        for name, value in {**group, "RANK": "0", "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        both(corpus, out)
        assert second.wait(timeout=30) == 0
        yield out
    finally:
        second.kill()
        PartialState._reset_state()


def test_two_processes_end_where_one_does(
    backbone, corpus: Path, tokenizer, tmp_path: Path, two: Path, monkeypatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    for name, configs in CONFIGS.items():
        alone = train_many(
            backbone("mistral"), ByteTokenizer(), find_source(corpus), configs, BASE, tmp_path / "one" / name
        )
        for kind, expected in alone.items():
            found = Exits.from_pretrained(two / name / kind)
            assert found.provenance["processes"] == 2
            assert found.provenance["tokens"] == expected.provenance["tokens"]
            assert found.provenance["steps"] == expected.provenance["steps"]
            for key, value in expected.heads.state_dict().items():
                torch.testing.assert_close(found.heads.state_dict()[key], value, atol=2e-4, rtol=2e-4, msg=key)
            assert numbers(found.provenance["history"]) == pytest.approx(
                numbers(expected.provenance["history"]), abs=2e-3
            )
            assert numbers(found.provenance["readout_losses"]) == pytest.approx(
                numbers(expected.provenance["readout_losses"]), abs=1e-4
            )


def numbers(value: object) -> list[float]:
    """Every number in a JSON value, in order."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


def test_shares_are_the_whole_batch() -> None:
    for count in (1, 2, 5, 8):
        batch = Batch(torch.arange(count * 3).view(count, 3) + 1, torch.ones(count, 3, dtype=torch.bool))
        shares = [Group(rank, 3).share(batch) for rank in range(3)]
        counted = [row for share in shares for row, mask in zip(share.ids.tolist(), share.mask, strict=True) if mask[0]]
        assert counted == batch.ids.tolist()
        assert all(len(share.ids) >= 1 for share in shares)
        assert max(len(share.ids) for share in shares) <= -(-count // 3)


def test_too_small_a_batch_is_refused() -> None:
    Group(0, 2).check(64, 128)
    with pytest.raises(UsageError, match=r"holds 1 chunks of 4096, too few for 2 processes.*8192"):
        Group(0, 2).check(4096, 4096)
    assert [Group(rank, 2).rows(3) for rank in range(2)] == [slice(0, 1), slice(1, 3)]
