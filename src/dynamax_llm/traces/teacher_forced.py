"""What decoding a given text would do, in one parallel pass.

Under ``propagate`` the h of a token that left is frozen: at every layer h = where(left, h, layer(h)), and each layer's
state update reads the frozen h. Under ``defer`` h goes on through the layers, and only the h that readout and later
exits' heads read is frozen. Either way one forward over a text is exactly what step-by-step decoding of that text does,
to floating-point noise; calibration, log-likelihood evaluation and on-policy labels rest on it. ``copy`` and ``stale``
leave states that no parallel pass produces: ``step_by_step`` decodes the text with forced tokens, and is the slow twin;
``force_text`` takes whichever the policy allows. Under ``verify`` every token is the full model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.decoder import Decoder
from dynamax_llm.engines.eager import EagerEngine
from dynamax_llm.engines.plan import ExitPlan
from dynamax_llm.exits.features import ExitFeatures, exit_features, select
from dynamax_llm.shapes import Ids, Logits

#: Policies under which one parallel pass gives what step-by-step decoding of a text gives.
PARALLEL = ("propagate", "defer")


@dataclass(frozen=True)
class TeacherForced:
    """Per position of a text (B, T): ``tokens`` the argmax after it, ``exit_index`` where it left (len(exits) for
    full depth), and ``logits`` (B, T, V) float32 if they were kept."""

    tokens: Ids
    exit_index: Ids
    logits: Logits | None = None


@torch.no_grad()
def teacher_forced(
    backbone: Backbone,
    plan: ExitPlan,
    ids: Ids,
    thresholds: Sequence[float | Tensor | None],
    *,
    prompt_length: int | Tensor = 1,
    padding: Tensor | None = None,
    keep_logits: bool = False,
    wanted: Tensor | None = None,
) -> TeacherForced:
    """One pass over ids (B, T) under ``propagate`` or ``defer``. The first ``prompt_length`` positions, one number or
    one per row (B,), run at full depth, as a prompt does; ``padding`` (B, T) is 0 at left pads. Right padding needs no
    mask: everything is causal. Only positions ``wanted`` (B, T) bool, by default all, are read out: elsewhere
    ``tokens`` are -1 and ``logits`` are not defined."""
    assert plan.policy.name in PARALLEL, plan.policy.name
    return _Pass(backbone, plan, ids, prompt_length, padding).run(thresholds, keep_logits, wanted)


@dataclass(frozen=True)
class Visit:
    """What one exit reads of a text: h (B, T, d) and features, frozen where a token had left before, h as the readout
    transforms it, and the argmax ``tokens`` (B, T) of its readout, None if the estimator reads no logits."""

    h: Tensor
    moved: Tensor
    features: ExitFeatures
    tokens: Ids | None


@torch.no_grad()
def visits(
    backbone: Backbone,
    plan: ExitPlan,
    ids: Ids,
    thresholds: Sequence[float | Tensor | None],
    *,
    prompt_length: int | Tensor = 1,
) -> Iterator[Visit]:
    """Exit after exit of ``teacher_forced``, without the layers above the last. Thresholds may differ between rows:
    (B, 1)."""
    run = _Pass(backbone, plan, ids, prompt_length, None)
    for index in range(plan.active):
        yield run.visit(index, thresholds[index])


class _Pass:
    """All tokens of a text in the layers at once."""

    def __init__(
        self, backbone: Backbone, plan: ExitPlan, ids: Tensor, prompt_length: int | Tensor, padding: Tensor | None
    ) -> None:
        self.backbone, self.plan = backbone, plan
        self.padding = None if padding is None or bool(padding.all()) else padding
        self.h = backbone.embed(ids)  # (B, T, d), what the layers read
        self.visible = self.h  # (B, T, d), what readout and estimators read: frozen where a token has left
        self.exact = plan.policy.exact_state
        self.ctx = backbone.context(self.h, padding=self.padding)
        self.left = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
        prompts = torch.as_tensor(prompt_length, device=ids.device).reshape(-1, 1)  # (B or 1, 1)
        self.may_leave = torch.arange(ids.shape[1], device=ids.device) >= prompts
        self.exit_index = torch.full(ids.shape, len(plan.layers), device=ids.device)
        self.features: ExitFeatures | None = None
        self.depth = 0
        self.moved = self.h  # what the readout of the exit by which a token left makes of its h
        self.codes: dict[int, Tensor] = {}  # what the learned state update reads of tokens that left, by exit
        self.seen = self.h  # what estimators read: h, or what the readout made of it when the token left
        self.states = plan.estimator.initial_state(len(self.h), self.h.device)

    def visit(self, index: int, threshold: float | Tensor | None) -> Visit:
        """Run to exit ``index`` and decide there."""
        stop = self.plan.layers[index]
        self._layers(self.depth, stop - 1)
        before = self.visible
        self._layers(stop - 1, stop)
        self.depth = stop
        return self._decide(index, before, threshold)

    def run(
        self, thresholds: Sequence[float | Tensor | None], keep_logits: bool, wanted: Tensor | None
    ) -> TeacherForced:
        backbone, plan = self.backbone, self.plan
        for index in range(plan.active):
            self.visit(index, thresholds[index])
        resumed = backbone.n_layers - plan.readout.tail_layers
        self._layers(self.depth, resumed)
        for layer in range(resumed, backbone.n_layers):  # a tail runs for every token, left or not
            self.visible = self.h = backbone.layer(layer, self.h, None, self.ctx)
        return self._read(keep_logits, wanted)

    def _layers(self, first: int, stop: int) -> None:
        frozen = self.left.unsqueeze(-1)
        for layer in range(first, stop):
            entering = self.h
            for exit, code in self.codes.items():
                read = self.plan.readout.skip_input(exit, layer, self.visible, code)
                entering = torch.where((self.exit_index == exit).unsqueeze(-1), read, entering)
            moved = self.backbone.layer(layer, entering, None, self.ctx)
            self.visible = torch.where(frozen, self.visible, moved)
            self.h = moved if self.exact else self.visible

    def _decide(self, index: int, before: Tensor, threshold: float | Tensor | None) -> Visit:
        estimator, readout = self.plan.estimator, self.plan.readout
        tokens = None
        moved, _ = readout.transform(index, self.visible, None, self.padding)
        if estimator.needs_logits:
            fresh, tokens = readout.features(index, self.visible, before, self.features, moved)
        else:
            fresh = exit_features(self.visible, before, None, self.features)
        self.features = fresh if self.features is None else select(self.left, self.features, fresh)
        seen = moved if readout.heads_read_output else self.visible
        self.seen = torch.where(self.left.unsqueeze(-1), self.seen, seen)
        visit = Visit(self.visible, moved, self.features, tokens)
        state = None if self.states is None else self.states[index]
        confidence, _ = estimator.confidence(index, self.seen, self.features, state, self.padding)
        if threshold is not None:
            leaving = (confidence >= threshold) & self.may_leave & ~self.left
            self.exit_index = torch.where(leaving, index, self.exit_index)
            self.left = self.left | leaving
            self.moved = torch.where(leaving.unsqueeze(-1), moved, self.moved)
            code = readout.skip_code(index, self.visible, moved) if self.plan.policy.updates_state else None
            if code is not None:
                self.codes[index] = code
        return visit

    def _read(self, keep_logits: bool, wanted: Tensor | None) -> TeacherForced:
        tokens = torch.full_like(self.exit_index, -1)
        logits = self.h.new_empty(*tokens.shape, self.backbone.vocab_size, dtype=torch.float32) if keep_logits else None
        for index in range(len(self.plan.layers) + 1):
            rows = self.exit_index == index
            if wanted is not None:
                rows = rows & wanted
            if not bool(rows.any()):
                continue
            full = index == len(self.plan.layers)
            h = (self.visible if full or self.plan.readout.tail_layers else self.moved)[rows].unsqueeze(0)  # (1, n, d)
            read = self.backbone.readout(h) if full else self.plan.readout.logits(index, h)
            tokens[rows] = read[0].argmax(-1)
            if logits is not None:
                logits[rows] = read[0]
        return TeacherForced(tokens, self.exit_index, logits)


def force_text(
    backbone: Backbone, plan: ExitPlan, ids: Ids, thresholds: Sequence[float | None], *, prompt_length: int | Tensor = 1
) -> TeacherForced:
    """``teacher_forced`` where the policy allows one pass, ``step_by_step`` otherwise; right padding alone. Prompts of
    different length (B,) need a policy that allows one pass."""
    if plan.policy.name in PARALLEL:
        return teacher_forced(backbone, plan, ids, thresholds, prompt_length=prompt_length)
    assert isinstance(prompt_length, int)
    return step_by_step(backbone, plan, ids, thresholds, prompt_length=prompt_length)


@torch.no_grad()
def step_by_step(
    backbone: Backbone,
    plan: ExitPlan,
    ids: Ids,
    thresholds: Sequence[float | None],
    *,
    prompt_length: int = 1,
    padding: Tensor | None = None,
) -> TeacherForced:
    """The slow twin of ``teacher_forced``, for any policy but ``verify``: ids (B, T) one token at a time, forced.

    Positions before the last of the prompt are not read out: their ``tokens`` are -1 and their ``logits`` 0.
    """
    batch, count = ids.shape
    assert not plan.policy.exact_output, "a forced text cannot be verified"
    session = EagerEngine().open(backbone, plan, batch)
    decoder, limits = Decoder(session), [tuple(thresholds)] * batch
    logits = torch.zeros(batch, count, backbone.vocab_size, device=ids.device)
    exit_index = torch.full((batch, count), len(plan.layers), device=ids.device)
    pads = None if padding is None else padding[:, :prompt_length]
    logits[:, prompt_length - 1] = session.prefill(ids[:, :prompt_length], pads)
    for position in range(prompt_length, count):
        decoder.step(ids[:, position], limits)
        logits[:, position], exit_index[:, position] = session.logits(), session.exits()
    tokens = logits.argmax(-1)
    tokens[:, : prompt_length - 1] = -1
    return TeacherForced(tokens, exit_index, logits)
