"""The texts of the other recipes, chosen from the files that the reference backbones were trained on.

    python recipes/texts.py heads --data DIR --out TEXT [--megabytes 64]    # train, eval and held_out of recipes/heads
    python recipes/texts.py policies --data DIR --out prompts.jsonl.xz      # prompts of recipes/policies
    python recipes/texts.py promises --data DIR --out texts.jsonl.xz        # sequences of recipes/promises

Held out is what the backbones' own hash holds out (recipes/reference/mixture.py). Heads train on a sample of the other
documents and are compared on the held-out ones. Promises need more documents than are held out, so they also take
documents that the backbones were trained on and the heads were not; each record says which. Which documents are
chosen, and their order, depends on their text alone. Hashes of what was read and written are printed.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "reference")]
from mixture import SOURCES, TOKENIZER_FILE, Source, find, is_held_out, render, rows, sha256
from tokenizers import Tokenizer

from common import parsed, parser

Item = dict[str, Any]
#: Running prose and dialogue; the other sources are questions with answers of a few words.
KINDS = ("wikipedia", "novels", "dialogues")
#: heads: longest document taken whole (longer ones are cut at a paragraph); documents shipped, characters each.
LONGEST, SHIPPED = 6000, {"wikipedia": (10, 1200), "novels": (5, 1200)}
#: Characters kept of a document, and the tokens that they must make.
PROMPT_SIZE, SEQUENCE_SIZE = (2400, 320), (1600, 128)
#: promises: documents per kind. A sample of this share of all documents holds the heads' training text.
COUNTS, HEADS_SHARE = {"wikipedia": 1100, "dialogues": 600, "novels": 600}, 0.2
#: policies: prompts that are measured, and others for choosing thresholds.
SPLITS = {"eval": 96, "tune": 32}


def digest(salt: str, text: str) -> bytes:
    """The order of a text among others."""
    return hashlib.sha256(f"{salt}\0{text}".encode()).digest()


def sampled(name: str, text: str, share: float) -> bool:
    """Whether a document is in a sample of about ``share`` of all documents."""
    return int.from_bytes(digest(f"heads\0{name}", text)[:4], "big") < share * 2**32


def cut(text: str, longest: int = LONGEST) -> str:
    """The text up to the last paragraph or sentence that ends within ``longest`` characters."""
    if len(text) <= longest:
        return text
    head = text[:longest]
    end = max(head.rfind("\n"), head.rfind(". ") + 1)
    return head[: end if end > longest // 2 else longest].rstrip()


def read(data: Path, names: tuple[str, ...] = ()) -> Iterator[tuple[Source, Item, str, bool]]:
    """(source, row, text, held out) of every document; ``names`` must be there, other sources may be missing."""
    for source in SOURCES:
        path = find(data, source)
        if path is None and source.name in names:
            sys.exit(f"{data} lacks {source.file}")
        if path is None or (names and source.name not in names):
            continue
        for row in rows(path):
            yield source, row, render(source.name, row), is_held_out(source.name, row)


def heads(data: Path, megabytes: float) -> dict[str, list[Item]]:
    """Documents per file: a sample for training, all held-out ones, and those of them that ship with the package."""
    size = sum(path.stat().st_size for source in SOURCES if (path := find(data, source)))
    share = min(1.0, megabytes * 2**20 / (size * 3.5))  # xz packs this text about 3.5 times
    train: list[Item] = []
    unseen: list[Item] = []
    for source, row, text, held_out in read(data):
        if held_out or sampled(source.name, text, share):
            about = {"source": source.name, "title": row.get("title", ""), "licence": source.licence}
            (unseen if held_out else train).append({**about, "text": cut(text)})
    shipped: list[Item] = []
    for name, (count, longest) in SHIPPED.items():
        fit = [one for one in unseen if one["source"] == name and len(one["text"]) > longest and one["text"].isascii()]
        shipped += [{**one, "text": cut(one["text"], longest)} for one in fit[:: max(1, len(fit) // count)][:count]]
    return {"train.jsonl.xz": train, "eval.jsonl.xz": unseen, "held_out.jsonl": shipped}


def long_enough(text: str, tokens: int, tokenizer: Tokenizer) -> bool:
    return len(tokenizer.encode(text, add_special_tokens=False).ids) >= tokens


def policies(data: Path, splits: dict[str, int] | None = None) -> list[Item]:
    """Held-out documents, sources in turn so that any first N are balanced, each with its split."""
    splits, tokenizer = splits or SPLITS, Tokenizer.from_file(str(TOKENIZER_FILE))
    groups: dict[str, list[Item]] = {name: [] for name in KINDS}
    for source, row, text, held_out in read(data, KINDS):
        text = text[: PROMPT_SIZE[0]]
        if held_out and long_enough(text, PROMPT_SIZE[1], tokenizer):
            about = {"source": source.name, "title": row.get("title", ""), "licence": source.licence}
            groups[source.name].append({**about, "text": text})
    queues = [sorted(group, key=lambda one: digest("policies", one["text"])) for group in groups.values()]
    turns = [queue[place] for place in range(max(map(len, queues))) for queue in queues if place < len(queue)]
    wanted = [split for split, count in splits.items() for _ in range(count)]
    if len(turns) < len(wanted):
        sys.exit(f"only {len(turns)} documents are long enough; {len(wanted)} are needed")
    return [{"split": split, **one} for split, one in zip(wanted, turns, strict=False)]


def promises(data: Path, counts: dict[str, int] | None = None) -> list[Item]:
    """Documents per kind, held-out ones first chosen, in an order in which any first N are a random draw."""
    counts, tokenizer, items = counts or COUNTS, Tokenizer.from_file(str(TOKENIZER_FILE)), []
    for kind, count in counts.items():
        found = [
            {"kind": kind, "held_out": held_out, "text": text[: SEQUENCE_SIZE[0]]}
            for _, _, text, held_out in read(data, (kind,))
            if held_out or not sampled(kind, text, HEADS_SHARE)
        ]
        found.sort(key=lambda one: (not one["held_out"], digest("promises", one["text"])))
        fit = (one for one in found if long_enough(one["text"], SEQUENCE_SIZE[1], tokenizer))
        items += sorted(islice(fit, count), key=lambda one: digest("order", one["text"]))
    return items


def write(path: Path, items: list[Item]) -> None:
    """JSON lines, packed where the name ends in .xz."""
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(lines.encode(), preset=6) if path.suffix == ".xz" else lines.encode())
    print(f"{path}: {len(items)} documents, {len(lines) / 1e6:.1f} MB of text, sha256 {sha256(path)}")


def main() -> None:
    made = parser(__doc__, "data", "out")
    made.add_argument("recipe", choices=("heads", "policies", "promises"))
    made.add_argument("--megabytes", type=float, default=24.0, help="heads: of training text")
    args = parsed(made)
    if args.recipe == "heads":
        for name, items in heads(args.data, args.megabytes).items():
            write(args.out / name, items)
    else:
        write(args.out, {"policies": policies, "promises": promises}[args.recipe](args.data))
    for source in SOURCES:
        if path := find(args.data, source):
            print(f"read {source.file}: sha256 {sha256(path)}")


if __name__ == "__main__":
    main()
