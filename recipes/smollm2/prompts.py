"""Chat prompts for SmolLM2: OUT/train.jsonl and OUT/heldout.jsonl, one {"prompt": …, "kind": …} a line.

    python recipes/smollm2/prompts.py DATA OUT [--train 30000] [--heldout 100]

| kind | train | held out |
|---|---|---|
| trivia | TriviaQA train, one SQuAD question a passage | TriviaQA dev |
| math | GSM8K train | GSM8K test |
| write | forms such as "Write a short paragraph about …" over Wikipedia titles | titles that a hash holds out |
| story | "Continue this story: …" with 40 words of a novel | with 40 words of a CoQA story |

``--heldout`` counts prompts a kind. What is chosen, its form and its order depend on the texts alone. A prompt in both
sets, in whatever case and spacing, stays in the held-out one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

KINDS = ("trivia", "write", "math", "story")
FORMS = (
    "Write a short paragraph about {}.",
    "Explain {} to a child.",
    "What should I know about {}?",
    "Give me five facts about {}.",
)
STORY = "Continue this story: {}"
#: Words of a story in a prompt; a chunk of a novel may begin in the middle of a sentence, so its first are left out.
STORY_WORDS, SKIPPED_WORDS = 40, 20
#: One Wikipedia title in this many is held out.
TITLE_SHARE = 20

Prompt = tuple[str, str]  # text, kind


def number(salt: str, text: str) -> int:
    """A number that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(f"smollm2\0{salt}\0{text}".encode()).digest()[:8], "big")


def rows(data: Path, name: str) -> Iterator[dict[str, Any]]:
    """The records of a .jsonl or .jsonl.xz file below ``data``; the program ends if it is missing."""
    path = data / name
    if not path.is_file():
        sys.exit(f"{data} lacks {name}")
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def questions(data: Path, name: str, kind: str) -> Iterator[Prompt]:
    return ((row["question"].strip(), kind) for row in rows(data, name))


def passages(data: Path) -> Iterator[Prompt]:
    """One question for each SQuAD passage."""
    for row in rows(data, "squad_train.jsonl.xz"):
        if row["qas"]:
            yield min((qa["question"].strip() for qa in row["qas"]), key=lambda one: number("qa", one)), "trivia"


def titles(data: Path, held_out: bool) -> Iterator[Prompt]:
    """A request to write about each Wikipedia title of one side of the hash split."""
    for part in (0, 1, 2):
        for row in rows(data, f"corpus/wikipedia-{part}.jsonl.xz"):
            title = row["title"].replace("_", " ")
            if (number("title", title) % TITLE_SHARE == 0) == held_out:
                yield FORMS[number("form", title) % len(FORMS)].format(title), "write"


def stories(data: Path, name: str, field: str, skipped: int) -> Iterator[Prompt]:
    for row in rows(data, name):
        words = row[field].split()[skipped : skipped + STORY_WORDS]
        if len(words) == STORY_WORDS:
            yield STORY.format(" ".join(words)), "story"


def training(data: Path) -> Iterator[Prompt]:
    yield from questions(data, "triviaqa_train_sample.jsonl", "trivia")
    yield from questions(data, "gsm8k_train.jsonl", "math")
    yield from passages(data)
    yield from titles(data, held_out=False)
    yield from stories(data, "corpus/novels.jsonl.xz", "text", SKIPPED_WORDS)


def unseen(data: Path) -> Iterator[Prompt]:
    yield from questions(data, "triviaqa_dev.jsonl", "trivia")
    yield from titles(data, held_out=True)
    yield from questions(data, "gsm8k_test.jsonl", "math")
    yield from stories(data, "coqa_dev.jsonl", "story", 0)


def plain(text: str) -> str:
    """The text without case and spacing."""
    return " ".join(text.casefold().split())


def chosen(prompts: Iterable[Prompt], most: int) -> list[Prompt]:
    """At most ``most`` different prompts in an order in which any first N are a random draw."""
    return sorted(dict.fromkeys(prompts), key=lambda one: (number("order", one[0]), one))[:most]


def build(data: Path, train: int, held_out: int) -> tuple[list[Prompt], list[Prompt]]:
    """Training prompts, and ``held_out`` prompts of each kind, with no text in both."""
    every = list(unseen(data))
    kept = [one for kind in KINDS for one in chosen((one for one in every if one[1] == kind), held_out)]
    texts = {plain(text) for text, _ in every}
    return chosen((one for one in training(data) if plain(one[0]) not in texts), train), chosen(kept, len(kept))


def write(path: Path, prompts: list[Prompt]) -> None:
    lines = (json.dumps({"prompt": text, "kind": kind}, ensure_ascii=False) + "\n" for text, kind in prompts)
    content = "".join(lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(kind for _, kind in prompts).items()))
    print(f"{path}: {len(prompts)} prompts ({kinds}), sha256 {hashlib.sha256(content).hexdigest()}")


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("data", type=Path, help="the folder of the source files")
    made.add_argument("out", type=Path, help="the folder for train.jsonl and heldout.jsonl")
    made.add_argument("--train", type=int, default=30000, help="training prompts")
    made.add_argument("--heldout", type=int, default=100, help="held-out prompts of each kind")
    args = made.parse_args()
    train, held_out = build(args.data, args.train, args.heldout)
    write(args.out / "train.jsonl", train)
    write(args.out / "heldout.jsonl", held_out)


if __name__ == "__main__":
    main()
