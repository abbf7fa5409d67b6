"""The stages from Python: a model, a tokenizer and plain strings."""

from __future__ import annotations

import copy

import pytest
import torch

import dynamax_llm as dx
from dynamax_llm.backbones import adapt
from dynamax_llm.testing import zero_tail
from dynamax_llm.text.sources import find_source
from tests.folders import backbone, byte_tokenizer, corpus

TRAIN = dx.TrainSettings(max_tokens=2000, sequence=64, batch_tokens=256, held_out=0.2, quiet=True)


def test_train_takes_a_model_and_plain_strings(tmp_path):
    model = backbone("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exits = dx.train(
        model, byte_tokenizer(), str(corpus()), exits="2/5,3", head="linear", settings=TRAIN, out=tmp_path / "e"
    )
    assert (exits.config.layers, exits.config.head) == ((2, 3), "linear")
    assert dx.Exits.from_pretrained(str(tmp_path / "e")).config == exits.config
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(dx.errors.ExitPlacementError, match="'9'"):
        dx.train(model, byte_tokenizer(), str(corpus()), exits="9", out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_scan_takes_a_model_or_what_was_made_of_it():
    settings = dx.ScanSettings(tokens=600, sequence=64, batch_tokens=512, candidates=0, quiet=True)
    model, tokenizer = backbone("llama"), byte_tokenizer()
    plain = dx.scan(model, tokenizer, str(corpus()), "2,3", settings)
    made = dx.scan(adapt(model), tokenizer, find_source(str(corpus())), "2,3", settings)
    assert plain.exits == (2, 3)
    assert plain.layers == made.layers


def test_calibrate_takes_a_folder_of_exits(tmp_path):
    model, data = copy.deepcopy(backbone("llama")), str(corpus())
    zero_tail(model, 2)  # so that leaving at the second layer is right
    dx.Exits.untrained(adapt(model), (2, 3)).save(tmp_path / "exits")
    settings = dx.CalibrationSettings(prompts=40, prompt_tokens=6, new_tokens=6)
    how = {"measure": "entropy", "settings": settings}
    promise = dx.calibrate(model, byte_tokenizer(), tmp_path / "exits", data, "agreement>=0.8", **how)
    assert (promise.text, promise.policy, promise.data["source"]) == ("agreement>=0.8", "propagate", data)


def test_tune_takes_a_model_and_plain_strings(tmp_path):
    settings = dx.TuneSettings(
        method="full", max_tokens=400, sequence=48, batch_tokens=192, eval_tokens=100, quiet=True
    )
    tuned = dx.tune(
        backbone("llama"), byte_tokenizer(), str(corpus()), exits="all", settings=settings, out=tmp_path / "tuned"
    )
    assert tuned.record["layers"] == [1, 2, 3, 4]
    assert (tmp_path / "tuned" / "config.json").is_file()
