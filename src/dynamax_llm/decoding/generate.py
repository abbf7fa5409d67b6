"""Early exits as a ``custom_generate`` of Hugging Face's own ``generate``.

    out = model.generate(**inputs, custom_generate=EarlyExit(exits, threshold=0.9), max_new_tokens=64)
    out.sequences, out.exit_layers, out.trace.counted_reduction
    model.generate(**inputs, custom_generate=EarlyExit(exits, policy="verify"))  # the full model's own text
    model.generate(**inputs, custom_generate=EarlyExit(exits, promise="agreement>=0.98"))  # calibrated thresholds

``generate`` prepares inputs, logits processors and stopping criteria; the session calls them exactly as Hugging Face's
sampling loop does, so that never exiting gives ``generate``'s own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.draft_choice import DraftChoice
from dynamax_llm.decoding.draft_control import DraftControl
from dynamax_llm.decoding.drafting import Drafting, control
from dynamax_llm.decoding.output import EarlyExitOutput, columns, kept_scores
from dynamax_llm.decoding.request import Request
from dynamax_llm.decoding.request_checks import caller_arguments, check_prompt, check_request
from dynamax_llm.decoding.rows import Event
from dynamax_llm.decoding.sampler import RequestSampler
from dynamax_llm.decoding.session import Session
from dynamax_llm.decoding.thresholds import NEVER, Threshold, Thresholds
from dynamax_llm.decoding.trace import TokenCosts, Trace
from dynamax_llm.engines.base import EngineSession
from dynamax_llm.engines.choose import check_engine, open_session
from dynamax_llm.engines.plan import DEFAULT_WINDOW, POLICIES, ExitPlan
from dynamax_llm.errors import PolicyMismatchError, UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.promise import Promise
from dynamax_llm.exits.registries import MEASURES

#: What decides where nothing is named.
DEFAULT_THRESHOLD, DEFAULT_POLICY = 0.9, "propagate"

#: Called after every step with the new tokens (B,) and the layers each ran (B,), 0 for a row that had ended.
OnToken = Callable[[Tensor, Tensor], None]


class Attached(NamedTuple):
    """What decoding one model takes."""

    backbone: Backbone
    plan: ExitPlan
    costs: TokenCosts


class _Prepared(NamedTuple):
    """What decoding takes, the thresholds in force, and a draft's choice for this case."""

    attached: Attached
    thresholds: Thresholds
    choice: DraftChoice | None


class EarlyExit:
    """Generate with as many layers as each token needs.

    ``threshold``: the least confidence that lets a token leave, one or one per exit, in [0, 1] or "never". One for all
    exits rises at each by the exits' ``drift_penalty``; one per exit is taken as it is.
    A draft without threshold, window and policy is decoded under "verify" with those that calibration or training chose
    for this device and batch size, the nearest otherwise; at full depth where no chain pays. ``out.drafting`` says so.
    ``policy``: what happens to skipped layers' state: "propagate", "copy", "stale" (approximate state), "defer" (exact
    state) or "verify" (exact state and the full model's own output).
    ``window``: tokens per row that may wait under ``defer``, or be drafted under ``verify``, at least 1.
    ``measure``: decide by this confidence measure instead of the trained head; ``confidence``: by an estimator of your
    own.
    ``adaptive``: under ``verify``, whether drafting rests while it does not pay (``decoding/draft_control.py``).
    ``schedule``: "fixed", or CALM's "decaying". ``on_token`` is called after every step (streaming).
    ``engine``: the name of an engine, or None for the fastest that can; the output says which ran.
    ``promise``: one that calibration recorded with the exits, "agreement>=0.98" for instance; thresholds, policy,
    window and estimator are then its own, kept as ``promise``. Naming another of these beside it is refused
    (PolicyMismatchError, UsageError), so is a promise that is not recorded (PromiseError).
    Raises UsageError for values that are not allowed, ArtifactMismatchError when used on another backbone.
    """

    def __init__(
        self,
        exits: Exits,
        *,
        threshold: Threshold | Sequence[Threshold] | None = None,
        policy: str | None = None,
        window: int | None = None,
        measure: str | None = None,
        confidence: ConfidenceEstimator | None = None,
        schedule: str = "fixed",
        promise: str | None = None,
        on_token: OnToken | None = None,
        engine: str | None = None,
        adaptive: bool = True,
    ) -> None:
        self.exits, self.on_token, self.adaptive = exits, on_token, adaptive
        self.promise = None
        if measure is not None and confidence is not None:
            raise UsageError(f"measure {measure!r} beside an estimator of your own: give only one.")
        if promise is not None:
            if confidence is not None:
                raise UsageError(
                    f"confidence beside the promise {promise!r}: it was calibrated with its own estimator."
                )
            self.promise = _promised(exits, promise, threshold, policy, window, measure, schedule)
            threshold = [NEVER if limit is None else limit for limit in self.promise.thresholds]
            policy, window = self.promise.policy, self.promise.window
            measure = self.promise.estimator if self.promise.estimator in MEASURES else None
        own = measure is None and confidence is None
        self.drafting = Drafting(exits, threshold is None and own, window is None)
        if policy is None:
            policy = "verify" if self.drafting.drafts else DEFAULT_POLICY
        self.policy = POLICIES.lookup(policy)
        self._schedule = schedule
        self._drift = exits.drift_penalty.get(policy, ()) if own else ()
        choice = self.drafting.choice(None, 1, engine)
        if self.drafting.threshold:
            threshold = self.drafting.chosen_threshold(choice)
        if self.drafting.window:
            window = self.drafting.chosen_window(choice)
        self.thresholds = self._parse(DEFAULT_THRESHOLD if threshold is None else threshold)
        self.window = DEFAULT_WINDOW if window is None else window
        if not isinstance(self.window, int) or self.window < 1:
            raise UsageError(f"window {window!r}: give the number of tokens that may wait, a whole number from 1.")
        self.measure = measure
        self.estimator = exits.estimator(measure) if confidence is None else confidence
        check_engine(engine)
        self.engine = engine

    def _parse(self, threshold: Threshold | Sequence[Threshold]) -> Thresholds:
        return Thresholds.parse(threshold, len(self.exits.config.layers), self._schedule, self._drift)

    def attach(self, model: nn.Module, thresholds: Thresholds | None = None, batch_size: int = 1) -> Attached:
        """What decoding ``model`` takes; ``thresholds`` in place of its own, ``batch_size`` rows at once.

        Raises ArtifactMismatchError, PolicyMismatchError, UnsupportedModelError."""
        return self._prepare(model, thresholds, batch_size).attached

    def _prepare(self, model: nn.Module, thresholds: Thresholds | None, batch_size: int) -> _Prepared:
        backbone = self.exits.drive(model)
        readout = self.exits.readout(backbone)
        self.policy.check(backbone, readout)
        backbone.refresh()
        if isinstance(self.estimator, nn.Module):
            self.estimator.to(backbone.device)
        choice = self.drafting.choice(backbone, batch_size, self.engine)
        if thresholds is None:
            thresholds = self.thresholds
            if self.drafting.threshold:
                thresholds = self._parse(self.drafting.chosen_threshold(choice))
        window = self.drafting.chosen_window(choice) if self.drafting.window else self.window
        policy = self.policy
        if self.drafting.drafts and not thresholds.active:  # full depth, with no window to keep
            policy = POLICIES[DEFAULT_POLICY]
        plan = ExitPlan(self.exits.config.layers, self.estimator, readout, policy, window, thresholds.active)
        return _Prepared(Attached(backbone, plan, TokenCosts.of(backbone.costs(), plan)), thresholds, choice)

    def _control(self, found: Attached, choice: DraftChoice | None) -> DraftControl | None:
        """What switches a session's drafting off and on."""
        wanted = self.adaptive and found.plan.policy.exact_output and found.plan.active
        return control(choice, found.costs) if wanted else None

    @torch.no_grad()
    def open(self, model: nn.Module, slots: int = 1) -> Session:
        """A session of ``slots`` rows on ``model``, all exits open to rows that bring thresholds of their own.

        Raises what ``attach`` raises, and UsageError if no engine can run it.
        """
        if not isinstance(slots, int) or slots < 1:
            raise UsageError(f"slots {slots!r}: give the number of rows, a whole number from 1.")
        every = Thresholds((0.0,) * len(self.exits.config.layers))
        own = self._prepare(model, None, slots).thresholds
        found, _, choice = self._prepare(model, every, slots)
        session, _ = open_session(found.backbone, found.plan, slots, self.engine)
        return Session(session, own, control=self._control(found, choice))

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        on_token: OnToken | None = None,
        threshold: Threshold | Sequence[Threshold] | None = None,
        **model_kwargs: Any,
    ) -> EarlyExitOutput | Tensor:
        """Hugging Face's ``custom_generate`` protocol; called by ``model.generate``, not by you.

        ``on_token`` and ``threshold`` may be given to ``generate`` and hold for that call. ``streamer`` is honoured.
        """
        caller = caller_arguments()
        if caller.get("assistant_model") is not None:
            raise UsageError("assistant_model: policy='verify' drafts with the exits. Leave assistant_model out.")
        check_request(generation_config, model_kwargs, self.policy, logits_processor)
        found, thresholds, choice = self._prepare(model, self._per_call(threshold), len(input_ids))
        padding = model_kwargs.get("attention_mask")
        request = Request(input_ids, logits_processor, stopping_criteria, generation_config)
        new = request.max_length - input_ids.shape[1]
        check_prompt(found.backbone, input_ids, padding, model_kwargs.get("position_ids"), new)
        streamer = caller.get("streamer")
        engine, name = open_session(found.backbone, found.plan, len(input_ids), self.engine)
        try:
            session = Session(engine, thresholds, RequestSampler(request), self._control(found, choice))
            events = session.fill(input_ids, padding, self._prefill(engine, input_ids, padding), new)
            self._run(session, events, found.costs, request, on_token or self.on_token, streamer)
            out = self._output(session, found.costs, choice, request, name)
        finally:
            engine.close()
            if streamer is not None:
                streamer.end()
        return out.sequences if caller.get("return_dict_in_generate") is False else out

    def _per_call(self, threshold: Threshold | Sequence[Threshold] | None) -> Thresholds | None:
        if threshold is None:
            return None
        if self.promise is not None:
            raise UsageError(
                f"threshold {threshold!r} beside the promise {self.promise.text!r}: its thresholds are the calibrated "
                "ones. Give only one."
            )
        return self._parse(threshold)

    def _prefill(self, engine: EngineSession, ids: Tensor, padding: Tensor | None) -> Tensor:
        """Logits (B, V) after the prompt (B, T). Evaluation overrides it to run a prompt once for many settings."""
        return engine.prefill(ids, padding)

    @staticmethod
    def _run(
        session: Session,
        events: list[Event],
        costs: TokenCosts,
        request: Request,
        on_token: OnToken | None,
        streamer: Any,
    ) -> None:
        """Steps until every row has ended; complete columns of tokens are handed out as they come."""
        done = 0
        while True:
            if on_token is not None or streamer is not None:
                done = _hand_out(session, done, costs, int(request.pad), on_token, streamer)
            if not session.live:
                return
            session.step()

    def _output(
        self, session: Session, costs: TokenCosts, choice: DraftChoice | None, request: Request, engine: str
    ) -> EarlyExitOutput:
        rows = [row for row in session.rows if row is not None]
        sequences, exit_index = columns(rows, int(request.pad))
        trace = Trace(exit_index, costs, self.policy.name, session.decoder.stats())
        return EarlyExitOutput(
            sequences=sequences,
            exit_layers=trace.exit_layers,
            trace=trace,
            verification=session.verification if self.policy.exact_output else None,
            engine=engine,
            drafting=self.drafting.sentence(choice, session.verification),
            kernels=list(session.engine.kernels),  # not a tuple: pipelines take those for per-row values
            **kept_scores(rows, request.wants_scores, request.wants_logits),
        )


def _hand_out(session: Session, done: int, costs: TokenCosts, pad: int, on_token: OnToken | None, streamer: Any) -> int:
    """Give away columns of new tokens that every row has, from column ``done`` on; returns how many there are now."""
    rows = [row for row in session.rows if row is not None]
    longest = max(len(row.tokens) for row in rows)
    while done < longest and not any(len(row.tokens) <= done and session.is_live(row) for row in rows):
        device = rows[0].prompt.device
        tokens = torch.tensor([row.tokens[done] if done < len(row.tokens) else pad for row in rows], device=device)
        exits = torch.tensor([row.exits[done] if done < len(row.exits) else -1 for row in rows], device=device)
        if on_token is not None:
            on_token(tokens, costs.layers(exits))
        if streamer is not None:
            streamer.put(tokens.cpu())
        done += 1
    return done


def _promised(
    exits: Exits,
    text: str,
    threshold: object,
    policy: str | None,
    window: int | None,
    measure: str | None,
    schedule: str,
) -> Promise:
    """The recorded promise, unless what is named beside it is not what it was calibrated with."""
    if threshold is not None or schedule != "fixed":
        named = f"threshold {threshold!r}" if threshold is not None else f"schedule {schedule!r}"
        raise UsageError(f"{named} beside the promise {text!r}: its thresholds are the calibrated ones. Give only one.")
    if policy is not None:
        POLICIES.lookup(policy)
    promise = exits.promise(text, policy, measure)
    if window not in (None, promise.window):
        raise PolicyMismatchError(
            f"window {window!r}: the promise {promise.text!r} was calibrated with a window of {promise.window}. "
            "Leave it out, or calibrate with another."
        )
    return promise
