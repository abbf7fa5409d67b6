"""What a benchmark runs: settings, and the groups in which they take turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dynamax_llm.backbones import Backbone
from dynamax_llm.engines.choose import check_engine
from dynamax_llm.engines.plan import POLICIES
from dynamax_llm.errors import PolicyMismatchError, UsageError
from dynamax_llm.evaluation.common import FREE_MEASURE
from dynamax_llm.exits.config import INPUTS, ExitConfig, place_exits
from dynamax_llm.exits.registries import HEADS, MEASURES

#: Settings that take turns with full depth: the GPU engine keeps the programs of four, and building is not timed.
GROUP = 3
EAGER, STOCK, COMPILED = "eager", "transformers", "transformers, compiled"
#: What can be checked so that no token leaves: heads, and measures that stay low for random weights.
CHECKED = (*HEADS, *(name for name in MEASURES if name != FREE_MEASURE))


@dataclass(frozen=True)
class BenchSettings:
    """What to measure; every field has its option of ``dynamax bench``.

    ``exit_at``: depths at each of which all tokens leave, one setting each, under every one of ``policies`` and, where
    tokens wait, every one of ``windows``. ``checks``: this many exits, evenly spaced, are checked by ``estimator`` (a
    kind of head with random weights that reads ``inputs``, or a measure), and no token leaves by them. ``spread``: at
    batch sizes above 1, rows leave at a share ``leave`` of their tokens, and at these shares of those all together.
    ``parity``: whether engines are compared. Raises UsageError for values that are not allowed."""

    prompt: int = 64
    new: int = 256
    baseline_new: int = 64
    repeats: int = 3
    batches: tuple[int, ...] = (1,)
    policies: tuple[str, ...] = ("propagate", "defer", "verify")
    windows: tuple[int, ...] = (8, 16)
    exit_at: str = "1/2"
    checks: int = 0
    estimator: str = "mlp"
    inputs: tuple[str, ...] = INPUTS
    spread: tuple[float, ...] = ()
    leave: float = 0.5
    engine: str | None = None
    baselines: bool = True
    parity: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, floor in {"prompt": 1, "new": 2, "baseline_new": 2, "repeats": 1, "checks": 0}.items():
            if getattr(self, name) < floor:
                raise UsageError(f"{name} {getattr(self, name)}: give a whole number from {floor}.")
        for name, values in (("batches", self.batches), ("windows", self.windows)):
            if not values or min(values) < 1:
                raise UsageError(f"{name} {','.join(map(str, values))}: give whole numbers from 1, like 1,8.")
        for name, share in (*(("spread", value) for value in self.spread), ("leave", self.leave)):
            if not 0.0 <= share <= 1.0:
                raise UsageError(f"{name} {share}: give shares between 0 and 1.")
        for policy in self.policies:
            POLICIES.lookup(policy)
        check_engine(self.engine)
        if self.checks and self.estimator not in CHECKED:
            raise UsageError(f"estimator {self.estimator!r}: give one of {', '.join(CHECKED)}.")
        if self.spread and max(self.batches) == 1:
            raise UsageError("spread is about rows that leave on their own: give a batch size above 1 too.")


@dataclass(frozen=True)
class Setting:
    """One thing to measure; ``exits`` are depths, ``engine`` the requested one (None: the fastest that can)."""

    kind: str
    batch: int
    new: int
    engine: str | None
    policy: str = "propagate"
    window: int | None = None
    exits: tuple[int, ...] = ()
    together: float | None = None

    @property
    def label(self) -> str:
        """Its name in tables, without engine and batch size."""
        policy = self.policy if self.window is None else f"{self.policy}, window {self.window}"
        places = ", ".join(map(str, self.exits))
        return {
            "full": "full depth",
            "exit": f"{policy}, all leave at {places}",
            "spread": f"{policy}, rows leave at {places}, {self.together or 0:.0%} together",
            "checks": f"{len(self.exits)} exits checked, none taken",
            "stock": "generate",
        }[self.kind]


class Planned:
    """The settings for one backbone. Raises ExitPlacementError, PolicyMismatchError."""

    def __init__(self, settings: BenchSettings, backbone: Backbone) -> None:
        self.settings, self.n_layers = settings, backbone.n_layers
        self.exits = place_exits(settings.exit_at, self.n_layers)
        for name in settings.policies:
            wrong = sorted(set(backbone.kinds) - set(POLICIES[name].kinds))
            if wrong:
                raise PolicyMismatchError(
                    f"state policy {name!r} is not defined for the {' and '.join(wrong)} layers of "
                    f"{backbone.model_type!r}. Leave it out of the policies."
                )
        if settings.checks >= self.n_layers:
            raise UsageError(
                f"checks {settings.checks}: this backbone has {self.n_layers} layers, so at most "
                f"{self.n_layers - 1} exits."
            )
        count = settings.checks
        self.checked = tuple(round(self.n_layers * (index + 1) / (count + 1)) for index in range(count))
        if count:
            ExitConfig(self.checked, self.n_layers)
        limit = backbone.max_positions()
        if limit is not None and settings.prompt + settings.new > limit:
            raise UsageError(
                f"{settings.prompt} + {settings.new} tokens: this backbone has {limit} positions. Lower prompt or new."
            )

    def groups(self) -> Iterator[list[Setting]]:
        """Settings that take turns, full depth first; the slow baselines come last."""
        for batch in self.settings.batches:
            full = Setting("full", batch, self.settings.new, self.settings.engine)
            own = list(self._own(batch))
            for first in range(0, max(len(own), 1), GROUP):
                yield [full, *own[first : first + GROUP]]
        for batch in self.settings.batches if self.settings.baselines else ():
            slow = min(self.settings.new, self.settings.baseline_new)
            yield [
                Setting("full", batch, slow, EAGER),
                Setting("stock", batch, slow, STOCK),
                Setting("stock", batch, slow, COMPILED),
            ]

    def _own(self, batch: int) -> Iterator[Setting]:
        s = self.settings
        for policy in s.policies:
            for window in self._windows(policy):
                for exit in self.exits:
                    yield Setting("exit", batch, s.new, s.engine, policy, window, (exit,))
        for share in s.spread if batch > 1 else ():
            for policy in s.policies:
                for window in self._windows(policy)[:1]:
                    yield Setting("spread", batch, s.new, s.engine, policy, window, self.exits, share)
        if self.checked:
            yield Setting("checks", batch, s.new, s.engine, exits=self.checked)

    def _windows(self, policy: str) -> tuple[int | None, ...]:
        return self.settings.windows if POLICIES[policy].exact_state else (None,)
