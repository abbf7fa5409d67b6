"""Which engine decodes: the one that is named, else the first that prefers the device and supports the plan."""

from __future__ import annotations

import warnings

from dynamax_llm.backbones import Backbone
from dynamax_llm.engines.base import ENGINES, EngineSession
from dynamax_llm.engines.cuda.engine import CudaEngine
from dynamax_llm.engines.eager import EagerEngine
from dynamax_llm.engines.plan import ExitPlan
from dynamax_llm.errors import UsageError

for _engine in (CudaEngine(), EagerEngine()):
    ENGINES.register(_engine.name, _engine)


def check_engine(name: str | None) -> None:
    """Raise UsageError if no engine has this name; None stands for the fastest that can."""
    if name is not None and name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}. Available: {', '.join(ENGINES)}; leave it out for the fastest.")


def open_session(
    backbone: Backbone, plan: ExitPlan, slots: int, engine: str | None = None
) -> tuple[EngineSession, str]:
    """A session of ``slots`` rows that carries out the plan, and the name of its engine.

    Without a name the GPU engine is taken where the weights lie on a CUDA device and it supports the plan; if its
    programs cannot be made, for lack of memory for instance, the next engine takes over with a warning. Raises
    UsageError, with the reason and the way out, if the named engine cannot.
    """
    check_engine(engine)
    for name, candidate in ENGINES.items():
        if engine not in (None, name) or (engine is None and not candidate.prefers(backbone)):
            continue
        reason = candidate.supports(backbone, plan, slots)
        if reason is None:
            try:
                return candidate.open(backbone, plan, slots), name
            except RuntimeError as error:  # out of memory is one
                first = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(". ")
                reason = f"its programs could not be made ({first})"
                if engine is None:
                    warnings.warn(f"engine {name!r} is not used: {reason}.", RuntimeWarning, stacklevel=2)
        if engine is not None:
            raise UsageError(f"engine {name!r} cannot run this: {reason}. Use engine='eager', or leave it out.")
    raise UsageError("no engine can run this plan.")
