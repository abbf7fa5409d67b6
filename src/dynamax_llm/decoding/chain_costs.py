"""What a draft's chains cost on this machine, with this engine and these threads.

Every figure is a ratio to full-depth steps just before and after it, so that a machine whose speed drifts does not
matter; medians over repeats, after one that is not counted. Random tokens: no cost depends on what they are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.decoder import Decoder
from dynamax_llm.decoding.draft_choice import ChainCosts, Setting, drafts, setting
from dynamax_llm.engines.choose import open_session
from dynamax_llm.engines.plan import POLICIES, ExitPlan
from dynamax_llm.errors import UsageError
from dynamax_llm.exits.artifact import Exits

#: Tokens of a window at most, proposals and the token they follow.
CHAIN_WINDOW = 9
#: Tokens of the prompt, and repeats that count.
PROMPT, REPEATS = 64, 5


@torch.no_grad()
def measure_costs(
    backbone: Backbone,
    exits: Exits,
    batch_size: int = 1,
    *,
    window: int = CHAIN_WINDOW,
    engine: str | None = None,
    repeats: int = REPEATS,
) -> tuple[ChainCosts, Setting]:
    """Costs of a draft step and of verifications of 1 to ``window`` tokens, and the setting they hold in.

    Raises UsageError for exits that are no draft, a size below 1, or an engine that cannot run them; what
    ``Exits.check_backbone`` raises.
    """
    if not drafts(exits):
        raise UsageError(f"exits with the readout {exits.config.readout!r} are no draft: there are no chains to time.")
    if batch_size < 1 or window < 2 or repeats < 1:
        raise UsageError(
            f"batch_size {batch_size!r}, window {window!r}, repeats {repeats!r}: give at least 1, 2 and 1."
        )
    exits.check_backbone(backbone)
    if exits.heads is not None:
        exits.heads.to(backbone.device)
    clock = _Clock(backbone, exits, batch_size, window, engine)
    try:
        found = [clock.repeat() for _ in range(repeats + 1)][1:]
    finally:
        clock.close()
    draft = statistics.median(one.draft for one in found)
    passes = tuple(statistics.median(one.passes[width] for one in found) for width in range(window))
    step = statistics.median(one.step_seconds or 0.0 for one in found)
    costs = ChainCosts(draft=draft, passes=passes, step_seconds=step)
    return costs, setting(backbone.device, backbone.dtype, clock.engine, batch_size)


class _Clock:
    """Two sessions on the same prompts: one at full depth, one that drafts and verifies."""

    def __init__(self, backbone: Backbone, exits: Exits, batch_size: int, window: int, engine: str | None) -> None:
        self.device, self.rows, self.window = backbone.device, batch_size, window
        layers, estimator, readout = exits.config.layers, exits.estimator(), exits.readout(backbone)
        full = ExitPlan(layers, estimator, readout, POLICIES["propagate"], active=0)
        chained = ExitPlan(layers, estimator, readout, POLICIES["verify"], window)
        self.open, self.closed = [(0.0,)] * batch_size, [(None,)] * batch_size
        longest = backbone.max_positions()
        length = PROMPT if longest is None else max(1, min(PROMPT, longest // 4))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, backbone.vocab_size, (batch_size, length), generator=generator).to(self.device)
        plain, _ = open_session(backbone, full, batch_size, engine)
        draft, self.engine = open_session(backbone, chained, batch_size, engine)
        self.sessions = (plain, draft)
        self.plain, self.draft = Decoder(plain), Decoder(draft)
        self.newest = ids[:, -1].clone()
        for session in self.sessions:
            session.prefill(ids)
            session.ban(())
        # Nothing grows without bound: a context that is nearly full goes back to the prompt.
        self.prompts = [session.prompt_state() for session in self.sessions]
        self.room = None if longest is None else longest - length - 1
        self.used = 0

    def close(self) -> None:
        for session in self.sessions:
            session.close()

    def repeat(self) -> ChainCosts:
        """Every width once, each between two full steps."""
        drafts, passes, steps = [], [], []
        before = self._seconds(self._step)
        for width in range(1, self.window + 1):
            self._make_room(width)
            drafting = self._seconds(partial(self._chain, width - 1))
            verifying = self._seconds(partial(self._verify, width))
            after = self._seconds(self._step)
            unit = (before + after) / 2
            if width > 1:
                drafts.append(drafting / (width - 1) / unit)
            passes.append(verifying / unit)
            steps.append(after)
            before = after
        return ChainCosts(draft=statistics.median(drafts), passes=tuple(passes), step_seconds=statistics.median(steps))

    def _make_room(self, width: int) -> None:
        self.used += width + 1
        if self.room is not None and self.used > self.room:
            for session, prompt in zip(self.sessions, self.prompts, strict=True):
                session.adopt(prompt)
            self.used = width + 1

    def _step(self) -> None:
        self.plain.step(self.newest, self.closed)
        self.plain.session.chosen()

    def _chain(self, steps: int) -> None:
        for step in range(steps):
            self.draft.step(None if step else self.newest, self.open)
            self.draft.session.chosen()

    def _verify(self, width: int) -> None:
        """One pass over the window; all but a part of it is taken back, as mostly happens."""
        self.draft.step(None if width > 1 else self.newest, self.closed)
        self.draft.session.window_chosen()
        self.draft.keep([(width + 1) // 2] * self.rows)

    def _seconds(self, call: Callable[[], None]) -> float:
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
