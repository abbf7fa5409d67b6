"""Text that shows depth: colours that stay readable, marks for plain text, characters that span tokens."""

from __future__ import annotations

import pytest

from dynamax_llm.render import Piece, Pieces, colour, legend, marked, pieces, summary, tint, tinted
from tests.folders import byte_tokenizer


def luminance(hexadecimal: str) -> float:
    """Relative luminance of ``#rrggbb`` as WCAG 2 defines it."""
    channels = (int(hexadecimal[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("share", [i / 20 for i in range(21)])
def test_every_tint_is_readable_on_black_and_on_white(share):
    light = luminance(colour(share))
    assert (light + 0.05) / 0.05 > 4.0
    assert 1.05 / (light + 0.05) > 4.0


def test_tints_tell_depths_apart_and_clamp():
    assert colour(-1.0) == colour(0.0) == "#1a81c4"
    assert colour(2.0) == colour(1.0) == "#c75f16"
    assert tint(8, 16, 8) == tint(4, 16, 8) == colour(0.0)
    assert tint(12, 16, 8) == colour(0.5)
    assert tint(16, 16, 8) == tint(16, 16, 16 - 1) == colour(1.0)
    assert len({tint(depth, 16, 4) for depth in (4, 8, 12, 16)}) == 4


def test_marks_and_tints_carry_the_same_text():
    items = [Piece(" the", 8), Piece(" cat", 16)]
    assert marked(items) == " the[8] cat[16]"
    text = tinted(items, 16, 8)
    assert text.plain == " the cat"
    assert [(span.start, span.end, span.style) for span in text.spans] == [(0, 4, "#1a81c4"), (4, 8, "#c75f16")]


def test_legend_names_every_depth_once():
    assert legend([16, 8, 12, 8], 16).plain == "layers run: 8  12  16 of 16"


def test_summary_is_one_line_and_never_speaks_of_speed_up():
    line = summary(tokens=64, mean_depth=0.7, n_layers=16, counted_reduction=-0.031, seconds=2.0)
    assert line == "64 tokens, mean depth 11.2 of 16 layers (70 %), counted reduction -3 %, 32.0 tokens/s"
    assert "speed" not in line


def test_a_character_of_several_tokens_appears_with_its_last():
    tokenizer = byte_tokenizer()
    context = tokenizer("a").input_ids
    ids = tokenizer("né!").input_ids  # n, two bytes of é, !
    assert pieces(tokenizer, ids, [2, 5, 3, 4], context) == [Piece("n", 2), Piece("é", 5), Piece("!", 4)]


def test_an_incomplete_character_is_shown_at_the_end():
    tokenizer = byte_tokenizer()
    stream = Pieces(tokenizer)
    first, _ = tokenizer("é").input_ids
    assert stream.push(first, 3) is None
    assert stream.flush() == Piece("\ufffd", 3)
    assert stream.flush() is None


def test_ended_rows_and_special_tokens_show_nothing():
    tokenizer = byte_tokenizer()
    (a,) = tokenizer("a").input_ids
    assert pieces(tokenizer, [a, 0, 0], [5, 5, 0]) == [Piece("a", 5)]
