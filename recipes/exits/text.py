"""Text to train exit heads on, text to judge them by, and the few paragraphs that ship with the package.

    python recipes/exits/text.py --data DIR --out OUT [--megabytes 24]

DIR is the folder the reference backbones were trained on. `train.jsonl.xz` samples documents the backbones saw,
`eval.jsonl.xz` holds documents that neither backbones nor heads ever saw (the backbones' own held-out hash).
`held_out.jsonl` is a small, licensed slice of the latter: src/dynamax_llm/data/held_out.jsonl is a copy of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "reference"))
from mixture import SOURCES, Source, find, is_held_out, render

#: Longest document taken whole; longer ones are cut at a paragraph, so that no article dominates.
LONGEST = 6000
SHIPPED = {"wikipedia": (10, 1200), "novels": (5, 1200)}  # documents, characters each


def keep(name: str, text: str, share: float) -> bool:
    """A deterministic sample: about ``share`` of all documents."""
    digest = hashlib.sha256(f"heads\0{name}\0{text}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def cut(text: str, longest: int) -> str:
    """The text up to the last paragraph or sentence that ends within ``longest`` characters."""
    if len(text) <= longest:
        return text
    head = text[:longest]
    end = max(head.rfind("\n"), head.rfind(". ") + 1)
    return head[: end if end > longest // 2 else longest].rstrip()


def rows(data: Path, source: Source):
    path = find(data, source)
    if path is None:
        return
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


def collect(data: Path, megabytes: float) -> tuple[list[dict], list[dict]]:
    """Sampled training documents and all held-out ones, each {"source", "text"}."""
    size = sum(path.stat().st_size for source in SOURCES if (path := find(data, source)))
    share = min(1.0, megabytes * 2**20 / (size * 3.5))  # xz packs this text about 3.5 times
    train, unseen = [], []
    for source in SOURCES:
        for row in rows(data, source):
            text = render(source.name, row)
            item = {"source": source.name, "title": row.get("title", ""), "licence": source.licence}
            if is_held_out(source.name, row):
                unseen.append({**item, "text": cut(text, LONGEST)})
            elif keep(source.name, text, share):
                train.append({**item, "text": cut(text, LONGEST)})
    return train, unseen


def shipped(unseen: list[dict]) -> list[dict]:
    """The first suitable held-out documents of the sources that may travel with the package."""
    chosen = []
    for name, (count, longest) in SHIPPED.items():
        fit = [
            item for item in unseen if item["source"] == name and len(item["text"]) > longest and item["text"].isascii()
        ]
        chosen += [{**item, "text": cut(item["text"], longest)} for item in fit[:: max(1, len(fit) // count)][:count]]
    return chosen


def write(path: Path, items: list[dict]) -> None:
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    path.write_bytes(lzma.compress(lines.encode(), preset=6) if path.suffix == ".xz" else lines.encode())
    print(f"{path}: {len(items)} documents, {len(lines) / 1e6:.1f} MB of text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=24.0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train, unseen = collect(args.data, args.megabytes)
    write(args.out / "train.jsonl.xz", train)
    write(args.out / "eval.jsonl.xz", unseen)
    write(args.out / "held_out.jsonl", shipped(unseen))


if __name__ == "__main__":
    main()
