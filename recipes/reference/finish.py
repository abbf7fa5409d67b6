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

CARD = Path(__file__).with_name("card.md")
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
    """The model card (card.md), every number of it taken from metrics.json."""
    options, result = metrics["options"], metrics["validation"]
    objective, depth = options.get("objective", "multi-exit"), len(result["loss_per_layer"])
    rows = zip(result["agreement_per_layer"], result["loss_per_layer"], strict=True)
    command = [f"python recipes/reference/train.py {options['kind']} --data DIR --out OUT"]
    whole = ("tokens", "deadline")
    names = (*whole, "batch", "length", "matrix_lr", "other_lr", "exits", "exit_weight", "distil", "seed")
    for option in names:
        value = f"{options[option]:.0f}" if option in whole else options[option]
        command.append(f"--{option.replace('_', '-')} {value}")
    command += ["--objective ordinary"] * (objective == "ordinary")
    return CARD.read_text(encoding="utf-8").format(
        name=name,
        kind={"transformer": "Mistral-style Transformer", "mamba": "Mamba-2 model"}[options["kind"]],
        millions=parameters / 1e6,
        depth=depth,
        purpose=PURPOSE[objective],
        aim=OBJECTIVE[objective].format(exits=options["exits"], hard=1 - options["distil"], soft=options["distil"]),
        quarters=", ".join(f"{x:.3f}" for x in result["agreement_at_quarters"]),
        command=" ".join(command),
        files="\n".join(
            f"| `{f['file']}` | {f['licence']} | {f['train_tokens']:,} | `{f['sha256'][:16]}` |"
            for f in metrics["data"]["files"]
        ),
        layers="\n".join(f"| {i} | {i / depth:.3f} | {a:.3f} | {c:.3f} |" for i, (a, c) in enumerate(rows, 1)),
        result=result,
        metrics=metrics,
    )


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
