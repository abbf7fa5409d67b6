"""Loading a backbone: what comes back, and what each refusal says."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from dynamax_llm.backbones import loading
from dynamax_llm.backbones.loading import load, peek, shipped_exits
from dynamax_llm.errors import BackboneError, UnsupportedModelError, UsageError
from tests.folders import END, copy, model_folder


@pytest.mark.parametrize("model_type", ["llama", "mistral", "mamba2"])
def test_a_folder_loads_in_eval_mode_with_left_padding(model_type):
    model, tokenizer = load(model_folder(model_type))
    assert model.config.model_type == model_type
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float32
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", END)
    assert model.generation_config.pad_token_id == 0
    assert tokenizer(["a", "abc"], padding=True).attention_mask == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), (torch.float16, torch.float16)])
def test_dtype_by_name_or_object(dtype, expected):
    assert load(model_folder(), dtype=dtype)[0].dtype == expected


def test_auto_is_float32_on_a_cpu_whatever_is_stored(tmp_path):
    folder = copy(model_folder(), tmp_path / "half")
    load(folder)[0].to(torch.bfloat16).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert load(folder)[0].dtype == torch.float32
    assert load(folder, device_map="cpu")[0].dtype == torch.float32


def test_names_of_shipped_backbones_are_folders_inside_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "REFERENCE_FOLDER", tmp_path)
    copy(model_folder("mamba2"), tmp_path / "mamba-ee")
    assert load("mamba-ee")[0].config.model_type == "mamba2"
    assert shipped_exits("mamba-ee") is None
    folder = tmp_path / "mamba-ee" / "exits"
    (folder / loading.DEFAULT_HEAD).mkdir(parents=True)
    assert shipped_exits("mamba-ee") == folder / loading.DEFAULT_HEAD
    assert shipped_exits("mamba-ee", "linear") is None
    (folder / "linear").mkdir()
    assert shipped_exits("mamba-ee", "linear") == folder / "linear"
    assert shipped_exits("some/model") is None


def refusal(kind, *args, **kwargs) -> str:
    with pytest.raises(kind) as caught:
        load(*args, **kwargs)
    assert type(caught.value) is kind
    return str(caught.value)


def test_no_such_folder():
    text = refusal(BackboneError, "./nowhere/model")
    assert "no such folder: './nowhere/model'" in text
    assert "transformer-ee, mamba-ee" in text


def test_unknown_hub_id_offline():
    text = refusal(BackboneError, "somebody/something")
    assert "cannot load 'somebody/something'" in text
    assert "Check the name and the connection" in text


def test_misspelt_shipped_name_gets_a_suggestion():
    assert "Did you mean the shipped backbone 'mamba-ee'?" in refusal(BackboneError, "mamba-e")


def test_a_file_is_not_a_folder(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"x")
    assert "is a file" in refusal(BackboneError, path)


def test_folder_without_config(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    text = refusal(BackboneError, tmp_path)
    assert "no config.json (it holds notes.txt)" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"model_type": "lla', "config.json is not valid JSON"),
        ("[1, 2]", "names no model_type"),
        ("{}", "names no model_type"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "config.json cannot be used"),
        ('{"model_type": "mamba2", "hidden_size": 100}', "hidden_size * expand (200)"),
    ],
)
def test_corrupt_config(content, says, tmp_path):
    folder = copy(model_folder(), tmp_path / "model")
    (folder / "config.json").write_text(content)
    text = refusal(BackboneError, folder)
    assert says in text
    assert "save_pretrained" in text


@pytest.mark.parametrize("model_type", ["gpt2", "t5", "somethingnew"])
def test_unknown_model_type_is_refused_before_any_weight_is_read(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    text = refusal(UnsupportedModelError, tmp_path)
    assert repr(model_type) in text
    assert "llama, mamba, mamba2, mistral" in text


def test_an_encoder_is_refused(tmp_path):
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 20,
    }
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path)
    assert "model type 'bert' has no adapter" in refusal(UnsupportedModelError, tmp_path)


def test_a_classifier_of_a_known_type_is_refused(tmp_path):
    folder = copy(model_folder(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "LlamaForSequenceClassification, which is not a causal language model" in refusal(
        UnsupportedModelError, folder
    )


def test_weights_missing_truncated_incomplete_or_misshapen(tmp_path):
    intact = model_folder()
    absent = copy(intact, tmp_path / "absent")
    (absent / "model.safetensors").unlink()
    assert "no weights in safetensors form" in refusal(BackboneError, absent)

    short = copy(intact, tmp_path / "short")
    content = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "the weights cannot be loaded" in refusal(BackboneError, short)

    name = "model.layers.3.mlp.up_proj.weight"
    for change, says in ((lambda t: None, "lack"), (lambda t: t[:5].clone(), "have another shape")):
        folder = copy(intact, tmp_path / says.replace(" ", "-"))
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors.pop(name))
        kept = {key: value for key, value in tensors.items() if value is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        text = refusal(BackboneError, folder)
        assert says in text
        assert name in text


def test_pickled_weights_are_not_loaded(tmp_path):
    folder = copy(model_folder(), tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "Pickled weights are not loaded" in refusal(BackboneError, folder)


@pytest.mark.parametrize("content", [None, '{"version": "1.0", "tru'])
def test_tokenizer_missing_or_corrupt(content, tmp_path):
    folder = copy(model_folder(), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    assert "no usable tokenizer" in refusal(BackboneError, folder)


def test_tokenizer_of_a_larger_model(tmp_path):
    folder = copy(model_folder(), tmp_path / "model")
    _, tokenizer = load(folder)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(folder)
    assert "the tokenizer has 259 entries and the model embeds 257" in refusal(BackboneError, folder)


def test_remote_code_is_never_run(tmp_path):
    folder = copy(model_folder(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "surprise", "auto_map": {"AutoConfig": "code.Surprise"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    assert "model type 'surprise' has no adapter" in refusal(UnsupportedModelError, folder)


def test_unknown_dtype_and_device():
    text = refusal(UsageError, model_folder(), dtype="float8")
    assert text == "unknown dtype 'float8'. Did you mean 'float32'? Available: auto, float32, bfloat16, float16."
    text = refusal(UsageError, model_folder(), device_map="gpu")
    assert "device 'gpu' cannot be used here" in text
    assert "Use cpu, cuda" in text


def test_peek_refuses_without_reading_weights(tmp_path):
    folder = copy(model_folder(), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert peek(folder).num_hidden_layers == 5
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UnsupportedModelError, match="'gpt2' has no adapter"):
        peek(folder)


@pytest.mark.parametrize("name", loading.REFERENCE_BACKBONES)
def test_shipped_backbones_load_and_stay_small(name):
    model, tokenizer = load(name)
    assert type(model).__name__ in ("MistralForCausalLM", "Mamba2ForCausalLM")
    assert len(tokenizer) == model.config.vocab_size
    folder = loading.REFERENCE_FOLDER / name
    assert sum(path.stat().st_size for path in folder.glob("*")) <= 16 * 2**20
