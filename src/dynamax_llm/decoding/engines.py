"""Which engine decodes: the GPU engine where it can, plain PyTorch everywhere else."""

from __future__ import annotations

import warnings

from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.decoder import Decoder, ExitPlan
from dynamax_llm.decoding.deferred import new_decoder
from dynamax_llm.engines.cuda.support import obstacle
from dynamax_llm.errors import UsageError

#: ``eager``: plain PyTorch, any device, any family. ``cuda``: recorded programs of own kernels, on a CUDA device.
ENGINES = ("eager", "cuda")
#: Tokens that wait, of all rows together, under the policies that let tokens wait, in the GPU engine.
MOST_WAITING = 256


def check_engine(engine: str | None) -> None:
    """Raise UsageError if no engine has this name; None stands for the fastest that can."""
    if engine is not None and engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}. Available: {', '.join(ENGINES)}; leave it out for the fastest.")


def pick_decoder(
    backbone: Backbone, plan: ExitPlan, padding: Tensor | None = None, *, batch: int = 1, engine: str | None = None
) -> tuple[Decoder, str]:
    """The decoder that carries out the plan's state policy for ``batch`` rows, and the name of its engine.

    Without a name the GPU engine is taken where the weights lie on a CUDA device and it has everything the plan needs;
    if its programs cannot be made after all, for want of memory say, eager takes over with a warning. Raises UsageError
    if ``engine`` is "cuda" and it cannot: naming why, and the way out.
    """
    if engine != "eager":
        reason = _obstacle(backbone, plan, batch)
        if reason is None and (engine == "cuda" or _on_gpu(backbone)):
            from dynamax_llm.decoding import cuda  # Triton is there only where this engine can run

            try:
                return cuda.new_decoder(backbone, plan, padding, batch), "cuda"
            except RuntimeError as error:  # out of memory is one
                said = str(error).strip() or type(error).__name__
                reason = f"its programs could not be made ({said.splitlines()[0][:200].rstrip('. ')})"
                if engine is None:
                    warnings.warn(f"engine 'eager' instead of 'cuda': {reason}.", RuntimeWarning, stacklevel=2)
        if engine == "cuda":
            raise UsageError(f"engine 'cuda' cannot run this: {reason}. Use engine='eager', or leave it out.")
    return new_decoder(backbone, plan, padding), "eager"


def _on_gpu(backbone: Backbone) -> bool:
    return backbone.device.type == "cuda"


def _obstacle(backbone: Backbone, plan: ExitPlan, batch: int) -> str | None:
    policy = plan.policy
    if not (policy.updates_state or policy.exact_state):
        return f"the state policy {policy.name!r} is not one it has; it has 'propagate', 'defer' and 'verify'"
    if policy.exact_state and batch * plan.window > MOST_WAITING:
        return (
            f"{batch} rows with a window of {plan.window} are {batch * plan.window} waiting tokens, and its passes "
            f"take {MOST_WAITING}"
        )
    return obstacle(backbone, plan.estimator, plan.readout)
