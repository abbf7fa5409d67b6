"""Text metrics against hand-counted cases."""

from __future__ import annotations

import random
import sys

import pytest
from rouge_score.rouge_scorer import RougeScorer

from dynamax_llm.metrics import exact_match, f1, first_divergence, is_degenerate, rouge_l


def test_rouge_l_by_hand():
    assert rouge_l("", "") == 1.0
    assert rouge_l("", "a cat") == 0.0
    # The longest common subsequence is "the sat": precision 2/3, recall 2/4, F = 4/7.
    assert rouge_l("the dog sat", "the cat never sat") == pytest.approx(4 / 7)


def test_rouge_l_is_the_packages_without_its_help(monkeypatch):
    """Equal to rouge-score (lm-eval brings it) on words, case, punctuation, digits and other scripts; not imported."""
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    generator = random.Random(0)
    words = ["the", "The", "cat", "cats", "sat,", "3", "4.5", "don't", "Zürich", "猫", "--", "mat."]
    pairs = [tuple(" ".join(generator.choices(words, k=generator.randrange(14))) for _ in range(2)) for _ in range(300)]
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    for text, reference in pairs:
        expected = 1.0 if text == reference else scorer.score(reference, text)["rougeL"].fmeasure
        assert rouge_l(text, reference) == expected, (text, reference)


@pytest.mark.parametrize(
    ("tokens", "reference", "expected"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2], [1, 2, 3], 2), ([1, 9, 3], [1, 2, 3], 1), ([], [1], 0), ([], [], None)],
)
def test_first_divergence(tokens, reference, expected):
    assert first_divergence(tokens, reference) == expected


def test_degenerate_outputs_are_blank_or_repeat_themselves():
    assert is_degenerate([5, 5], " \n")
    assert is_degenerate([1, 2, 3] * 6, "round and round and")
    assert not is_degenerate([7] * 5, "short loops may be answers")
    assert not is_degenerate(list(range(30)), "thirty different tokens")
    # Eleven distinct runs of 17: a refrain is no loop.
    assert not is_degenerate([*range(12), *range(8)], "a refrain")


def test_squad_scores_by_hand():
    assert exact_match("beatles", "The  Beatles!") == 1.0
    assert exact_match("two dogs", "two cats") == 0.0
    assert f1("a black cat sat", "the black cat") == pytest.approx(0.8)
    assert (f1("a", "the"), f1("", "cat"), f1("dog", "cat")) == (1.0, 0.0, 0.0)
