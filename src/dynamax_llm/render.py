"""Generated text with the depth of every token: tinted on a terminal, marked in plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

if TYPE_CHECKING:
    from dynamax_llm.decoding import Trace, Verification

#: From blue (left early) over violet to orange (full depth): distinct for colour-blind readers too, and of a middle
#: luminance, so that each is readable on a black and on a white terminal.
GRADIENT = ((26, 129, 196), (142, 105, 196), (199, 95, 22))

#: Prompt tokens that are decoded along with the first new one, so that its leading space is right.
CONTEXT = 6


@dataclass(frozen=True)
class Piece:
    """The text of one token (or of the tokens of one character), and the layers run for it."""

    text: str
    depth: int


class Pieces:
    """Token ids to text, one at a time; a token is kept back while its last character is incomplete."""

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)[-CONTEXT:]
        self._start, self._emitted = 0, len(self._ids)
        self._depth = 0

    def push(self, token: int, depth: int) -> Piece | None:
        """The text that ``token`` completes, or None."""
        self._ids.append(token)
        self._depth = max(self._depth, depth)
        return self._emit(final=False)

    def flush(self) -> Piece | None:
        """What is still kept back at the end, an incomplete character included."""
        return self._emit(final=True) if self._emitted < len(self._ids) else None

    def _emit(self, *, final: bool) -> Piece | None:
        before, now = self._decode(self._ids[self._start : self._emitted]), self._decode(self._ids[self._start :])
        if now.endswith("\ufffd") and not final:
            return None
        piece = Piece(now[len(before) :], self._depth)
        self._start, self._emitted, self._depth = self._emitted, len(self._ids), 0
        return piece if piece.text else None

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer: Any, ids: Sequence[int], depths: Sequence[int], context: Sequence[int] = ()) -> list[Piece]:
    """New tokens ``ids`` up to the row's end, each with the layers it ran, as text; ``context``: the prompt's ids."""
    stream = Pieces(tokenizer, context)
    emitted = [stream.push(token, depth) for token, depth in zip(ids, depths, strict=True)]
    return [piece for piece in (*emitted, stream.flush()) if piece is not None]


def colour(share: float) -> str:
    """The tint of a share of the depth, 0..1, as ``#rrggbb``."""
    place = min(max(share, 0.0), 1.0) * (len(GRADIENT) - 1)
    first = min(int(place), len(GRADIENT) - 2)
    low, high = GRADIENT[first], GRADIENT[first + 1]
    mixed = (round(a + (b - a) * (place - first)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def tint(depth: int, n_layers: int, first_exit: int) -> str:
    """The tint of a token that ran ``depth`` layers: the gradient spans the first exit to the last layer."""
    return colour((depth - first_exit) / max(n_layers - first_exit, 1))


def tinted(items: Iterable[Piece], n_layers: int, first_exit: int) -> Text:
    """Text coloured token by token."""
    text = Text()
    for item in items:
        text.append(item.text, style=tint(item.depth, n_layers, first_exit))
    return text


def marked(items: Iterable[Piece]) -> str:
    """Plain text with each token's depth behind it: `` the[8] cat[16]``."""
    return "".join(f"{item.text}[{item.depth}]" for item in items)


def legend(depths: Iterable[int], n_layers: int) -> Text:
    """One swatch per depth a token can have, in layers."""
    text, ordered = Text("layers run:"), sorted(set(depths))
    for depth in ordered:
        text.append(f" {depth} ", style=f"bold {tint(depth, n_layers, ordered[0])}")
    return text.append(f"of {n_layers}")


def percent(share: float) -> str:
    """A share as a whole percentage: ``-3 %``."""
    return f"{100.0 * share:.0f} %"


def summary(*, tokens: int, mean_depth: float, n_layers: int, counted_reduction: float, seconds: float) -> str:
    """One line on a generation. ``mean_depth`` and ``counted_reduction`` are shares; ``seconds`` include the prompt."""
    rate = tokens / seconds if seconds > 0 else float("inf")
    return (
        f"{tokens} tokens, mean depth {mean_depth * n_layers:.1f} of {n_layers} layers ({percent(mean_depth)}), "
        f"counted reduction {percent(counted_reduction)}, {rate:.1f} tokens/s"
    )


def exactness(trace: Trace, verification: Verification | None) -> str | None:
    """One line on a generation with exact state or output; None for the approximate policies."""
    saved = f"layer passes saved {percent(trace.pass_reduction)}"
    waiting = f"at most {trace.stats.window_bytes / 1e6:.2f} MB waited"
    if verification is not None:
        checked = verification.accepted + verification.corrected
        return (
            f"exact output (verify): {verification.accepted} of {checked} checked drafts accepted, "
            f"{verification.corrected} corrected, {verification.rolled_back} more rolled back, {saved}, {waiting}"
        )
    return f"exact state (defer): {saved}, {waiting}" if trace.policy == "defer" else None
