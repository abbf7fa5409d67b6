"""What a decoding session carries out: where the exits are, what decides there, and the state policy.

    propagate   every skipped layer updates its state from h_e: its own K/V projections, or its conv window and SSM
                cell. Approximate: later tokens read a state made from h_e instead of from that layer's true input.
    copy        attention only: the layer's previous entry is stored again. Approximate, and cheaper: later tokens
                attend to a repeated neighbour (keys keep the neighbour's position).
    stale       Mamba only: conv window and SSM state keep their values. Approximate, and free: the skipped layers
                never read the token.
    defer       exact state: h_e waits, and the skipped layers run over it when a token next goes deeper. The token
                itself is still chosen from its exit's logits.
    verify      exact output: ``defer``, and the catch-up pass also yields the full model's token after every waiting
                token; the first that differs is replaced and the tokens after it are rolled back.

A token that runs all layers reads exact arithmetic on whatever state the policy left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamax_llm.backbones import Backbone
from dynamax_llm.backbones.cache import KINDS
from dynamax_llm.errors import PolicyMismatchError
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.readouts.base import Readout
from dynamax_llm.registry import Registry

#: Tokens per row that may wait, under the policies that let tokens wait.
DEFAULT_WINDOW = 16
#: The thresholds of one row: per exit, the least confidence that lets a token leave; None where none may.
RowThresholds = tuple[float | None, ...]


@dataclass(frozen=True)
class StatePolicy:
    """What happens to the state of the layers a token skips; engines carry it out.

    ``exact_state``: later tokens read the state that never leaving would have made. ``exact_output``: the tokens are
    the full model's. ``updates_state``: a skipped layer costs its state update. ``kinds``: the kinds of layers it is
    defined for.
    """

    name: str
    exact_state: bool = False
    exact_output: bool = False
    updates_state: bool = False
    kinds: tuple[str, ...] = KINDS

    def check(self, backbone: Backbone, readout: Readout) -> None:
        """Raise PolicyMismatchError if the policy is not defined for this backbone's layers, or with this readout."""
        wrong = sorted(set(backbone.kinds) - set(self.kinds))
        if wrong:
            allowed = [name for name, policy in POLICIES.items() if set(backbone.kinds) <= set(policy.kinds)]
            raise PolicyMismatchError(
                f"state policy {self.name!r} is not defined for the {' and '.join(wrong)} layers of "
                f"{backbone.model_type!r}. Use {', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}."
            )
        if readout.drafts and not self.exact_output:
            raise PolicyMismatchError(
                f"state policy {self.name!r} cannot be used with the readout {readout.kind!r}: a draft runs no layer, "
                "and its tokens must be checked. Use the policy 'verify', or exits with the readout 'block'."
            )
        if self.exact_state and readout.tail_layers:
            raise PolicyMismatchError(
                f"state policy {self.name!r} cannot be used with the readout 'tail': a token that leaves would run "
                f"the last layers at once, on h that never passed those between, and their state would not be exact. "
                "Use exits with the readout 'head' or 'lens', or the policy 'propagate'."
            )


POLICIES: Registry[StatePolicy] = Registry(
    "state policy",
    {
        policy.name: policy
        for policy in (
            StatePolicy("propagate", updates_state=True),
            StatePolicy("copy", kinds=("attention", "none")),
            StatePolicy("stale", kinds=("mamba", "none")),
            StatePolicy("defer", exact_state=True),
            StatePolicy("verify", exact_state=True, exact_output=True),
        )
    },
)


@dataclass(frozen=True)
class ExitPlan:
    """What decides and what happens then; fixed for a session.

    ``layers``: the depths of all exits. ``active``: exits up to the last one that a token may leave by, all by
    default; later ones are never evaluated. An exit index counts all of them, and ``full`` is full depth.
    """

    layers: tuple[int, ...]
    estimator: ConfidenceEstimator
    readout: Readout
    policy: StatePolicy
    window: int = DEFAULT_WINDOW  # tokens per row that may wait, under the policies that let tokens wait
    active: int = -1

    def __post_init__(self) -> None:
        if self.active < 0:
            object.__setattr__(self, "active", len(self.layers))

    @property
    def full(self) -> int:
        """The exit index of full depth."""
        return len(self.layers)

    def cuts(self, n_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """First layer of every segment, and the layer after its last: the active exits and the end cut the stack."""
        depths = self.layers[: self.active]
        return (0, *depths), (*depths, n_layers)


def is_open(thresholds: Sequence[RowThresholds], index: int) -> bool:
    """Whether some row may leave by exit ``index``."""
    return any(row[index] is not None for row in thresholds)
