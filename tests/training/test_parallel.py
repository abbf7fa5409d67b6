"""Two processes end where one does: same batches, sums in place of wholes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from dynamax_llm.errors import UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.training.data import Batch, find_source
from dynamax_llm.training.parallel import Group
from dynamax_llm.training.trainer import train_many
from tests.training.test_trainer import CONFIG, SETTINGS

BASE = dataclasses.replace(SETTINGS, max_tokens=2500, eval_every=1000)
CONFIGS = {
    "head": {kind: dataclasses.replace(CONFIG, head=kind) for kind in ("mlp", "mamba")},
    "lens": {"mamba": dataclasses.replace(CONFIG, readout="lens")},
}
SCRIPT = """
import sys
import torch
from dynamax_llm.backbones import adapt
from dynamax_llm.testing import tiny_model
from dynamax_llm.training import trainer
from dynamax_llm.training.data import find_source
from tests.training.conftest import ByteTokenizer
from tests.training.test_parallel import BASE, CONFIGS

torch.set_num_threads(1)
source, out = find_source(sys.argv[1]), sys.argv[2]
original = trainer._Run._step


def step(self, batch):
    if self.steps == 3 and not resumed:
        raise KeyboardInterrupt
    original(self, batch)


trainer._Run._step = step
for name, configs in CONFIGS.items():
    backbone = adapt(tiny_model("mistral"))
    for resumed in (name == "lens", True):
        try:
            trainer.train_many(backbone, ByteTokenizer(), source, configs, BASE, f"{out}/{name}")
        except KeyboardInterrupt:
            print("interrupted")
"""


@pytest.fixture
def two(corpus: Path, tmp_path: Path) -> Path:
    """What two processes made, one run interrupted and started again on the way."""
    root, out = Path(__file__).parents[2], tmp_path / "two"
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'src'}", "OMP_NUM_THREADS": "1"}
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    command = [sys.executable, *launch, str(script), str(corpus), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("interrupted") == 2
    return out


def test_two_processes_end_where_one_does(backbone, corpus: Path, tokenizer, tmp_path: Path, two: Path) -> None:
    for name, configs in CONFIGS.items():
        alone = train_many(backbone("mistral"), tokenizer, find_source(corpus), configs, BASE, tmp_path / "one" / name)
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
            assert numbers(found.provenance["lens_divergence"]) == pytest.approx(
                numbers(expected.provenance["lens_divergence"]), abs=1e-4
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
    with pytest.raises(UsageError, match="a step of 4096 tokens holds 1 chunks of 4096, too few for 2 processes.*8192"):
        Group(0, 2).check(4096, 4096)
    assert json.dumps(dataclasses.asdict(Group(1, 2))) == '{"rank": 1, "size": 2}'
