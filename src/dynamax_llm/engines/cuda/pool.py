"""Recorded programs are costly to make, so they are used again: by one session at a time.

A session takes a runner that no other session holds, or makes one; ``give_back`` lets the next session have it. Idle
runners are kept with their backbone, the least recently used one goes first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dynamax_llm.backbones import Backbone
from dynamax_llm.engines.cuda.graphs import LOCK
from dynamax_llm.engines.cuda.runner import GraphRunner
from dynamax_llm.engines.cuda.tiles import power_of_two
from dynamax_llm.engines.cuda.window import WindowRunner
from dynamax_llm.engines.plan import ExitPlan

#: Idle runners kept per backbone: each holds caches and recorded programs for one batch size and estimator.
KEPT = 4


@torch.no_grad()
def take(backbone: Backbone, plan: ExitPlan, slots: int) -> tuple[tuple[Any, ...], GraphRunner]:
    """A runner that no session holds, and its key. Raises RuntimeError if its programs cannot be made."""
    key = _key(backbone, plan, slots)
    with LOCK:
        idle = backbone.machines.get(key, [])
        if idle:
            return key, idle.pop()
        policy, exits = plan.policy, plan.layers[: plan.active]
        parts = (backbone, exits, plan.estimator, plan.readout, slots, plan.full)
        if policy.exact_state:
            most = power_of_two(max(plan.window, 2))
            runner: GraphRunner = WindowRunner(*parts, most, journal=policy.exact_output)
        else:
            runner = GraphRunner(*parts)
        runner.record()
        return key, runner


def give_back(backbone: Backbone, key: tuple[Any, ...], runner: GraphRunner) -> None:
    """The runner is idle."""
    with LOCK:
        kept = backbone.machines
        kept.setdefault(key, []).append(runner)
        kept.move_to_end(key)
        while sum(map(len, kept.values())) > KEPT:
            oldest = next(iter(kept))
            if kept[oldest]:
                kept[oldest].pop(0)
            if not kept[oldest]:
                del kept[oldest]


def _key(backbone: Backbone, plan: ExitPlan, slots: int) -> tuple[Any, ...]:
    """What a runner's programs depend on; weights by where they lie and what they were."""
    own = [*plan.estimator.parameters(), *plan.estimator.buffers()] if isinstance(plan.estimator, nn.Module) else []
    # Inference tensors do not count their versions; nothing can change them in place either.
    weights = hash(
        tuple(
            (part.data_ptr(), 0 if part.is_inference() else part._version)
            for part in (*backbone.model.parameters(), *own)
        )
    )
    policy, exits = plan.policy, plan.layers[: plan.active]
    most = power_of_two(max(plan.window, 2)) if policy.exact_state else 1
    return slots, most, policy.exact_output, exits, plan.full, id(plan.estimator), plan.readout.config, weights
