"""Real text that neither backbones nor heads have seen, as prompts of equal length.

Held out is what the reference backbones' own hash holds out (recipes/reference/mixture.py); heads were trained on
documents that it does not hold out. One document gives one prompt, with what really follows it. Sources take turns, so
that any first N prompts are balanced.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reference"))
from mixture import SOURCES, TOKENIZER_FILE, find, is_held_out, render, rows, sha256

#: Running prose and dialogue; the others are questions with answers of a few words.
NAMES = ("wikipedia", "novels", "dialogues")
#: Characters kept of a document, and the tokens that these must make: the longest prompt and continuation together.
CHARACTERS, LEAST_TOKENS = 2400, 320
SPLITS = ("eval", "tune")


def prepare(data: Path, out: Path, counts: dict[str, int]) -> dict[str, Any]:
    """Write ``out`` (.jsonl.xz) with ``counts`` prompts per split, and facts about them beside it."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER_FILE))
    files = {source.file: find(data, source) for source in SOURCES if source.name in NAMES}
    missing = [name for name, path in files.items() if path is None]
    if missing:
        sys.exit(f"{data} lacks {', '.join(missing)}")
    chosen = _take_turns({name: _unseen(data, name, tokenizer) for name in NAMES}, sum(counts.values()))
    splits = [split for split in SPLITS for _ in range(counts[split])]
    items = [{"split": split, **item} for split, item in zip(splits, chosen, strict=True)]
    out.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    out.write_bytes(lzma.compress(text.encode(), preset=6))
    facts = {
        "prompts_sha256": sha256(out),
        "counts": counts,
        "files": {name: sha256(path) for name, path in files.items() if path is not None},
    }
    facts_path(out).write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def facts_path(prompts: Path) -> Path:
    """Where ``prepare`` writes hashes."""
    return prompts.with_name(prompts.name.removesuffix(".jsonl.xz") + ".json")


def load_prompts(path: Path, tokenizer: Any, split: str, count: int, length: int) -> Tensor:
    """The first ``count`` texts of a split as ids (count, length), end-of-text first, as every training document."""
    texts = [item["text"] for item in rows(path) if item["split"] == split][:count]
    if len(texts) < count:
        sys.exit(f"{path} holds {len(texts)} prompts of split {split!r}, {count} are asked for: run prepare with more")
    if length > LEAST_TOKENS:
        sys.exit(f"{length} tokens of prompt and continuation; texts were chosen to have {LEAST_TOKENS}")
    return torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids[: length - 1]] for text in texts])


def _unseen(data: Path, name: str, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Held-out documents of one source that are long enough, in an order that depends on the text alone."""
    found = []
    for source in SOURCES:
        path = find(data, source)
        if source.name != name or path is None:
            continue
        for row in rows(path):
            text = render(name, row)[:CHARACTERS] if is_held_out(name, row) else ""
            if text and len(tokenizer.encode(text, add_special_tokens=False).ids) >= LEAST_TOKENS:
                found.append({"source": name, "title": row.get("title", ""), "licence": source.licence, "text": text})
    return sorted(found, key=lambda item: hashlib.sha256(f"policies\0{item['text']}".encode()).digest())


def _take_turns(groups: dict[str, list[dict[str, str]]], count: int) -> Iterator[dict[str, str]]:
    """``count`` items, one of each group in turn."""
    queues = {name: iter(items) for name, items in groups.items()}
    given = 0
    while given < count:
        before = given
        for queue in queues.values():
            item = next(queue, None)
            if item is not None and given < count:
                given += 1
                yield item
        if given == before:
            sys.exit(f"only {given} documents are long enough; {count} were asked for")
