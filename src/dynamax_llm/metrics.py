"""Distance of one text to another, and degenerate texts: what promises and evaluations measure.

Word-level ROUGE-L is Lin (2004) as the rouge-score package computes it without stemming. Exact match and F1 of answers
are SQuAD's (Rajpurkar et al., arXiv 1606.05250).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

#: Repetition is counted in runs of this many tokens.
PIECE = 4
#: Outputs shorter than this many tokens are never called repetitive.
SHORTEST_LOOP = 12

_WORD = re.compile(r"[a-z0-9]+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def rouge_l(text: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, 0..1; 1 for equal texts, empty ones included."""
    if text == reference:
        return 1.0
    words, expected = (_WORD.findall(item.lower()) for item in (text, reference))
    common = [0] * (len(expected) + 1)  # longest common subsequence with each beginning of ``expected``
    for word in words:
        before = 0  # the entry to the left, without this word
        for at, other in enumerate(expected, start=1):
            before, common[at] = common[at], before + 1 if word == other else max(common[at], common[at - 1])
    if not common[-1]:
        return 0.0
    precision, recall = common[-1] / len(words), common[-1] / len(expected)
    return 2 * precision * recall / (precision + recall)


def first_divergence(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """Index of the first token that differs (an end that comes early or late differs); None if the two are equal."""
    for index, (one, other) in enumerate(zip(tokens, reference, strict=False)):
        if one != other:
            return index
    return None if len(tokens) == len(reference) else min(len(tokens), len(reference))


def is_degenerate(tokens: Sequence[int], text: str) -> bool:
    """Whether an output is blank, or at least half of its runs of four tokens repeat earlier ones.

    Such outputs are counted and reported, never left out.
    """
    if not text.strip():
        return True
    pieces = [tuple(tokens[start : start + PIECE]) for start in range(len(tokens) - PIECE + 1)]
    return len(tokens) >= SHORTEST_LOOP and 2 * len(set(pieces)) <= len(pieces)


def normalise(answer: str) -> str:
    """SQuAD's form of an answer: lower case, no punctuation, no articles, single spaces."""
    plain = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def exact_match(answer: str, reference: str) -> float:
    """1 iff the two are the same answer after normalisation."""
    return float(normalise(answer) == normalise(reference))


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words; without words on either side, 1 if neither has any, else 0."""
    words, expected = normalise(answer).split(), normalise(reference).split()
    if not words or not expected:
        return float(words == expected)
    return 2.0 * (Counter(words) & Counter(expected)).total() / (len(words) + len(expected))
