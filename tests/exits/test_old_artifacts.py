"""Artifacts that earlier versions wrote load, decide the same, and promise what they promised."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dynamax_llm.backbones.loading import REFERENCE_FOLDER
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.errors import ArtifactCorruptError
from dynamax_llm.exits.artifact import MANIFEST, VERSION, Exits
from dynamax_llm.exits.config import ExitConfig

ARTIFACTS = Path(__file__).resolve().parents[1] / "data" / "artifacts"
FOLDERS = sorted(path.with_suffix("") for path in ARTIFACTS.glob("*/*.json"))
CASES = [
    pytest.param(folder, key, id=f"{folder.parent.name}-{folder.name}-{key}")
    for folder in FOLDERS
    for key in json.loads(folder.with_suffix(".json").read_text())["decoded"]
]


def recorded(folder: Path) -> dict:
    return json.loads(folder.with_suffix(".json").read_text())


def model_of(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder.parent / recorded(folder)["model"])


def decide(exits: Exits, model: PreTrainedModel, key: str, ids: torch.Tensor) -> dict[str, list[list[int]]]:
    """Tokens and exit indices of 16 new tokens under "policy@threshold", or under the promise."""
    measure = None if exits.config.head else "softmax_max"
    if key == "promise":
        early = EarlyExit(exits, promise=exits.promises[0].text)
    else:
        policy, _, threshold = key.partition("@")
        early = EarlyExit(exits, policy=policy, threshold=float(threshold), measure=measure)
    out = model.generate(
        ids, custom_generate=early, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return {"tokens": out.sequences[:, ids.shape[1] :].tolist(), "exit_index": out.trace.exit_index.tolist()}


@pytest.mark.parametrize(("folder", "key"), CASES)
def test_old_exits_decide_the_same(folder: Path, key: str, tmp_path) -> None:
    wanted, model = recorded(folder), model_of(folder)
    old = Exits.from_pretrained(folder)
    ids = torch.tensor(wanted["ids"])
    found = decide(old, model, key, ids)
    assert found == wanted["decoded"][key]
    old.save(tmp_path)
    again = Exits.from_pretrained(tmp_path)
    assert json.loads((tmp_path / MANIFEST).read_text())["version"] == VERSION
    assert (again.config, again.drift_penalty, again.promises) == (old.config, old.drift_penalty, old.promises)
    assert decide(again, model, key, ids) == found


def test_every_recorded_kind_of_head_and_readout_is_there() -> None:
    configs = [Exits.from_pretrained(folder).config for folder in FOLDERS]
    assert {config.head for config in configs} == {None, "linear", "mlp", "transformer", "mamba"}
    assert {config.readout for config in configs} == {"head", "tail", "lens"}
    assert all("signals" not in config.inputs for config in configs)


def test_exits_that_ship_with_the_package_load_and_are_written_anew(tmp_path) -> None:
    folders = sorted(path.parent for path in REFERENCE_FOLDER.rglob(MANIFEST))
    assert folders
    for number, folder in enumerate(folders):
        written, exits = json.loads((folder / MANIFEST).read_text()), Exits.from_pretrained(folder)
        assert ExitConfig.from_json(written["config"]) == exits.config
        exits.save(tmp_path / str(number))
        assert Exits.from_pretrained(tmp_path / str(number)).config == exits.config


@pytest.mark.parametrize(
    "edit",
    [
        lambda promise: promise.update(thresholds=[None, 0.6, 0.6]),
        lambda promise: promise.update(estimate=0.99),
        lambda promise: promise["evidence"][-1].update(kept=False),
        lambda promise: promise.update(evidence=[]),
        lambda promise: promise["evidence"][-1].pop("thresholds"),
    ],
)
def test_an_old_promise_is_held_against_its_own_evidence(edit, tmp_path) -> None:
    folder = Path(shutil.copytree(ARTIFACTS / "0.1.0" / "llama-linear-head", tmp_path / "exits"))
    manifest = json.loads((folder / MANIFEST).read_text())
    edit(manifest["promises"][0])
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactCorruptError, match=r"promise 'agreement>=0\.9'.*calibrate again"):
        Exits.from_pretrained(folder)
