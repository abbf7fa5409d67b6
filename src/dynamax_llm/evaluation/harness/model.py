"""lm-evaluation-harness's own model class with early exits, in generation and in log-likelihood.

``DynamaxLM`` goes wherever the harness takes a model: ``lm_eval.simple_evaluate(model=DynamaxLM(…), tasks=[…])``.

    generation       ``model.generate(custom_generate=EarlyExit(…))``; a row ends where its text holds a stop sequence
    log-likelihood   the context is a prompt, at full depth; the continuation is decoded teacher-forced with exits on,
                     and each of its tokens is scored by the logits of the exit it left by
    no exit open     thresholds of "never", and log-likelihood under ``verify``, whose logits are the full model's: the
                     harness's own code runs on the stock model
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from dynamax_llm.decoding import EarlyExit
from dynamax_llm.decoding.generate import EarlyExitOutput
from dynamax_llm.decoding.trace import TokenCosts
from dynamax_llm.errors import UsageError
from dynamax_llm.traces.teacher_forced import step_by_step, teacher_forced

try:
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise UsageError(
        f"evaluation runs on lm-evaluation-harness, which is not installed ({error}). "
        "Install it: pip install 'dynamax-llm[eval]'."
    ) from error

#: A request of the harness: (context,) to generate, (context, continuation) to score.
Key = tuple[str, ...]
#: A log-likelihood request: its texts, and the tokens of context and continuation.
Scored = tuple[tuple[str, str] | None, list[int], list[int]]


@dataclass(frozen=True)
class Answer:
    """How one request was answered: its tokens until the row's end, the layers each ran, shares saved, seconds.

    ``reduction`` counts multiply-accumulates, ``passes`` layer passes at batch 1; under policies in which rows share
    windows both are the whole batch's. ``seconds`` is the batch's time, prompts included, over its rows.
    """

    tokens: tuple[int, ...]
    layers: tuple[int, ...]
    reduction: float
    passes: float
    seconds: float


class StopAtText(StoppingCriteria):
    """Ends a row once its new text holds one of ``stops``.

    The harness's own criterion ends a batch when all rows have met a stop; each row's text up to its stop is the same.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], prompt: int) -> None:
        self.tokenizer, self.prompt = tokenizer, prompt
        # A stop may be generated as other tokens than it is encoded in: two more are decoded, as in the harness.
        self.stops = [(stop, len(tokenizer.encode(stop, add_special_tokens=False)) + 2) for stop in stops if stop]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        new = input_ids[:, self.prompt :]
        for stop, length in self.stops:
            texts = self.tokenizer.batch_decode(new[:, -length:])
            ended |= torch.tensor([stop in text for text in texts], device=ended.device)
        return ended


class DynamaxLM(HFLM):
    """The harness's Hugging Face model class, with the exits of ``early_exit``; None is the stock class.

    ``answers`` keeps, by request, what each answer cost. ``full_macs`` and ``full_layers`` are what a token costs and
    runs in the full model, by default this model's own; a pruned model is counted against the whole one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        early_exit: EarlyExit | None = None,
        *,
        batch_size: int = 1,
        full_macs: int | None = None,
        full_layers: int | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.early_exit, self.full_macs, self.full_layers = early_exit, full_macs, full_layers
        self.answers: dict[Key, Answer] = {}
        self._prompts: list[str] = []

    def tok_batch_encode(self, strings: list[str], *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """The harness's encoding; keeps the prompts of the next generation's rows."""
        self._prompts = list(strings)
        return super().tok_batch_encode(strings, *arguments, **options)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Token ids (B, prompt + new), as the harness wants them."""
        if self.early_exit is None:
            return super()._model_generate(context, max_length, stop, **options)
        if not options.get("do_sample"):  # the harness's greedy temperature 0 is not valid in generate
            options = {**options, "do_sample": False}
            options.pop("temperature", None)
        stops = StoppingCriteriaList([StopAtText(self.tokenizer, stop, context.shape[1])])
        start = time.perf_counter()
        out = self.model.generate(
            input_ids=context,
            max_length=max_length,
            stopping_criteria=stops,
            pad_token_id=self.tokenizer.pad_token_id,
            custom_generate=self.early_exit,
            **options,
        )
        self._note(out, (time.perf_counter() - start) / len(context))
        return out.sequences

    def _note(self, out: EarlyExitOutput, seconds: float) -> None:
        trace, new = out.trace, out.exit_layers.shape[1]
        rows = zip(self._prompts, out.sequences[:, -new:].tolist(), trace.exit_index.tolist(), strict=True)
        for text, tokens, exits in rows:
            left = [index for index in exits if index >= 0]
            depths = tuple(trace.costs.depths[index] for index in left)
            if self._in_place:
                saved, passes = self._saved(trace.costs, left), self._passes(trace.costs, depths)
            else:
                saved, passes = trace.counted_reduction, trace.pass_reduction
            self.answers[(text,)] = Answer(tuple(tokens[: len(left)]), depths, saved, passes, seconds)

    @property
    def _in_place(self) -> bool:
        """Whether a token's whole cost is known when it leaves, so that every row has a cost of its own."""
        early = self.early_exit
        return early is None or not early.thresholds.active or not early.policy.exact_state

    def _saved(self, costs: TokenCosts, left: Sequence[int]) -> float:
        """Share of the full model's multiply-accumulates that tokens which left by these exits did not take."""
        full = (self.full_macs or costs.full) * len(left)
        return 1.0 - sum(costs.by_exit[index] for index in left) / full if left else 0.0

    def _passes(self, costs: TokenCosts, depths: Sequence[int]) -> float:
        """Share of the layer passes not made at batch 1; the first token comes from the prompt, which is apart."""
        n_layers = self.full_layers or costs.depths[-1]
        return 1.0 - sum(depths[1:]) / (n_layers * (len(depths) - 1)) if len(depths) > 1 else 0.0

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of every continuation after its context."""
        early = self.early_exit
        if early is None or not early.thresholds.active or early.policy.exact_output:
            start = time.perf_counter()
            scores = super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
            self._note_full(requests, (time.perf_counter() - start) / max(len(requests), 1))
            return scores
        order = sorted(range(len(requests)), key=lambda index: -sum(map(len, requests[index][1:])))
        size = override_bs or self.batch_size
        if not isinstance(size, int):
            raise UsageError(f"batch_size {size!r}: with exits on give a whole number of rows.")
        size = size if early.policy.name in ("propagate", "defer") else 1
        results: dict[int, tuple[float, bool]] = {}
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            results.update(zip(chosen, self._score([requests[index] for index in chosen], early), strict=True))
        return [results[index] for index in range(len(requests))]

    @torch.no_grad()
    def _score(self, requests: Sequence[Scored], early: EarlyExit) -> list[tuple[float, bool]]:
        """One batch, padded on the right, in one pass."""
        start = time.perf_counter()
        backbone, plan, costs = early.attach(self.model)
        texts = [(context + continuation)[-(self.max_length + 1) :][:-1] for _, context, continuation in requests]
        lengths = torch.tensor([len(text) for text in texts])
        scored = torch.tensor([len(continuation) for _, _, continuation in requests])
        width = int(lengths.max())
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=backbone.device)
        # The last token of the context predicts the first of the continuation, as the last of a prompt does.
        prompts = lengths - scored + 1
        place = torch.arange(width)
        wanted = (place >= prompts.unsqueeze(1) - 1) & (place < lengths.unsqueeze(1))
        thresholds = early.thresholds.values
        if plan.policy.name in ("propagate", "defer"):
            options: dict[str, Any] = {"keep_logits": True, "wanted": wanted.to(ids.device)}
            decoded = teacher_forced(backbone, plan, ids, thresholds, prompt_length=prompts.to(ids.device), **options)
        else:
            decoded = step_by_step(backbone, plan, ids, thresholds, prompt_length=int(prompts[0]))
        assert decoded.logits is not None
        full, results = len(costs.depths) - 1, []
        for row, (key, _, continuation) in enumerate(requests):
            run = wanted[row].to(ids.device)
            tokens = torch.tensor(continuation, device=ids.device)
            scores = torch.log_softmax(decoded.logits[row, run], dim=-1, dtype=self.softmax_dtype)
            likelihood = scores.gather(1, tokens.unsqueeze(1)).sum()
            results.append((float(likelihood), bool((decoded.tokens[row, run] == tokens).all())))
            left = [full if index == len(plan.layers) else index for index in decoded.exit_index[row, run].tolist()]
            self._note_scored(key, continuation, left, costs, (time.perf_counter() - start) / len(requests))
        return results

    def _note_full(self, requests: Sequence[Scored], seconds: float) -> None:
        """Every token of every continuation came from the last layer."""
        if self.early_exit is None:
            return
        costs = self.early_exit.attach(self.model)[2]
        for key, _, continuation in requests:
            self._note_scored(key, continuation, [len(costs.depths) - 1] * len(continuation), costs, seconds)

    def _note_scored(
        self, key: tuple[str, str] | None, tokens: Sequence[int], left: list[int], costs: TokenCosts, seconds: float
    ) -> None:
        if key is None:  # a window of a longer text, which the harness sums itself
            return
        depths = tuple(costs.depths[index] for index in left)
        saved, passes = self._saved(costs, left), self._passes(costs, depths)
        self.answers[key] = Answer(tuple(tokens), depths, saved, passes, seconds)
