"""Turn what a training run left behind into complete Hugging Face folders, and prove that they load.

    python recipes/reference/finish.py OUT_DIR DEST

For each OUT_DIR/<name> with model.safetensors and metrics.json, writes DEST/<name>: weights, config.json,
generation_config.json, tokenizer files, metrics.json and the model card README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from mixture import END_OF_TEXT, TOKENIZER_FILE
from safetensors.torch import load_file
from shapes import NAMES, OBJECTIVES, config, name
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

LIMIT = 16 * 2**20  # bytes a whole folder may take


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json; <|endoftext|> is bos, eos and pad."""
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER_FILE), **names, model_max_length=2048)
    tokenizer.save_pretrained(folder)
    shutil.copyfile(TOKENIZER_FILE, folder / "tokenizer.json")  # the committed, compact form


def write_model(kind: str, smoke: bool, weights: Path, folder: Path) -> int:
    """Weights and configs, checked against the stock class; returns the number of parameters."""
    model = AutoModelForCausalLM.from_config(config(kind, smoke), dtype=torch.bfloat16)
    missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{weights} does not fit {kind}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def check(folder: Path) -> str:
    """Load the folder as a user would, offline, and generate a little; returns the text."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0
    inputs = tokenizer("The city of Paris is", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > LIMIT:
        raise SystemExit(f"{folder} takes {size:,} bytes; at most {LIMIT:,} are allowed")
    print(f"{folder}: {size / 2**20:.2f} MiB, loads; greedy: {tokenizer.decode(out[0])!r}")
    return tokenizer.decode(out[0])


PURPOSE = {
    "multi-exit": """trained so that stopping early pays: the final
norm and the tied LM head read usable text from every layer. Stock transformers classes, no custom code. It is a
test bench for early exits, small enough to ship inside a package.""",
    "ordinary": """trained as checkpoints usually are, on
its last layer alone. Stock transformers classes, no custom code. It shows what early exits are worth on a model that
was not made for them.""",
}
OBJECTIVE = {
    "multi-exit": """Next-token cross-entropy at the last layer, plus {exits} earlier layers per step, rotating, each
weighted by its depth: {hard:.1f} cross-entropy and {soft:.1f} distillation from the model's own last layer.""",
    "ordinary": "Next-token cross-entropy at the last layer.",
}


def card(name: str, parameters: int, metrics: dict[str, Any]) -> str:
    """The model card, every number of it taken from metrics.json."""
    options, result, data = metrics["options"], metrics["validation"], metrics["data"]
    depth = len(result["loss_per_layer"])
    kind = {"transformer": "Mistral-style Transformer", "mamba": "Mamba-2 model"}[options["kind"]]
    objective = options.get("objective", "multi-exit")
    aim = OBJECTIVE[objective].format(exits=options["exits"], hard=1 - options["distil"], soft=options["distil"])
    machine = metrics["hardware"]
    files = "\n".join(
        f"| `{f['file']}` | {f['licence']} | {f['train_tokens']:,} | `{f['sha256'][:16]}` |" for f in data["files"]
    )
    rows = zip(result["agreement_per_layer"], result["loss_per_layer"], strict=True)
    layers = "\n".join(f"| {i} | {i / depth:.3f} | {a:.3f} | {c:.3f} |" for i, (a, c) in enumerate(rows, 1))
    command = (
        f"python recipes/reference/train.py {options['kind']} --data DIR --out OUT --tokens {options['tokens']:.0f} "
        f"--deadline {options['deadline']:.0f} --batch {options['batch']} --length {options['length']} "
        f"--matrix-lr {options['matrix_lr']} --other-lr {options['other_lr']} --exits {options['exits']} "
        f"--exit-weight {options['exit_weight']} --distil {options['distil']} --seed {options['seed']}"
        + (" --objective ordinary" if objective == "ordinary" else "")
    )
    quarters = ", ".join(f"{x:.3f}" for x in result["agreement_at_quarters"])
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [early-exit]
---

# {name}

A {kind} of {parameters / 1e6:.2f} M parameters and {depth} layers, {PURPOSE[objective]}

| | |
|---|---|
| validation loss (nats per token, held-out documents) | {result["loss"]:.4f} |
| agreement with the full model's argmax at 1/4, 1/2, 3/4 of the depth | {quarters} |
| oracle mean depth (first layer that agrees) | {result["oracle_mean_depth"]:.3f} |
| tokens seen / distinct training tokens | {metrics["tokens_seen"]:,} / {data["train_tokens"]:,} |
| held-out tokens measured | {result["tokens"]:,} |
| trained on | {machine["processes"]} x {machine["device"]}, {metrics["wall_seconds"]:.0f} s, torch \
{machine["versions"]["torch"]}, transformers {machine["versions"]["transformers"]} |

## Objective

{aim}
Muon for the layers' matrices, AdamW for the rest.

```
{command}
```

## Data

| file | licence | training tokens | sha256 |
|---|---|---|---|
{files}

About 1 % of the documents of every source is held out by a hash (`recipes/reference/mixture.py`, `is_held_out`);
the numbers above are measured on them. No TruthfulQA, CoQA, TriviaQA or other evaluation text was trained on; SQuAD
and GSM8K training splits were, so they are seen data.

## Agreement and loss by layer

| layer | depth | agreement | loss |
|---|---|---|---|
{layers}

## Limits

Far too small to know facts: it writes fluent, often false English. Never use it to answer questions. Trained on
windows of {options["length"]} tokens. English only; text of 2015 and, for the novels, of 1839-1937, with the views
of its time. Weights: Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that train.py wrote")
    parser.add_argument("dest", type=Path, help="folder that receives the finished models")
    args = parser.parse_args()
    pairs = [(kind, name(kind, objective)) for kind in NAMES for objective in OBJECTIVES]
    found = [(kind, folder) for kind, folder in pairs if (args.out / folder / "model.safetensors").is_file()]
    if not found:
        raise SystemExit(
            f"{args.out} holds no trained model; expected {args.out}/transformer-ee/model.safetensors or its like"
        )
    for kind, trained in found:
        source, folder = args.out / trained, args.dest / trained
        folder.mkdir(parents=True, exist_ok=True)
        metrics = json.loads((source / "metrics.json").read_text())
        parameters = write_model(kind, metrics["options"]["smoke"], source / "model.safetensors", folder)
        write_tokenizer(folder)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        (folder / "README.md").write_text(card(trained, parameters, metrics))
        check(folder)


if __name__ == "__main__":
    main()
