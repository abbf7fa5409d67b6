"""Settings that a user may change: default, help text and allowed values stand once, at the dataclass field.

The command line derives its options from these fields (``cli/options.py``). Nothing heavy is imported here, so that a
wrong value is refused before torch is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from dynamax_llm.errors import UsageError

#: State policies, confidence measures and engines by name; the registries of their rooms hold the implementations.
STATE_POLICIES = ("propagate", "copy", "stale", "defer", "verify")
MEASURES = ("softmax_max", "softmax_margin", "entropy", "state_similarity")
ENGINES = ("eager", "cuda")
THRESHOLD_SCHEDULES = ("fixed", "decaying")
DTYPES = ("auto", "float32", "bfloat16", "float16")

_KEY = "option"


@dataclass(frozen=True)
class Option:
    """Help and bounds of one field. ``least`` and ``most`` are allowed, ``above`` and ``below`` excluded bounds.

    Bounds and choices hold for each item of a tuple; None is allowed. ``flag``: the option's name on the command line;
    None: the field's name; "": no option. ``count``: a number may be written as 300k or 1M. ``note`` is added where a
    text is not a number.
    """

    help: str
    flag: str | None = None
    metavar: str | None = None
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    count: bool = False
    note: str = ""

    def allowed(self) -> str:
        """The allowed values in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.least is not None and self.most is not None:
            return f"between {self.least} and {self.most}"
        if self.above is not None and self.below is not None:
            return f"between {self.above} and {self.below}, both excluded"
        low = f"at least {self.least}" if self.least is not None else f"above {self.above}"
        return low if self.most is None else f"{low} and at most {self.most}"

    def problem(self, value: Any) -> str | None:
        """What to give instead of ``value``; None if it is allowed."""
        items = value if isinstance(value, tuple) else () if value is None else (value,)
        wrong = [item for item in items if not self._fits(item)]
        if not wrong:
            return None
        which = f"{wrong[0]!r} is not allowed: " if len(items) > 1 else ""
        near = difflib.get_close_matches(str(wrong[0]), self.choices, n=1)
        return f"{which}give {self.allowed()}." + (f" Did you mean {near[0]!r}?" if near else "")

    def _fits(self, item: Any) -> bool:
        return (
            (not self.choices or item in self.choices)
            and (self.least is None or item >= self.least)
            and (self.above is None or item > self.above)
            and (self.most is None or item <= self.most)
            and (self.below is None or item < self.below)
        )


def setting(default: Any, help: str, **how: Any) -> Any:
    """A dataclass field with its default, its help text and the arguments of ``Option``."""
    return dataclasses.field(default=default, metadata={_KEY: Option(help, **how)})


def option_of(field: dataclasses.Field) -> Option | None:
    """The field's option; None for a field that was not made by ``setting``."""
    return field.metadata.get(_KEY)


def check_settings(settings: Any, label: str) -> None:
    """Raise UsageError naming the first field of ``settings`` whose value is not allowed; ``label`` says what it is."""
    for field in dataclasses.fields(settings):
        option, value = option_of(field), getattr(settings, field.name)
        problem = None if option is None else option.problem(value)
        if problem is not None:
            raise UsageError(f"{label} {field.name} = {value!r}: {problem}")


SEED = {"least": 0, "most": 2**63 - 1}
CHAT_HELP = "Put prompts through the tokenizer's chat template."
SYSTEM_HELP = "System message of a chat."


def check_chat(settings: Any, label: str) -> None:
    """Raise UsageError for a ``system`` message without ``chat``."""
    if settings.system is not None and not settings.chat:
        raise UsageError(f"{label} system = {settings.system!r}: only a chat has a system message. Give `chat` too.")


@dataclass(frozen=True)
class DecodeSettings:
    """What decides where a token leaves: the arguments of ``EarlyExit``."""

    threshold: float | str = setting(
        0.9, "Least confidence to leave with: one value, one per exit (0.8,0.9,…), or never.", metavar="SHARE"
    )
    policy: str = setting(
        "propagate",
        "State of skipped layers: propagate, copy (attention), stale (Mamba); defer: exact state; verify: exact state "
        "and the full model's own text.",
        choices=STATE_POLICIES,
        metavar="NAME",
    )
    window: int = setting(16, "Tokens that may wait (defer) or be drafted (verify) before layers catch up.", least=1)
    measure: str | None = setting(
        None,
        "Decide by softmax_max, softmax_margin, entropy or state_similarity, not by a trained head.",
        choices=MEASURES,
        metavar="NAME",
    )
    schedule: str = setting(
        "fixed",
        "fixed, or CALM's decaying threshold.",
        flag="--threshold-schedule",
        choices=THRESHOLD_SCHEDULES,
        metavar="NAME",
    )
    promise: str | None = setting(
        None,
        "A promise that dynamax calibrate recorded with the exits (agreement>=0.98); it decides threshold, policy, "
        "window and confidence estimator.",
        metavar="TEXT",
    )
    adaptive: bool = setting(
        True, "Under verify, let drafting rest while it does not pay.", flag="--adaptive/--no-adaptive"
    )
    engine: str | None = setting(
        None, "eager or cuda. Default: the fastest that can run this.", choices=ENGINES, metavar="NAME"
    )


@dataclass(frozen=True)
class PlaceSettings:
    """Where and in which numbers a model runs."""

    dtype: str = setting(
        DTYPES[0],
        "float32, bfloat16, float16, or auto: as stored on a GPU, float32 on a CPU.",
        choices=DTYPES,
        metavar="NAME",
    )
    device: str | None = setting(
        None, "cpu, cuda, cuda:1 …, or auto to spread layers. Default: a GPU if there is one.", metavar="NAME"
    )


@dataclass(frozen=True)
class GenerateSettings:
    """How text is continued: arguments of Hugging Face's ``generate``."""

    max_new_tokens: int = setting(64, "Tokens to add at most.", least=1)
    sample: bool = setting(False, "Sample instead of taking the likeliest token.")
    temperature: float | None = setting(None, "Sampling temperature; implies --sample.", above=0)
    top_p: float | None = setting(None, "Nucleus sampling; implies --sample.", above=0, most=1)
    seed: int | None = setting(None, "Seed of the sampling.", **SEED)
    chat: bool = setting(False, CHAT_HELP)
    system: str | None = setting(None, SYSTEM_HELP, metavar="TEXT")

    def __post_init__(self) -> None:
        check_chat(self, "generation setting")

    def arguments(self) -> dict[str, Any]:
        """The sampling arguments of ``generate``."""
        chosen = {name: value for name in ("temperature", "top_p") if (value := getattr(self, name)) is not None}
        return {"do_sample": True, **chosen} if self.sample or chosen else {"do_sample": False}
