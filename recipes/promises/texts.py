"""Real text for promises: one sequence per document, of three kinds, none of which the exit heads were trained on.

Documents that the backbones never saw either are too few for calibrations of 400 (157 Wikipedia articles, 48 pieces of
novels, 115 dialogues), so documents that the backbones saw and the heads did not are taken along; each says which it
is, and the study compares the two.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "reference"), str(ROOT / "exits")]
from mixture import SOURCES, TOKENIZER_FILE, find, is_held_out, render, rows, sha256
from text import keep

KINDS = ("wikipedia", "dialogues", "novels")
#: Characters kept of a document, and the tokens that they must make.
CHARACTERS, TOKENS = 1600, 128
#: The heads' training text is a sample of about 6 % of the documents; nothing that a sample of this share would take.
HEADS_SHARE = 0.2


def prepare(data: Path, out: Path, counts: dict[str, int]) -> dict[str, Any]:
    """Write ``out`` (.jsonl.xz): per kind ``counts`` documents in an order that depends on the text alone."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER_FILE))
    items: list[dict[str, Any]] = []
    files = {}
    for kind in KINDS:
        found = []
        for source in SOURCES:
            if source.name != kind:
                continue
            path = find(data, source)
            if path is None:
                sys.exit(f"{data} lacks {source.file}")
            files[source.file] = sha256(path)
            for row in rows(path):
                text, unseen = render(kind, row), is_held_out(kind, row)
                if unseen or not keep(kind, text, HEADS_SHARE):
                    found.append({"kind": kind, "held_out": unseen, "text": text[:CHARACTERS]})
        # Held-out documents first: all of them are used.
        found.sort(
            key=lambda item: (not item["held_out"], hashlib.sha256(f"promises\0{item['text']}".encode()).digest())
        )
        chosen = []
        for item in found:
            if len(tokenizer.encode(item["text"], add_special_tokens=False).ids) >= TOKENS:
                chosen.append(item)
            if len(chosen) == counts[kind]:
                break
        # Any first N are a random draw.
        items += sorted(chosen, key=lambda item: _order("order", item["text"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(lzma.compress("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()))
    facts = {"texts_sha256": sha256(out), "files": files, "documents": {}}
    for kind in KINDS:
        mine = [item for item in items if item["kind"] == kind]
        facts["documents"][kind] = {"all": len(mine), "held_out": sum(item["held_out"] for item in mine)}
    return facts


def _order(salt: str, text: str) -> bytes:
    return hashlib.sha256(f"{salt}\0{text}".encode()).digest()


def load_texts(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The documents by kind."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for item in rows(path):
        found[item["kind"]].append(item)
    return found
