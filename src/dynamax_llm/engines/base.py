"""The interface of an engine: what decodes one token per row, segment by segment, and owns the state of its rows.

An engine opens sessions. A session has ``slots`` rows and owns everything that changes: caches, recorded programs,
what exits remember, positions. The decoder (``decoding/decoder.py``) drives it, one token per row:

    begin(ids)             the token enters
    segment(i)             layers up to exit i, and the estimator there; the last segment ends at the last layer
    running(i)             rows that go on after exit i
    leave(i) or finish()   every row has left by exit i: the layers above are accounted for under the policy, or the
                           token waits; or the last segment has run
    logits(), exits()      of that token; ``chosen`` gives its greedy continuation without logits leaving the device
    catch_up()             everything that waits runs to the last layer
    keep(counts)           ``verify``: of the tokens since the last call, every row keeps its first ``counts``

Rows enter (``admit``) and leave (``release``) while nothing waits. Exit indices count all exits of the plan;
``plan.full`` is full depth. Shapes: B slots, W tokens of a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.engines.plan import ExitPlan, RowThresholds
from dynamax_llm.registry import Registry
from dynamax_llm.shapes import Ids, Logits, NextLogits, RowFlags, RowIds


@dataclass
class DecodeStats:
    """What decoding did after the prompts, as counted while it ran.

    ``passes``: readings of a layer's weights for the batch. The rest stays None or 0 where each token pays for itself
    when it leaves: ``layer_macs`` multiply-accumulates in layers, catch-up included; ``left_at`` (S, B) the exit
    index of every decoded token, those rolled back included, -1 for rows that had ended; ``readouts`` complete
    readouts beside those; ``window_bytes`` memory that waited at most; ``replayed`` tokens, times layers, whose
    recurrent state was computed again.
    """

    passes: int = 0
    layer_macs: int | None = None
    left_at: Tensor | None = field(default=None, repr=False)
    readouts: int = 0
    window_bytes: int = 0
    replayed: int = 0


@runtime_checkable
class EngineSession(Protocol):
    """The rows of one decoding session; one owner, never shared between sessions."""

    plan: ExitPlan
    slots: int

    @property
    def kernels(self) -> tuple[str, ...]:
        """Own kernels that its programs launch."""

    def prefill(self, ids: Ids, padding: Tensor | None = None) -> NextLogits:
        """Fill all rows with the prompts (B, T) at full depth: logits (B, V). ``padding`` (B, T): 0 at left pads."""

    def prompt_state(self) -> Any:
        """A copy of what the prompts left behind, before the first token."""

    def adopt(self, prompt: Any) -> None:
        """Go on, in place of ``prefill``, from what another session's ``prompt_state`` gave."""

    def admit(self, row: int, ids: Ids) -> NextLogits:
        """Fill row ``row`` with the prompt (1, T): logits (1, V). Only while nothing waits."""

    def release(self, row: int) -> None:
        """Row ``row`` holds nothing from now on; only while nothing waits."""

    def begin(
        self, ids: RowIds | None, thresholds: Sequence[RowThresholds], idle: RowFlags | None, *, ahead: bool = False
    ) -> None:
        """One token (B,) per row enters; None: the tokens ``chosen`` last. ``idle`` (B,) rows need no logits.

        ``ahead``: whatever can start may start before the results of the step before have been read; an engine that
        does so ignores the next call, which has the same arguments.
        """

    def segment(self, index: int) -> None:
        """Run segment ``index`` over the token, and over the tokens that wait before it; evaluate its exit."""

    def running(self, index: int) -> int:
        """Rows that go on after exit ``index``."""

    def leave(self, index: int) -> None:
        """Every row has left by exit ``index`` or before."""

    def finish(self) -> None:
        """The last segment has run: logits, under ``verify`` of the whole window."""

    def logits(self) -> NextLogits:
        """Float32 logits (B, V) of the newest token, valid until the next ``begin``."""

    def exits(self) -> RowIds:
        """Exit index (B,) of the newest token in every row; idle rows hold any value."""

    def ban(self, tokens: Sequence[int]) -> None:
        """Tokens that ``chosen`` and ``window_chosen`` must not give."""

    def chosen(self) -> tuple[list[int], list[int]]:
        """Greedy token and exit index of every row."""

    def pending(self) -> int:
        """Tokens per row that some layer has not read."""

    def catch_up(self) -> None:
        """Every layer reads everything that waits; under ``verify`` the window's logits are made."""

    def window_logits(self) -> Logits:
        """``verify``: the full model's logits (B, W, V) after every token of the window, after ``finish`` or
        ``catch_up``."""

    def window_chosen(self) -> list[list[int]]:
        """``verify``: the full model's greedy token after every token of the window, per row."""

    def keep(self, counts: Sequence[int]) -> None:
        """``verify``: close the window; every row keeps its first ``counts`` tokens of it, at least 1."""

    def stats(self) -> DecodeStats:
        """What was done since ``prefill`` or the session's start; ``left_at`` and ``readouts`` are the decoder's."""

    def close(self) -> None:
        """Give back what the engine may use again. A session that was closed is not used any more."""


@runtime_checkable
class Engine(Protocol):
    """Opens sessions on one backbone."""

    name: str

    def supports(self, backbone: Backbone, plan: ExitPlan, slots: int) -> str | None:
        """Why this engine cannot carry out the plan; None if it can."""

    def prefers(self, backbone: Backbone) -> bool:
        """Whether this engine is taken without being named, where it supports the plan."""

    def open(self, backbone: Backbone, plan: ExitPlan, slots: int) -> EngineSession:
        """A session of ``slots`` empty rows. Raises RuntimeError if its memory or programs cannot be made."""


#: Engines by name, in the order in which they are tried; ``register`` adds one from outside.
ENGINES: Registry[Engine] = Registry("engine", {})
