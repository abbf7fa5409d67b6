"""A promise: what it says, and the record of the calibration that proved it, kept in the manifest of the exits.

agreement>=0.98      of the tokens after a prompt, at least 98 % are the full model's given the same prefix
consistency>=0.9     texts have a mean ROUGE-L of at least 0.9 to the full model's
risk[f1]<=0.02       the mean score against reference answers drops by at most 0.02 (also risk[exact_match])
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dynamax_llm.errors import PolicyMismatchError, PromiseError, UsageError

MEASURES = ("agreement", "consistency")
#: The metric of a risk that names none, and those there are.
DEFAULT_METRIC, METRICS = "f1", ("f1", "exact_match")
#: Learn then Test with p-values by betting or of Hoeffding and Bentkus, and conformal risk control.
METHODS = ("ltt", "ltt-hb", "crc")
FORMS = "agreement>=0.98, consistency>=0.9, risk[f1]<=0.02, risk[exact_match]<=0.02"

_FORM = re.compile(r"\s*(agreement|consistency|risk)\s*(?:\[\s*([\w-]+)\s*\])?\s*(>=|<=)\s*([\d.eE+-]+)\s*")


@dataclass(frozen=True)
class Target:
    """What is promised. ``measure`` is "agreement", "consistency" or "risk:METRIC"; ``bound`` as written."""

    measure: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """From "agreement>=0.98" and the like. Raises UsageError naming the forms there are."""
        match = _FORM.fullmatch(text)
        kind, metric, sign, number = match.groups() if match else ("", None, "", "")
        if not match or (sign == "<=") != (kind == "risk") or (metric is not None and kind != "risk"):
            raise UsageError(f"promise {text!r} cannot be read. Write one of {FORMS}.")
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if not 0.0 < bound < 1.0:
            raise UsageError(f"promise {text!r}: its bound must lie between 0 and 1, both excluded. Say, {FORMS}.")
        if kind == "risk" and (metric or DEFAULT_METRIC) not in METRICS:
            raise UsageError(f"promise {text!r}: unknown metric {metric!r}. Available: {', '.join(METRICS)}.")
        return cls(f"risk:{metric or DEFAULT_METRIC}" if kind == "risk" else kind, bound)

    @property
    def text(self) -> str:
        """The one spelling of this promise."""
        if self.measure.startswith("risk:"):
            return f"risk[{self.measure.removeprefix('risk:')}]<={self.bound:g}"
        return f"{self.measure}>={self.bound:g}"

    @property
    def limit(self) -> float:
        """The greatest mean loss that keeps it, in (0, 1)."""
        return self.bound if self.measure.startswith("risk:") else round(1.0 - self.bound, 12)

    @property
    def of_texts(self) -> bool:
        """Whether texts are generated and compared, rather than tokens read."""
        return self.measure != "agreement"


@dataclass(frozen=True)
class Promise:
    """What calibration guarantees, for whom, and the evidence.

    ``confidence`` is None under "crc". ``n`` sequences prove it, ``n_path`` others taught the path. ``parameter`` is
    λ on that path, ``thresholds`` are per exit, None where none may leave. ``estimate`` is the mean (agreement,
    consistency, or drop of the score at most) seen on the n, ``mean_depth`` the mean share of the layers. ``estimator``
    is the head's kind or the measure's name. ``evidence`` lists the tested points from safe to risky.
    """

    text: str
    measure: str
    bound: float
    confidence: float | None
    method: str
    n: int
    n_path: int
    unit: str
    parameter: float
    thresholds: tuple[float | None, ...]
    estimate: float
    p_value: float | None
    mean_depth: float
    policy: str
    window: int
    readout: str
    estimator: str
    data: dict[str, Any]
    fingerprint: str
    dynamax: str
    date: str
    evidence: tuple[dict[str, Any], ...] = field(default=(), repr=False)

    @property
    def key(self) -> tuple[str, str, str]:
        """Exits keep one promise of each key: text, state policy, judge."""
        return self.text, self.policy, self.estimator

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, the inverse of ``from_json``."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, data: Any) -> Promise:
        """Raises ValueError naming the field that is missing, unknown or impossible."""
        if not isinstance(data, Mapping):
            raise ValueError("it is no JSON object")
        if "judge" in data:  # the field's name until 0.1.0
            data = {"estimator" if name == "judge" else name: value for name, value in data.items()}
        known = cls.__dataclass_fields__
        for name in (*known, *data):
            if name not in known:
                raise ValueError(f"its field {name!r} is unknown")
            if name not in data:
                raise ValueError(f"its field {name!r} is missing")
        for name, fine in _CHECKS.items():
            if not fine(data[name]):
                raise ValueError(f"its field {name!r} cannot be {data[name]!r}")
        try:
            target = Target.parse(data["text"])
        except UsageError as error:
            raise ValueError(f"its field 'text' cannot be {data['text']!r}") from error
        if (target.text, target.measure, target.bound) != (data["text"], data["measure"], data["bound"]):
            raise ValueError("its fields 'text', 'measure' and 'bound' say different things")
        values = {**data, "thresholds": tuple(data["thresholds"]), "evidence": tuple(data["evidence"])}
        return cls(**values)

    def sentence(self) -> str:
        """What is guaranteed, in plain words."""
        limit, metric = Target(self.measure, self.bound).limit, self.measure.removeprefix("risk:")
        says = {
            "agreement": f"At most {100.0 * limit:.3g} % of tokens differ from the full model's given the same prefix",
            "consistency": f"The mean ROUGE-L of texts to the full model's is at least {self.bound:g}",
        }.get(self.measure, f"The mean {metric} against reference answers drops by at most {limit:g}")
        if self.method == "crc":
            return f"{says}, on average over draws of {self.n} prompts like these, and no single draw is vouched for"
        sure = f"{100.0 * (self.confidence or 0.0):.4g} % confidence"
        return f"{says}, with {sure} over draws of {self.n} prompts like these"


def _share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value <= 1.0


def _inside(value: Any) -> bool:
    return _share(value) and 0.0 < value < 1.0


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


#: What every field of a record must be.
_CHECKS = {
    "text": _text,
    "measure": _text,
    "bound": _inside,
    "confidence": lambda value: value is None or _inside(value),
    "method": lambda value: value in METHODS,
    "n": _count,
    "n_path": _count,
    "unit": _text,
    "parameter": _share,
    "thresholds": lambda value: isinstance(value, list) and all(bar is None or _share(bar) for bar in value),
    "estimate": _share,
    "p_value": lambda value: value is None or _share(value),
    "mean_depth": _share,
    "policy": _text,
    "window": _count,
    "readout": _text,
    "estimator": _text,
    "data": lambda value: isinstance(value, dict),
    "fingerprint": _text,
    "dynamax": _text,
    "date": _text,
    "evidence": lambda value: isinstance(value, list) and all(isinstance(item, dict) for item in value),
}


def digest(fingerprint: Mapping[str, Any]) -> str:
    """A backbone's fingerprint in one word; the dtype it was loaded in does not count."""
    kept = {name: value for name, value in fingerprint.items() if name != "dtype"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def find_promise(promises: Sequence[Promise], text: str, policy: str | None, estimator: str | None) -> Promise:
    """The recorded promise ``text`` under this policy and judge, if they are named.

    Raises UsageError if the text cannot be read, PromiseError, naming those there are, if there is none.
    """
    wanted = Target.parse(text).text
    named = [promise for promise in promises if promise.text == wanted]
    fit = [item for item in named if policy in (None, item.policy) and estimator in (None, item.estimator)]
    if len(fit) == 1:
        return fit[0]
    if not named:
        there = ", ".join(dict.fromkeys(promise.text for promise in promises)) or "none"
        raise PromiseError(
            f"promise {wanted!r} is not recorded with these exits (there: {there}). Calibrate it: dynamax calibrate "
            f'MODEL --exits DIR --data … --promise "{wanted}".'
        )
    how = "; ".join(f"policy {item.policy!r}, estimator {item.estimator!r}" for item in (fit or named))
    if fit:
        raise PromiseError(f"promise {wanted!r} is recorded several times ({how}): name the policy or the measure.")
    asked = " and ".join(
        f"{name} {value!r}" for name, value in (("policy", policy), ("estimator", estimator)) if value is not None
    )
    raise PolicyMismatchError(
        f"promise {wanted!r} was calibrated under {how}; it says nothing under {asked}. Leave that out, or calibrate "
        "under it: dynamax calibrate."
    )
