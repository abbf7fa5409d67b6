"""The one decode loop, as a ``custom_generate`` of Hugging Face's own ``generate``.

    out = model.generate(**inputs, custom_generate=EarlyExit(exits, threshold=0.9), max_new_tokens=64)
    out.sequences, out.exit_layers, out.trace.counted_reduction
    model.generate(**inputs, custom_generate=EarlyExit(exits, policy="verify"))  # the full model's own text
    model.generate(**inputs, custom_generate=EarlyExit(exits, promise="agreement>=0.98"))  # calibrated thresholds

``generate`` prepares inputs, logits processors and stopping criteria; this loop calls them exactly as Hugging Face's
sampling loop does, so that never exiting gives ``generate``'s own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.decoder import Decoder, ExitPlan
from dynamax_llm.decoding.engines import check_engine, pick_decoder
from dynamax_llm.decoding.greedy import Follow, GreedyRun, GreedyVerifiedRun
from dynamax_llm.decoding.request import Request
from dynamax_llm.decoding.state import DEFAULT_WINDOW, POLICIES
from dynamax_llm.decoding.thresholds import NEVER, Threshold, Thresholds
from dynamax_llm.decoding.trace import TokenCosts, Trace
from dynamax_llm.decoding.verify import Verification, VerifiedRun
from dynamax_llm.errors import PolicyMismatchError, UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.promise import Promise
from dynamax_llm.exits.registries import MEASURES

#: What decides where nothing is said.
DEFAULT_THRESHOLD, DEFAULT_POLICY = 0.9, "propagate"

#: Called after every step with the new tokens (B,) and the layers each ran (B,), 0 for a row that had ended.
OnToken = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class EarlyExitOutput:
    """``sequences`` (B, prompt + new), ``exit_layers`` (B, new) layers run until a token was decided (0 after a row's
    end), the ``trace``, under ``verify`` what became of the proposals, the ``engine`` that ran and its
    own ``kernels``, and per step ``scores`` (processed) and ``logits`` (raw), each (B, V), when asked for; under
    ``verify`` they are 0 after a row's end."""

    sequences: Tensor
    exit_layers: Tensor
    trace: Trace
    verification: Verification | None = None
    engine: str = "eager"
    kernels: tuple[str, ...] = ()
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None


class EarlyExit:
    """Generate with as many layers as each token needs.

    ``threshold``: the least confidence that lets a token leave, one or one per exit, in [0, 1] or "never". One for all
    is what is left of the confidence once what leaving disturbs (``exits.drift_penalty``) is taken off; one per exit is
    the confidence itself.
    ``policy``: what happens to skipped layers' state: "propagate", "copy", "stale" (approximate state), "defer" (exact
    state) or "verify" (exact state and the full model's own output).
    ``window``: tokens per row that may wait under ``defer``, or be drafted under ``verify``, at least 1.
    ``measure``: judge by this confidence measure instead of the trained head.
    ``schedule``: "fixed", or CALM's "decaying". ``on_token`` is called after every step (streaming).
    ``engine``: "eager" (plain PyTorch, anywhere), "cuda" (recorded programs; families, policies and dtypes it has), or
    None for the fastest that can; the output says which ran.
    ``promise``: one that calibration recorded with the exits, "agreement>=0.98" say; thresholds, policy, window and
    judge are then its own, kept as ``promise``. Naming another of these beside it is refused (PolicyMismatchError,
    UsageError), so is a promise that is not recorded (PromiseError).
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
        schedule: str = "fixed",
        promise: str | None = None,
        on_token: OnToken | None = None,
        engine: str | None = None,
    ) -> None:
        self.exits = exits
        self.promise = None
        if promise is not None:
            self.promise = _promised(exits, promise, threshold, policy, window, measure, schedule)
            threshold = [NEVER if bar is None else bar for bar in self.promise.thresholds]
            policy, window = self.promise.policy, self.promise.window
            measure = self.promise.estimator if self.promise.estimator in MEASURES else None
        threshold = DEFAULT_THRESHOLD if threshold is None else threshold
        policy = DEFAULT_POLICY if policy is None else policy
        window = DEFAULT_WINDOW if window is None else window
        self.policy = POLICIES.lookup(policy)
        drift_penalty = exits.drift_penalty.get(policy, ()) if measure is None else ()
        self.thresholds = Thresholds.parse(threshold, len(exits.config.layers), schedule, drift_penalty)
        if not isinstance(window, int) or window < 1:
            raise UsageError(f"window {window!r}: give the number of tokens that may wait, a whole number from 1.")
        self.window = window
        self.measure, self.estimator = measure, exits.estimator(measure)
        self.on_token = on_token
        check_engine(engine)
        self.engine = engine

    def attach(self, model: nn.Module) -> tuple[Backbone, ExitPlan, TokenCosts]:
        """What decoding ``model`` takes. Raises ArtifactMismatchError, PolicyMismatchError, UnsupportedModelError."""
        backbone, config = self.exits.drive(model), self.exits.config
        readout = self.exits.readout(backbone)
        self.policy.check(backbone, readout)
        backbone.refresh()
        active = self.thresholds.active
        estimator = self.estimator
        if isinstance(estimator, nn.Module):
            estimator.to(backbone.device)
        plan = ExitPlan(config.layers[:active], estimator, readout, self.policy, self.window)
        costs = TokenCosts.of(backbone.costs(), config.layers, active, estimator, self.policy, readout)
        return backbone, plan, costs

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> EarlyExitOutput:
        """Hugging Face's ``custom_generate`` protocol; called by ``model.generate``, not by you."""
        _check_request(generation_config, model_kwargs)
        backbone, plan, costs = self.attach(model)
        padding = model_kwargs.get("attention_mask")
        _check_prompt(backbone, input_ids, padding)
        request = Request(input_ids, logits_processor, stopping_criteria, generation_config)
        decoder, engine = pick_decoder(backbone, plan, padding, batch=len(input_ids), engine=self.engine)
        run = self._verified if self.policy.exact_output else self._decoded
        out = run(decoder, request, costs)
        machine = getattr(decoder, "machine", None)
        return replace(out, engine=engine, kernels=() if machine is None else machine.kernels)

    def _decoded(self, decoder: Decoder, request: Request, costs: TokenCosts) -> EarlyExitOutput:
        """Every token is what its exit, or the last layer, says."""
        run = _Run(request)
        horizon, full = request.max_length - request.ids.shape[1], len(self.exits.config.layers)
        logits = self._prefill(decoder, request.ids)
        follower = getattr(decoder, "follow", None)
        if follower is not None and request.is_plain:
            return self._followed(follower, decoder, request, costs, logits)
        exit_index = torch.full((len(request.ids),), full, device=request.ids.device)
        while True:
            tokens = run.append(logits, exit_index)
            if self.on_token is not None:
                self.on_token(tokens, costs.layers(run.exit_index[-1]))
            if run.finished:
                break
            thresholds = self.thresholds.at(len(run.exit_index), horizon)
            step = decoder.step(tokens.unsqueeze(1), thresholds, run.ended)
            logits, exit_index = step.logits, torch.where(step.exit_index == decoder.n_exits, full, step.exit_index)
        trace = self._trace(torch.stack(run.exit_index, dim=1), costs, decoder)
        return EarlyExitOutput(
            sequences=run.ids, exit_layers=trace.exit_layers, scores=run.scores, logits=run.logits, trace=trace
        )

    def _followed(
        self, follow: Follow, decoder: Decoder, request: Request, costs: TokenCosts, logits: Tensor
    ) -> EarlyExitOutput:
        """``_decoded`` where nothing but the likeliest token is asked for: tokens stay on the device between steps."""
        run = GreedyRun(request, follow, self.thresholds, decoder.n_exits, len(self.exits.config.layers))
        hear = self.on_token
        run.run(logits, None if hear is None else lambda tokens, at: hear(tokens, costs.layers(at)))
        trace = self._trace(run.exit_index, costs, decoder)
        return EarlyExitOutput(sequences=run.ids, exit_layers=trace.exit_layers, trace=trace)

    def _prefill(self, decoder: Decoder, ids: Tensor) -> Tensor:
        """Logits (B, V) after the prompt (B, T). Evaluation overrides it to run a prompt once for many settings."""
        return decoder.prefill(ids)

    def _verified(self, decoder: Any, request: Request, costs: TokenCosts) -> EarlyExitOutput:
        """Every token is the full model's."""
        full = len(self.exits.config.layers)

        def to_exits(found: Tensor) -> Tensor:
            return torch.where(found == decoder.n_exits, full, found)

        def on_column(tokens: Tensor, found: Tensor) -> None:
            if self.on_token is not None:
                self.on_token(tokens, costs.layers(to_exits(found)))

        plain = hasattr(decoder, "draft") and request.is_plain and request.bans_throughout
        run = (GreedyVerifiedRun if plain else VerifiedRun)(decoder, request, self.thresholds, on_column)
        run.run()
        columns = range(max(map(len, run.exit_index)))
        trace = self._trace(torch.stack([to_exits(run.column_of_exits(c)) for c in columns], dim=1), costs, decoder)
        new = torch.stack([run.column_of_tokens(c) for c in columns], dim=1)
        return EarlyExitOutput(
            sequences=torch.cat((request.ids, new), dim=1),
            exit_layers=trace.exit_layers,
            trace=trace,
            verification=run.stats,
            scores=_by_step(run.scores) if request.wants_scores else None,
            logits=_by_step(run.logits) if request.wants_logits else None,
        )

    def _trace(self, exit_index: Tensor, costs: TokenCosts, decoder: Decoder) -> Trace:
        spent, full = decoder.spent(), len(self.exits.config.layers)
        if spent.taken is not None:
            spent = replace(spent, taken=torch.where(spent.taken == decoder.n_exits, full, spent.taken))
        return Trace(exit_index, costs, self.policy.name, spent)


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


def _by_step(rows: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """Per step (B, V), from per row and step (V,); zeros after a row's end."""
    empty = torch.zeros_like(rows[0][0])
    steps = range(max(map(len, rows)))
    return tuple(torch.stack([row[step] if step < len(row) else empty for row in rows]) for step in steps)


class _Run:
    """The token side of a generation: what Hugging Face's sampling loop keeps between forwards."""

    def __init__(self, request: Request) -> None:
        self.request, self.ids = request, request.ids
        self.ended = torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids.device)
        self.finished = False
        self.exit_index: list[Tensor] = []
        self.scores: tuple[Tensor, ...] | None = () if request.wants_scores else None
        self.logits: tuple[Tensor, ...] | None = () if request.wants_logits else None

    def append(self, logits: Tensor, exit_index: Tensor) -> Tensor:
        """Choose the next tokens (B,) from logits (B, V) and note where they came from."""
        request = self.request
        logits = logits.to(device=self.ids.device, dtype=torch.float32)
        scores = request.processors(self.ids, logits.clone() if len(request.processors) else logits)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        if request.sample:
            tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if request.has_eos:
            tokens = torch.where(self.ended, request.pad, tokens)
        self.exit_index.append(torch.where(self.ended, -1, exit_index))
        self.ids = torch.cat((self.ids, tokens.unsqueeze(1)), dim=1)
        self.ended = self.ended | request.criteria(self.ids, self.scores)
        self.finished = bool(self.ended.all())
        return tokens


def _check_request(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    if config.num_beams > 1 or config.num_return_sequences > 1:
        raise UsageError(
            f"num_beams={config.num_beams}, num_return_sequences={config.num_return_sequences}: early exit decodes "
            "greedily or by sampling, one sequence per row. Set both to 1; for several samples repeat the prompt."
        )
    if model_kwargs.get("inputs_embeds") is not None:
        raise UsageError("inputs_embeds: early exit starts from token ids. Pass input_ids instead.")
    for name in ("past_key_values", "cache_params"):
        cache = model_kwargs.get(name)
        if cache is not None and getattr(cache, "is_initialized", False):
            raise UsageError(f"{name} already holds tokens: early exit keeps its own cache. Pass the whole prompt.")


def _check_prompt(backbone: Backbone, input_ids: Tensor, padding: Tensor | None) -> None:
    limit, length = backbone.max_positions(), input_ids.shape[1]
    if length == 0:
        raise UsageError("the prompt has no tokens: give at least one.")
    if padding is not None and not bool(padding[:, -1].all()):
        rows = (padding[:, -1] == 0).nonzero().flatten().tolist()
        raise UsageError(
            f"prompts {rows} are padded on the right: new tokens would follow padding. Pad on the left: "
            'tokenizer.padding_side = "left".'
        )
    if limit is not None and length >= limit:
        raise UsageError(
            f"the prompt has {length} tokens; {backbone.model_type} was built for a context of {limit}. "
            f"Shorten the prompt to at most {limit - 1} tokens."
        )
