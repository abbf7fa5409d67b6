"""A set of exits survives save and load, and every damaged, newer or foreign one is refused in words."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding.thresholds import Thresholds
from dynamax_llm.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactMismatchError,
    ArtifactVersionError,
    ExitPlacementError,
    UsageError,
)
from dynamax_llm.exits import files
from dynamax_llm.exits.artifact import MANIFEST, TENSORS, VERSION, Exits
from dynamax_llm.testing import tiny_model
from tests.folders import backbone, copy, exits_folder, make_exits

HEADS = ("linear", "mlp", "transformer", "mamba")


@pytest.mark.parametrize("model_type", ["llama", "mamba2"])
@pytest.mark.parametrize("head", [*HEADS, None])
@pytest.mark.parametrize("readout", ["head", "tail", "lens"])
def test_save_and_load(model_type, head, readout, tmp_path):
    saved = make_exits(model_type, head, readout)
    saved.save(tmp_path)
    loaded = Exits.from_pretrained(tmp_path)
    assert loaded.config == saved.config
    assert (loaded.width, loaded.vocab_size) == (36, 257)
    assert loaded.fingerprint == saved.fingerprint
    assert loaded.provenance == {"model": "tiny"}
    for name in ("heads", "readout_weights"):
        one, two = getattr(saved, name), getattr(loaded, name)
        assert (one is None) == (two is None)
        if one is not None:
            assert not two.training
            assert all(
                torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
            )
    loaded.check_backbone(adapt(backbone(model_type)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, TENSORS]


def test_heads_of_each_exit_are_saved_apart():
    tensors = load_file(exits_folder("llama", "mlp") / TENSORS)
    for name, value in tensors.items():
        if name.endswith(("embed", "up")):
            assert not torch.equal(value[0], value[1]), name


def test_saving_again_replaces(tmp_path):
    make_exits(head="mlp").save(tmp_path)
    make_exits(head="linear").save(tmp_path)
    assert Exits.from_pretrained(tmp_path).config.head == "linear"


def test_untrained_exits_sit_where_they_are_told():
    adapted = adapt(tiny_model("mamba2", layers=8))
    exits = Exits.untrained(adapted)
    assert exits.config.layers == (4, 5, 6, 7)
    assert exits.config.head is None
    assert Exits.untrained(adapted, "1/4,6").config.layers == (2, 6)
    assert Exits.untrained(adapted, ("1/2",), readout="tail", tail_layers=2).config.tail_layers == 2
    with pytest.raises(ExitPlacementError, match="exit '8' lies at depth 8"):
        Exits.untrained(adapted, "8")
    with pytest.raises(UsageError, match="readout 'lens' is learned"):
        Exits.untrained(adapted, readout="lens")


def test_the_judge_is_the_head_or_a_measure():
    exits = make_exits()
    assert exits.estimator() is exits.heads
    assert exits.estimator("entropy").name == "entropy"
    with pytest.raises(UsageError, match=r"have no trained head\. Name a confidence measure: softmax_max"):
        make_exits(head=None).estimator()
    with pytest.raises(UsageError, match="Did you mean 'softmax_margin'"):
        exits.estimator("softmax_margn")


def test_readout_carries_the_lens():
    adapted = adapt(backbone("llama"))
    assert make_exits().readout(adapted).weights is None
    exits = make_exits(readout="lens")
    assert exits.readout(adapted).weights is exits.readout_weights


def refusal(kind, folder) -> str:
    with pytest.raises(kind) as caught:
        Exits.from_pretrained(folder)
    assert type(caught.value) is kind
    return str(caught.value)


def edit(folder, **changes):
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    (folder / MANIFEST).write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))


def test_newer_version(tmp_path):
    folder = copy(exits_folder(), tmp_path / "exits")
    edit(folder, version=VERSION + 1, dynamax="9.9")
    text = refusal(ArtifactVersionError, folder)
    assert f"has format version {VERSION + 1}, written by DYNAMAX 9.9" in text
    assert "pip install --upgrade dynamax-llm" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"format": "dynamax-ex', "not valid JSON"),
        (b"\xff\xfe\x00garbage", "not valid JSON"),
        (b"[]", 'does not say "format": "dynamax-exits"'),
        (b'{"format": "something"}', 'does not say "format": "dynamax-exits"'),
        (b'{"format": "dynamax-exits", "version": "one"}', "its version is 'one'"),
        (b'{"format": "dynamax-exits", "version": 1}', "field 'config' is missing"),
    ],
)
def test_garbled_manifest(content, says, tmp_path):
    folder = copy(exits_folder(), tmp_path / "exits")
    (folder / MANIFEST).write_bytes(content)
    text = refusal(ArtifactCorruptError, folder)
    assert says in text
    assert "Copy the exits again, or train them anew" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers": [2, 9]}, "exit '9' lies at depth 9"),
        ({"layers": [3, 2]}, "are not in order"),
        ({"layers": None}, "its config cannot be used"),
        ({"head": "oracle"}, "unknown head 'oracle'"),
        ({"colour": "blue"}, "colour"),
        ({"n_layers": "five"}, "its config cannot be used"),
    ],
)
def test_config_that_cannot_be(change, says, tmp_path):
    folder = copy(exits_folder(), tmp_path / "exits")
    edit(folder, config=json.loads((folder / MANIFEST).read_text())["config"] | change)
    assert says in refusal(ArtifactCorruptError, folder)


def test_exits_saved_before_there_was_a_choice_of_shortlist(tmp_path):
    folder = copy(exits_folder(), tmp_path / "exits")
    config = json.loads((folder / MANIFEST).read_text())["config"]
    assert config.pop("shortlist") == Exits.from_pretrained(folder).config.shortlist == "pairs"
    edit(folder, config=config)
    assert Exits.from_pretrained(folder).config.shortlist == "top"


def test_missing_field_is_named(tmp_path):
    folder = copy(exits_folder(), tmp_path / "exits")
    edit(folder, fingerprint=None)
    assert "field 'fingerprint' is missing" in refusal(ArtifactCorruptError, folder)


def test_absurd_size_asks_for_no_memory(tmp_path):
    folder = copy(exits_folder(), tmp_path / "exits")
    edit(folder, width=10**9)
    assert "has shape" in refusal(ArtifactCorruptError, folder)


def damage(tmp_path, change):
    folder = copy(exits_folder(), tmp_path / "exits")
    tensors = load_file(folder / TENSORS)
    save_file(change(dict(tensors)), folder / TENSORS)
    return folder


NAME = "heads.bank.in_proj"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_name_the_tensor(bad, tmp_path):
    def change(tensors):
        tensors[NAME][0, 0, 0] = bad
        return tensors

    assert f"the tensor {NAME!r} holds NaN or infinite values" in refusal(
        ArtifactCorruptError, damage(tmp_path, change)
    )


def test_wrong_shape_missing_and_extra_tensors_are_named(tmp_path):
    wrong = damage(tmp_path / "a", lambda tensors: tensors | {NAME: tensors[NAME][:, :3].clone()})
    assert f"the tensor {NAME!r} has shape (2, 3, " in refusal(ArtifactCorruptError, wrong)
    missing = damage(tmp_path / "b", lambda tensors: {k: v for k, v in tensors.items() if k != NAME})
    assert f"the tensor {NAME!r} is missing" in refusal(ArtifactCorruptError, missing)
    extra = damage(tmp_path / "c", lambda tensors: tensors | {"heads.spare": torch.ones(1)})
    assert "holds a tensor 'heads.spare'" in refusal(ArtifactCorruptError, extra)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_tensors(share, tmp_path):
    folder = copy(exits_folder(), tmp_path / "exits")
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: int(len(content) * share)])
    assert "cannot be read" in refusal(ArtifactCorruptError, folder)


def test_one_flipped_bit_and_files_of_two_saves(tmp_path):
    folder = copy(exits_folder(), tmp_path / "exits")
    content = bytearray((folder / TENSORS).read_bytes())
    content[-1] ^= 1
    (folder / TENSORS).write_bytes(content)
    assert "the two belong to different saves" in refusal(ArtifactCorruptError, folder)


def test_not_a_folder_of_exits(tmp_path):
    assert "holds no exits: exits.json and exits.safetensors not found" in refusal(ArtifactError, tmp_path)
    (tmp_path / "file").write_text("x")
    assert "it is a file, not a folder" in refusal(ArtifactError, tmp_path / "file")
    assert "it is no folder, nor a hub id" in refusal(ArtifactError, "./no/such/exits")
    assert "nothing of this name could be fetched" in refusal(ArtifactError, "somebody/exits")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (("mamba2", {}), "the model type is mamba2, not llama"),
        (("llama", {"layers": 7}), "the number of layers is 7, not 5"),
        (("llama", {"seed": 1}), "the weights are not (another checkpoint"),
        (("llama", {"hidden_size": 48}), "the width is 48, not 36"),
    ],
)
def test_another_backbone(other, says):
    model_type, changes = other
    stranger = adapt(tiny_model(model_type, **{"vocab": 257, **changes}))
    with pytest.raises(ArtifactMismatchError) as caught:
        Exits.from_pretrained(exits_folder()).check_backbone(stranger)
    assert says in str(caught.value)
    assert "Load the backbone they were trained on (tiny), or train exits for this one: dynamax train" in str(
        caught.value
    )


def test_a_model_that_passed_is_not_hashed_again(monkeypatch):
    exits, adapted = make_exits(), adapt(backbone("llama"))
    exits.check_backbone(adapted)
    monkeypatch.setattr("dynamax_llm.exits.artifact.fingerprint", lambda model: pytest.fail("hashed again"))
    exits.check_backbone(adapted)


def test_save_refuses_folders_that_hold_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"holds something else \(thesis\.tex\)"):
        make_exits(head=None).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_save_refuses_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("x")
    for target in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(ArtifactError, match="cannot write to") as caught:
            make_exits(head=None).save(target)
        assert str(target) in str(caught.value)


def test_a_save_that_dies_leaves_the_old_files_and_nothing_half_written(tmp_path, monkeypatch):
    make_exits(head="linear").save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        make_exits(head="mlp").save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert Exits.from_pretrained(tmp_path).config.head == "linear"


def test_disturbance_survives_and_raises_one_threshold_for_all(tmp_path):
    """One threshold is net of what leaving disturbs; several are the confidence itself; 0 and "never" stay."""
    exits = dataclasses.replace(make_exits("llama", None, "head"), drift_penalty={"propagate": (0.3, 0.05)})
    exits.save(tmp_path / "exits")
    again = Exits.from_pretrained(tmp_path / "exits")
    assert again.drift_penalty == {"propagate": (0.3, 0.05)}
    parse = functools.partial(Thresholds.parse, n_exits=2, drift_penalty=again.drift_penalty["propagate"])
    assert parse(0.9).values == (None, pytest.approx(0.95))
    assert parse(0.5).values == (pytest.approx(0.8), pytest.approx(0.55))
    assert parse([0.9, 0.9]).values == (0.9, 0.9)
    assert (parse(0.0).values, parse("never").values) == ((0.0, 0.0), (None, None))
    manifest = json.loads((tmp_path / "exits" / "exits.json").read_text())
    manifest["drift_penalty"]["propagate"] = [0.3]
    (tmp_path / "exits" / "exits.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactCorruptError, match="drift penalty under 'propagate' is not 2 numbers"):
        Exits.from_pretrained(tmp_path / "exits")
