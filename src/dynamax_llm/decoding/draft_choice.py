"""How long a draft's chains are: what a draft and its verification cost, and the choices that are kept with exits.

A choice holds for one device, engine, dtype, number of threads and batch size; where there is none for the case at
hand, the nearest one is taken. Choices lie in ``provenance["chains"]["choices"]`` of the exits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dynamax_llm.errors import ArtifactCorruptError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.registries import READOUTS
from dynamax_llm.version import processor_name

_Share = Annotated[float, Field(ge=0.0, le=1.0)]
_Cost = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class ChainCosts(BaseModel):
    """Costs in units of a full-depth step over one token: of a draft step, and of verification passes over 1, 2, …
    tokens, choosing tokens and closing the window included. ``step_seconds``: that unit, where it was measured."""

    model_config = ConfigDict(frozen=True)

    draft: _Cost
    passes: Annotated[tuple[_Cost, ...], Field(min_length=1)]
    step_seconds: float | None = None

    def window(self, proposals: int) -> float:
        """The cost of so many proposals and their verification."""
        return proposals * self.draft + self.passes[min(proposals, len(self.passes) - 1)]


class Setting(NamedTuple):
    """Where a choice holds."""

    device: str
    engine: str
    dtype: str
    threads: int  # of the CPU; 0 on a GPU
    batch_size: int


def setting(device: torch.device, dtype: torch.dtype, engine: str, batch_size: int) -> Setting:
    """The setting at hand."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else processor_name()
    threads = 0 if on_gpu else torch.get_num_threads()
    return Setting(name, engine, str(dtype).removeprefix("torch."), threads, batch_size)


class DraftChoice(BaseModel):
    """The threshold and window that the expected-gain rule chose in one setting, and the costs it chose by.

    ``tokens`` and ``proposals`` a verification and the ``speed_up`` over full depth are what the trace estimates.
    """

    model_config = ConfigDict(frozen=True)

    device: str
    engine: str
    dtype: str
    threads: int
    batch_size: Annotated[int, Field(ge=1)]
    threshold: _Share
    window: Annotated[int, Field(ge=2)]
    tokens: float
    proposals: float
    speed_up: float
    costs: ChainCosts

    @property
    def pays(self) -> bool:
        """Whether drafting is estimated to be no slower than full depth."""
        return self.speed_up >= 1.0

    @property
    def setting(self) -> Setting:
        return Setting(self.device, self.engine, self.dtype, self.threads, self.batch_size)

    def sentence(self) -> str:
        """What was estimated, in words."""
        where = f"{self.device}, {self.engine}, {self.dtype}, batch size {self.batch_size}"
        where += f", {self.threads} thread{'' if self.threads == 1 else 's'}" if self.threads else ""
        if not self.pays:
            return f"no chain pays here (at best {self.speed_up:.2f}x of full depth; {where})"
        return (
            f"estimated {self.speed_up:.2f}x of full depth at threshold {self.threshold:g}, window {self.window}: "
            f"{self.tokens:.2f} tokens and {self.proposals:.1f} proposals a verification ({where})"
        )


def drafts(exits: Exits) -> bool:
    """Whether the exits are a draft."""
    return READOUTS.lookup(exits.config.readout).drafts


def kept_choices(exits: Exits) -> list[DraftChoice]:
    """The choices that are kept with the exits. Raises ArtifactCorruptError for one that cannot be used."""
    chains = exits.provenance.get("chains")
    records: Sequence[Any] = chains.get("choices", []) if isinstance(chains, dict) else []
    try:
        return [DraftChoice.model_validate(record) for record in records]
    except (ValidationError, TypeError) as error:
        raise ArtifactCorruptError(
            f"provenance chains.choices of these exits cannot be used ({error}). Measure again: dynamax calibrate "
            "MODEL --exits DIR, after deleting the choices there."
        ) from error


def keep_choice(exits: Exits, choice: DraftChoice) -> None:
    """Keep a choice with the exits; it replaces one of the same setting."""
    others = [item for item in kept_choices(exits) if item.setting != choice.setting]
    chains = dict(exits.provenance.get("chains") or {})
    chains["choices"] = [item.model_dump(mode="json") for item in (*others, choice)]
    exits.provenance = {**exits.provenance, "chains": chains}


def nearest(choices: Sequence[DraftChoice], wanted: Setting) -> DraftChoice | None:
    """The choice for this setting, else the nearest: same device before same engine, dtype, threads, batch size."""

    def distance(choice: DraftChoice) -> tuple[float, ...]:
        return (
            float(choice.device != wanted.device),
            float(choice.engine != wanted.engine),
            float(choice.dtype != wanted.dtype),
            abs(choice.threads - wanted.threads),
            abs(math.log2(choice.batch_size / wanted.batch_size)),
        )

    return min(choices, key=distance, default=None)
