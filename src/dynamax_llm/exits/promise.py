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
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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
    """What is guaranteed. ``measure`` is "agreement", "consistency" or "risk:METRIC"; ``bound`` as written."""

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


Share = Annotated[float, Field(ge=0.0, le=1.0)]
Inside = Annotated[float, Field(gt=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]


class Promise(BaseModel):
    """What calibration guarantees, for whom, and the evidence.

    ``confidence`` is None under "crc". ``n`` sequences prove it, ``n_path`` others taught the path. ``parameter`` is
    λ on that path, ``thresholds`` are per exit, None where none may leave. ``estimate`` is the mean (agreement,
    consistency, or drop of the score at most) on the n, ``mean_depth`` the mean share of the layers. ``estimator`` is
    the head's kind or the measure's name, ``dtype`` the backbone's. ``evidence`` lists the tested points from safe to
    risky. ``digest`` covers all of this and the exits that it is about (``seal``); ``Exits.keep`` sets it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Text
    measure: Text
    bound: Inside
    confidence: Inside | None
    method: Annotated[str, Field(pattern=f"^({'|'.join(METHODS)})$")]
    n: Count
    n_path: Count
    unit: Text
    parameter: Share
    thresholds: tuple[Share | None, ...]
    estimate: Share
    p_value: Share | None
    mean_depth: Share
    policy: Text
    window: Count
    readout: Text
    estimator: Text
    data: dict[str, Any]
    fingerprint: Text
    dynamax: Text
    date: Text
    evidence: Annotated[tuple[dict[str, Any], ...], Field(repr=False)]
    dtype: str | None = None
    digest: Annotated[str, Field(repr=False)] = ""

    @model_validator(mode="after")
    def _says_one_thing(self) -> Promise:
        try:
            target = Target.parse(self.text)
        except UsageError:
            raise ValueError(f"its field 'text' cannot be {self.text!r}") from None
        if (target.text, target.measure, target.bound) != (self.text, self.measure, self.bound):
            raise ValueError("its fields 'text', 'measure' and 'bound' contradict each other")
        return self

    @property
    def key(self) -> tuple[str, str, str]:
        """Exits keep one promise of each key: text, state policy, confidence estimator."""
        return self.text, self.policy, self.estimator

    @property
    def label(self) -> str:
        """The promise in messages."""
        return f"promise {self.text!r} (policy {self.policy!r}, estimator {self.estimator!r})"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, the inverse of ``from_json``."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, data: Any) -> Promise:
        """Raises ValueError naming the field that is missing, unknown or impossible."""
        if not isinstance(data, Mapping):
            raise ValueError("it is not a JSON object")
        # Until 0.1.0 the estimator's field was called "judge".
        values = {"estimator" if name == "judge" else name: value for name, value in data.items()}
        try:
            return cls.model_validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            raise ValueError(explain(error)) from error

    def agrees_with_evidence(self) -> bool:
        """Whether this is the riskiest point that the evidence kept: all there is to check without a digest."""
        best: dict[str, Any] = next((test for test in reversed(self.evidence) if test.get("kept")), {})
        record = self.to_json()
        return "thresholds" in best and all(record[name] == value for name, value in best.items() if name in record)

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


def explain(error: ValidationError) -> str:
    """The first problem of a record, naming its field."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"its field {name!r} is missing"
    if first["type"] == "extra_forbidden":
        return f"its field {name!r} is unknown"
    if not name:
        return first["msg"].removeprefix("Value error, ")
    return f"its field {name!r} cannot be {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def seal(record: Mapping[str, Any], basis: Mapping[str, Any]) -> str:
    """sha256 of a promise's JSON record (but its digest) and of what it rests on, as JSON: exits, backbone, tensors."""
    covered = {"record": {name: value for name, value in record.items() if name != "digest"}, "basis": basis}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def digest(fingerprint: Mapping[str, Any]) -> str:
    """A backbone's fingerprint in one word; the dtype it was loaded in does not count."""
    kept = {name: value for name, value in fingerprint.items() if name != "dtype"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def find_promise(promises: Sequence[Promise], text: str, policy: str | None, estimator: str | None) -> Promise:
    """The recorded promise ``text`` under this policy and estimator, if they are named.

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
    wrong = " and ".join(
        f"{name} {value!r}" for name, value in (("policy", policy), ("estimator", estimator)) if value is not None
    )
    raise PolicyMismatchError(
        f"promise {wanted!r} was calibrated under {how}; it guarantees nothing under {wrong}. Leave that out, or "
        "calibrate under it: dynamax calibrate."
    )
