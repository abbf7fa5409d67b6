"""The eager engine: opens the session that carries out a plan's state policy."""

from __future__ import annotations

from dynamax_llm.backbones import Backbone
from dynamax_llm.engines.eager.in_place import InPlaceSession
from dynamax_llm.engines.eager.session import EagerSession
from dynamax_llm.engines.eager.waiting import WaitingSession
from dynamax_llm.engines.plan import ExitPlan


class EagerEngine:
    """Plain PyTorch: any device, any family, any policy."""

    name = "eager"

    def supports(self, backbone: Backbone, plan: ExitPlan, slots: int) -> str | None:
        return None

    def prefers(self, backbone: Backbone) -> bool:
        return True

    def open(self, backbone: Backbone, plan: ExitPlan, slots: int) -> EagerSession:
        kind = WaitingSession if plan.policy.exact_state else InPlaceSession
        return kind(backbone, plan, slots)
