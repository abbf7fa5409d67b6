"""The GPU engine: recorded programs of own kernels. Triton is imported when a session is opened, not before."""

from __future__ import annotations

from dynamax_llm.backbones import Backbone
from dynamax_llm.engines.base import EngineSession
from dynamax_llm.engines.cuda.support import obstacle
from dynamax_llm.engines.plan import ExitPlan

#: Tokens that wait, of all rows together, under the policies that let tokens wait.
MOST_WAITING = 256


class CudaEngine:
    """CUDA graphs over Triton kernels, for the families, policies and dtypes that ``support`` names."""

    name = "cuda"

    def supports(self, backbone: Backbone, plan: ExitPlan, slots: int) -> str | None:
        policy = plan.policy
        if not (policy.updates_state or policy.exact_state):
            return f"it does not support the state policy {policy.name!r} (supported: 'propagate', 'defer', 'verify')"
        if policy.exact_state and slots * plan.window > MOST_WAITING:
            return (
                f"{slots} rows with a window of {plan.window} are {slots * plan.window} waiting tokens, and its passes "
                f"take {MOST_WAITING}"
            )
        return obstacle(backbone, plan.estimator, plan.readout)

    def prefers(self, backbone: Backbone) -> bool:
        return backbone.device.type == "cuda"

    def open(self, backbone: Backbone, plan: ExitPlan, slots: int) -> EngineSession:
        from dynamax_llm.engines.cuda.session import CudaSession
        from dynamax_llm.engines.cuda.waiting_session import CudaWaitingSession

        kind = CudaWaitingSession if plan.policy.exact_state else CudaSession
        return kind(backbone, plan, slots)
