"""What a benchmark measures: every field has its option of ``dynamax bench``."""

from __future__ import annotations

from dataclasses import dataclass

from dynamax_llm.errors import UsageError
from dynamax_llm.exits.config import INPUTS
from dynamax_llm.exits.registries import HEADS
from dynamax_llm.settings import ENGINES, MEASURES, SEED, STATE_POLICIES, check_settings, setting

#: Measures that random weights cannot make sure: exits that they decide are estimated, and no token leaves.
UNSURE = tuple(name for name in MEASURES if name != "state_similarity")


@dataclass(frozen=True)
class BenchSettings:
    """What to measure. Raises UsageError for values that are not allowed.

    ``exit_at``: places at each of which all tokens leave, one setting each, under every one of ``policies`` and, where
    tokens wait, every one of ``windows``. ``checks``: as many exits, evenly spaced, whose confidence ``estimator`` (a
    kind of head with random weights that reads ``inputs``, or a measure) estimates and by which no token leaves.
    ``spread``: at batch sizes above 1, rows leave at a share ``leave`` of their tokens, and at these shares of those
    all together.
    """

    prompt: int = setting(64, "Prompt tokens.", flag="--prompt-tokens", least=1)
    new: int = setting(256, "New tokens; with --data 128 at most.", flag="--max-new-tokens", least=2)
    baseline_new: int = setting(64, "New tokens of the baselines, which are slow.", flag="--baseline-tokens", least=2)
    repeats: int = setting(3, "Times everything is measured.", least=1)
    batches: tuple[int, ...] = setting((1, 8), "Batch sizes; with --data 1.", flag="--batch-size", least=1)
    policies: tuple[str, ...] = setting(
        ("propagate", "defer", "verify"),
        "State policies: propagate, copy, stale, defer, verify.",
        flag="--policy",
        choices=STATE_POLICIES,
    )
    windows: tuple[int, ...] = setting(
        (8, 16), "Tokens that wait under defer and verify; with --data 16.", flag="--window", least=1
    )
    exit_at: str = setting(
        "1/2",
        "Where all tokens leave, one setting each: layers or shares.",
        flag="--exit-layers",
        metavar="LAYERS",
    )
    checks: int = setting(0, "Also this many exits that are checked and never taken.", least=0)
    estimator: str = setting(
        "mlp",
        "What checks there: a kind of head with random weights, or a confidence measure.",
        flag="--head",
        choices=(*HEADS, *UNSURE),
        metavar="NAME",
    )
    inputs: tuple[str, ...] = setting(INPUTS, "What that head reads: hidden, signals, tokens.", choices=INPUTS)
    spread: tuple[float, ...] = setting(
        (), "Also rows that leave by themselves; shares of it that all do together.", least=0, most=1
    )
    leave: float = setting(0.5, "With --spread: share of every row's tokens that leave.", least=0, most=1)
    engine: str | None = setting(None, "cuda or eager. Default: the fastest that can.", choices=ENGINES, metavar="NAME")
    baselines: bool = setting(
        True, "The eager engine, transformers' generate, and the same compiled.", flag="--baselines/--no-baselines"
    )
    parity: bool = setting(True, "Compare the tokens of the engines.", flag="--parity/--no-parity")
    seed: int = setting(0, "Seed of weights, prompts and moments of leaving.", **SEED)

    def __post_init__(self) -> None:
        check_settings(self, "bench setting")
        for name in ("batches", "policies", "windows", "inputs"):
            if not getattr(self, name):
                raise UsageError(f"bench setting {name} = (): give at least one.")
        if self.spread and max(self.batches) == 1:
            raise UsageError("`spread` is about rows that leave by themselves: give `batches` above 1 too.")
