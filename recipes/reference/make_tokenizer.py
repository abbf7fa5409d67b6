"""Train the shared byte-level BPE tokenizer (8,192 entries) on a sample of the mixture's training documents.

    python recipes/reference/make_tokenizer.py --data DIR

Writes tokenizer.json beside this file; it is committed, so that every machine cuts text the same way.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # must be set before tokenizers starts its threads

from mixture import END_OF_TEXT, TOKENIZER_FILE, documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 8192


def sample(data: Path, every: int) -> Iterator[str]:
    """Every n-th training document, so that all sources take part by their share."""
    for index, (_, text) in enumerate(documents(data, held_out=False)):
        if index % every == 0:
            yield text


def train(texts: Iterator[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Byte-level BPE; <|endoftext|> is id 0, all 256 bytes are in the alphabet, so nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder laid out like DIR")
    parser.add_argument("--every", type=int, default=5, help="use every n-th training document")
    args = parser.parse_args()
    tokenizer = train(sample(args.data, args.every))
    document = json.loads(tokenizer.to_str())
    TOKENIZER_FILE.write_text(json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{TOKENIZER_FILE}: {tokenizer.get_vocab_size()} entries, {TOKENIZER_FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
