"""One model on one device with its prompts: full continuations, policies' continuations, agreement along a text."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from dynamax_llm.backbones import adapt
from dynamax_llm.backbones.loading import load, shipped_exits
from dynamax_llm.decoding import POLICIES, EarlyExit, EarlyExitOutput
from dynamax_llm.engines.plan import DEFAULT_WINDOW
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import HEADS
from dynamax_llm.traces.teacher_forced import step_by_step, teacher_forced

#: Estimators: the shipped heads, the best fixed measure, and a fixed exit, which no confidence decides.
MEASURE, STATIC = "softmax_margin", "static"
ESTIMATORS = (*HEADS, MEASURE, STATIC)
#: Policies whose decisions over a given text one parallel pass gives.
PARALLEL = ("propagate", "defer")
#: Rows per parallel pass over a text: (rows, tokens, vocabulary) float32 logits are held several times.
TEXT_ROWS = 16

#: What is run: every policy with its ordinary window, and ``verify`` with a short one.
RUNS = (*POLICIES, "verify-4")

Threshold = float | str | list[float | str]


def window_of(run: str) -> tuple[str, int]:
    """The policy of a run and how many tokens may wait: "verify-4" is ``verify`` with a window of 4."""
    policy, _, window = run.partition("-")
    return policy, int(window) if window else DEFAULT_WINDOW


class Bench:
    """A shipped backbone with texts (N, P + T) of ``prompt`` tokens P and what really follows them."""

    def __init__(self, name: str, device: str, texts: Tensor, prompt: int, batch: int) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.name, self.prompt, self.batch = name, prompt, batch
        self.model, self.tokenizer = load(name, dtype="float32", device_map=device)
        self.backbone = adapt(self.model)
        self.texts = texts.to(device)
        self.new = texts.shape[1] - prompt

    def defines(self, run: str) -> bool:
        """Whether this backbone's layers know the policy."""
        return set(self.backbone.kinds) <= set(POLICIES[window_of(run)[0]].kinds)

    def early(self, estimator: str, run: str, threshold: Threshold) -> EarlyExit:
        """What decides and what happens then."""
        plain, (policy, window) = estimator not in HEADS, window_of(run)
        # A fixed exit asks nothing; the cosine is the cheapest measure, and never below 0.
        measure = {MEASURE: MEASURE, STATIC: "state_similarity"}.get(estimator)
        exits = self._exits(None if plain else estimator)
        return EarlyExit(exits, threshold=threshold, policy=policy, window=window, measure=measure)

    @functools.cache  # noqa: B019 - a bench lives as long as its process
    def _exits(self, head: str | None) -> Exits:
        """The heads at the paper's four depths: what is recorded here was measured with them."""
        if head is None:
            return Exits.untrained(self.backbone)
        return Exits.from_pretrained(shipped_exits(self.name, f"four/{head}"))

    @functools.cached_property
    def full(self) -> Tensor:
        """Prompts and the full model's own greedy continuations (N, P + T), by Hugging Face's ``generate``."""
        return torch.cat([generate(self.model, part, self.new) for part in self.prompts(len(self.texts))])

    def prompts(self, count: int) -> list[Tensor]:
        """The first ``count`` prompts in batches (B, P)."""
        return list(self.texts[:count, : self.prompt].split(self.batch))

    def run(self, early: EarlyExit, count: int, new: int) -> list[EarlyExitOutput]:
        """Free generation of ``new`` tokens, batch by batch."""
        return [generate(self.model, part, new, early) for part in self.prompts(count)]

    def depth(self, early: EarlyExit, count: int, new: int) -> float:
        """Mean share of the layers run in free generation."""
        layers = torch.cat([out.exit_layers for out in self.run(early, count, new)])
        return float(layers.float().mean()) / self.backbone.n_layers

    @functools.cache  # noqa: B019
    def choices(self, own: bool) -> Tensor:
        """The full model's argmax (N, T - 1) after each new token but the last, along a text: see ``text``."""
        parts = self.text(own)[:, :-1].split(TEXT_ROWS)
        with torch.no_grad():
            return torch.cat([self.model(part).logits[:, self.prompt :].argmax(-1) for part in parts])

    def text(self, own: bool) -> Tensor:
        """(N, P + T): prompts with the full model's continuations (``own``), or with what really follows them."""
        return self.full if own else self.texts

    def agreement(self, early: EarlyExit, own: bool) -> tuple[list[int], float]:
        """Tokens per prompt, of T - 1, that equal the full model's given the same prefix; mean depth along the text."""
        backbone, plan, costs = early.attach(self.model)
        parallel = plan.policy.name in PARALLEL
        simulate_exits, rows = (teacher_forced, TEXT_ROWS) if parallel else (step_by_step, self.batch)
        thresholds, full = early.thresholds.values[: len(plan.layers)], len(costs.depths) - 1
        agreeing, layers = [], []
        for part, choice in zip(self.text(own)[:, :-1].split(rows), self.choices(own).split(rows), strict=True):
            found = simulate_exits(backbone, plan, part, thresholds, prompt_length=self.prompt)
            agreeing += (found.tokens[:, self.prompt :] == choice).sum(1).tolist()
            taken = found.exit_index[:, self.prompt :]
            layers.append(costs.layers(torch.where(taken == len(plan.layers), full, taken)))
        return agreeing, float(torch.cat(layers).float().mean()) / backbone.n_layers


def generate(model: Any, ids: Tensor, new: int, early: EarlyExit | None = None) -> Any:
    """Exactly ``new`` greedy tokens after ids (B, P): the sequences (B, P + new), or an EarlyExitOutput."""
    extra = {} if early is None else {"custom_generate": early}
    mask = torch.ones_like(ids)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True, **extra
    )


def first_difference(one: list[int], other: list[int]) -> int:
    """Tokens before the first that differs; all of them if none does."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=True)))
