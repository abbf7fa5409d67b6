"""The training mixture: which files, how a row becomes text, which documents are held out, tokens on disk.

Nothing here needs torch, so other code (evaluation, tests) can import `is_held_out` and `held_out_documents`
to know exactly what the reference backbones have and have not seen.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"  # id 0: bos = eos = pad
HELD_OUT_SHARE = 100  # one document in this many is held out
TOKENIZER_FILE = Path(__file__).with_name("tokenizer.json")
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One file of the mixture. `name` decides how a row is rendered and how its held-out key is made."""

    name: str
    file: str
    licence: str


WIKIPEDIA = "English Wikipedia 2015, CC BY-SA 3.0"
SOURCES = (
    Source("wikipedia", "corpus/wikipedia-0.jsonl.xz", WIKIPEDIA),
    Source("wikipedia", "corpus/wikipedia-1.jsonl.xz", WIKIPEDIA),
    Source("wikipedia", "corpus/wikipedia-2.jsonl.xz", WIKIPEDIA),
    Source("novels", "corpus/novels.jsonl.xz", "English novels 1839-1937, public domain"),
    Source("dialogues", "corpus/dialogues.jsonl.xz", "schema-guided dialogues, CC BY-SA 4.0"),
    Source("squad", "squad_train.jsonl.xz", "SQuAD 1.1 train, CC BY-SA 4.0"),
    Source("gsm8k", "gsm8k_train.jsonl", "GSM8K train, MIT"),
)


def held_out_key(name: str, row: Row) -> str:
    """What decides where a document goes. Wikipedia and SQuAD share titles, so an article is held out of both."""
    if name in ("wikipedia", "squad"):
        return "wikipedia\0" + row["title"].replace("_", " ")
    if name == "novels":
        return f"novels\0{row['title']}\0{row['part']}"
    return f"{name}\0{row['question'] if name == 'gsm8k' else row['text']}"


def is_held_out(name: str, row: Row) -> bool:
    """True for about one document in a hundred: a pure function of the row, the same on every machine."""
    digest = hashlib.sha256(held_out_key(name, row).encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0


def render(name: str, row: Row) -> str:
    """The text trained on. SQuAD alternates between the two prompt layouts that harness tasks use."""
    if name == "squad":
        compact = hashlib.sha256(row["context"].encode()).digest()[0] % 2 == 0
        gap = "\n" if compact else "\n\n"
        turns = [f"Q: {qa['question']}{gap}A: {qa['answers'][0]}" for qa in row["qas"] if qa["answers"]]
        return "\n\n".join([row["context"], *turns])
    if name == "gsm8k":
        return f"Question: {row['question']}\nAnswer: {row['answer']}"
    return row["text"]


def find(data: Path, source: Source) -> Path | None:
    """The source's file under `data`: its own path, the bare name, or either with .xz added; None if absent."""
    for stem in (source.file, Path(source.file).name):
        for path in (data / stem, data / f"{stem}.xz"):
            if path.is_file():
                return path
    return None


def present_sources(data: Path) -> list[tuple[Source, Path]]:
    """Sources whose file is there, in a fixed order; missing ones are named on stdout and skipped."""
    found = []
    for source in SOURCES:
        path = find(data, source)
        if path is None:
            print(f"note: {source.file} is not under {data}: skipped", flush=True)
        else:
            found.append((source, path))
    if not found:
        sys.exit(f"no training file found under {data}; expected some of {[s.file for s in SOURCES]}")
    return found


def rows(path: Path) -> Iterator[Row]:
    """JSON rows of a .jsonl or .jsonl.xz file."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def documents(data: Path, held_out: bool) -> Iterator[tuple[str, str]]:
    """(source name, text) of the training or of the held-out documents, in file order."""
    for source, path in present_sources(data):
        for row in rows(path):
            if is_held_out(source.name, row) == held_out:
                yield source.name, render(source.name, row)


def held_out_documents(data: Path) -> dict[str, list[str]]:
    """Held-out texts per source name: what validation losses are measured on."""
    texts: dict[str, list[str]] = {}
    for name, text in documents(Path(data), held_out=True):
        texts.setdefault(name, []).append(text)
    return texts


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Token ids per text, each preceded by <|endoftext|>; runs on every core through the tokenizer's threads."""
    arrays = []
    for start in range(0, len(texts), 1024):  # slices keep the encodings' memory small
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 1024], add_special_tokens=False):
            arrays.append(np.array([0, *encoding.ids], dtype=np.uint16))
    return arrays


def prepare(data: Path, cache: Path, seed: int = 0) -> dict[str, Any]:
    """Tokenise the mixture into cache/train.npy and cache/valid.npy (uint16, 1-D) and describe it.

    Training documents are shuffled once over all sources; the held-out ones keep file order. A cache made
    from the same files, tokenizer and seed is used again.
    """
    found = present_sources(data)
    files = [
        {"file": s.file, "source": s.name, "licence": s.licence, "bytes": p.stat().st_size, "sha256": sha256(p)}
        for s, p in found
    ]
    facts: dict[str, Any] = {"seed": seed, "tokenizer_sha256": sha256(TOKENIZER_FILE), "files": files}
    meta = cache / "meta.json"
    if meta.is_file():
        cached = json.loads(meta.read_text())
        if cached["key"] == _key(facts):
            return cached
    started = time.time()
    tokenizer = Tokenizer.from_file(str(TOKENIZER_FILE))
    train, valid, counts = [], [], {}
    for (source, path), entry in zip(found, files, strict=True):
        split: dict[bool, list[str]] = {False: [], True: []}
        for row in rows(path):
            split[is_held_out(source.name, row)].append(render(source.name, row))
        for held_out, arrays in ((False, encode(tokenizer, split[False])), (True, encode(tokenizer, split[True]))):
            (valid if held_out else train).extend(arrays)
            entry["valid_tokens" if held_out else "train_tokens"] = int(sum(map(len, arrays)))
        counts[source.name] = counts.get(source.name, 0) + entry["train_tokens"]
        print(f"{time.time() - started:6.1f} s  {source.file}: {entry['train_tokens']:,} training tokens", flush=True)
    order = np.random.default_rng(seed).permutation(len(train))
    cache.mkdir(parents=True, exist_ok=True)
    np.save(cache / "train.npy", np.concatenate([train[i] for i in order]))
    np.save(cache / "valid.npy", np.concatenate(valid))
    facts = {"key": _key(facts), **facts, "tokens_per_source": counts}
    facts["train_tokens"] = int(sum(counts.values()))
    facts["valid_tokens"] = int(sum(map(len, valid)))
    meta.write_text(json.dumps(facts, indent=1))
    return facts


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _key(facts: dict[str, Any]) -> str:
    stable = [facts["seed"], facts["tokenizer_sha256"], [entry["sha256"] for entry in facts["files"]]]
    return hashlib.sha256(json.dumps(stable).encode()).hexdigest()
