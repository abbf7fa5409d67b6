"""Small folders for tests: tiny backbones with a byte-level tokenizer, exits for them, text to train on."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dynamax_llm.backbones import adapt
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.registries import READOUTS
from dynamax_llm.testing import tiny_model

END = "<|endoftext|>"
VOCABULARY = 257  # one end-of-text token and 256 bytes


@functools.cache
def room() -> Path:
    """A temporary folder that lives as long as the test process."""
    path = Path(tempfile.mkdtemp(prefix="dynamax-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token; END is 0 and ends texts, and there is no padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0, **{character: index + 1 for index, character in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def backbone(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model for the byte tokenizer; a Transformer has room for 128 positions."""
    limit = {} if model_type == "mamba2" else {"max_position_embeddings": 128}
    return tiny_model(model_type, vocab=VOCABULARY, seed=seed, **limit)


@functools.cache
def model_folder(model_type: str = "llama", seed: int = 0) -> Path:
    """A saved tiny backbone of five layers with its tokenizer. Shared: copy it before damaging it."""
    folder = room() / f"{model_type}-{seed}"
    model = backbone(model_type, seed)
    model.generation_config.pad_token_id = None
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


#: A chat template in plain bytes.
CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@functools.cache
def chat_folder(model_type: str = "llama") -> Path:
    """``model_folder(model_type)`` with a chat template, and answers that a fifth of all tokens end."""
    folder = copy(model_folder(model_type), room() / f"{model_type}-chat")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": list(range(0, 250, 5))}))
    return folder


@functools.cache
def exits_folder(model_type: str = "llama", head: str | None = "mamba", readout: str = "head") -> Path:
    """Saved exits at depths 2 and 3 for ``model_folder(model_type)``; their heads are random. Copy before damaging."""
    folder = room() / f"{model_type}-{head}-{readout}"
    make_exits(model_type, head, readout).save(folder)
    return folder


def make_exits(model_type: str = "llama", head: str | None = "mamba", readout: str = "head") -> Exits:
    """The same exits, in memory."""
    adapted = adapt(backbone(model_type))
    config = ExitConfig(
        (2, 3), 5, head=head, readout=readout, inputs=("hidden", "statistics"), width=None, candidates=64
    )
    torch.manual_seed(1)
    heads = None if head is None else ExitHeads(config, adapted.width)
    weights = READOUTS[readout].new_weights(config, adapted.width)
    return Exits.of(adapted, config, heads, weights, {"model": "tiny"})


def copy(source: Path, target: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(source, target))


@functools.cache
def corpus() -> Path:
    """A small .jsonl file of repetitive text."""
    path = room() / "corpus.jsonl"
    rows = [{"text": f"Line {i}: " + "the cat sat on the mat and the dog ran. " * (3 + i % 4)} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path
