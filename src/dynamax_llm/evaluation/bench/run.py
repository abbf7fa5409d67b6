"""Measuring: every setting in turns with full depth of the same engine, in one run.

A token's time is what a generation of many tokens takes longer than one of a single token, over the tokens between; so
the prompt's pass and everything around it cancel, for every engine alike, transformers' own included. The first call of
a setting builds what it needs and is not among the repeats.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamax_llm.backbones import adapt
from dynamax_llm.errors import UsageError, first_line
from dynamax_llm.evaluation.bench import parity
from dynamax_llm.evaluation.bench.counted import Counted
from dynamax_llm.evaluation.bench.device import describe, forget_peak, peak
from dynamax_llm.evaluation.bench.document import Bench, Load, Missing, Parity, Row, Spread
from dynamax_llm.evaluation.bench.early_exits import EarlyExits
from dynamax_llm.evaluation.bench.plan import COMPILED, EAGER, STOCK, BenchSettings, Planned, Setting
from dynamax_llm.evaluation.common.provenance import backbone_facts, run_facts
from dynamax_llm.evaluation.common.timing import timed
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import ExitConfig


@dataclass
class Measured:
    """The measurements of a setting so far; times in seconds."""

    engine: str
    kernels: tuple[str, ...]
    out: Any  # of the last generation
    cold: float  # the first call
    long: list[float] = field(default_factory=list)  # calls that generate all tokens
    first: list[float] = field(default_factory=list)  # calls that generate one
    ratios: list[float] = field(default_factory=list)  # full depth of the same engine over this one, per turn
    peak: int | None = None

    def per_token(self, new: int) -> list[float]:
        """Seconds per token after the first, one per repeat."""
        # On a tiny model noise can outlast the whole text: then the prompt is counted too, so that no time is negative.
        pairs = zip(self.long, self.first, strict=True)
        return [(long - first) / (new - 1) if long > first else long / new for long, first in pairs]

    @property
    def sequences(self) -> Tensor:
        return self.out if isinstance(self.out, Tensor) else self.out.sequences


def bench(
    model: PreTrainedModel,
    settings: BenchSettings | None = None,
    *,
    name: str | None = None,
    zero_tail_from: int | None = None,
    command: str = "dynamax_llm.bench",
    tell: Callable[[str], None] | None = None,
    on_part: Callable[[Bench], None] | None = None,
) -> Bench:
    """Measure ``model`` on its device and in its dtype; see the module and ``document.Bench``.

    ``zero_tail_from`` is noted: the depth from which ``random_models.zero_tail`` was applied. ``tell`` is called with a
    line per setting, ``on_part`` with the document so far after every group. Raises ExitPlacementError,
    PolicyMismatchError, UsageError for settings that this model does not allow; what cannot be measured is listed in
    the document as missing.
    """
    settings = settings or BenchSettings()
    run = _Run(model, settings, name, zero_tail_from, command, tell or (lambda line: None))
    config, ends = model.generation_config, model.generation_config.eos_token_id
    config.eos_token_id = None  # every text has its full length
    try:
        for group in run.planned.groups():
            run.measure(run.shared(group))
            if on_part is not None:
                on_part(run.document(complete=False))
        if settings.parity:
            run.compare()
        return run.document(complete=True)
    finally:
        config.eos_token_id = ends


class _Run:
    """One benchmark under way."""

    def __init__(
        self,
        model: PreTrainedModel,
        settings: BenchSettings,
        name: str | None,
        zero_tail_from: int | None,
        command: str,
        tell: Callable[[str], None],
    ) -> None:
        self.started = time.monotonic()
        self.model, self.settings, self.command, self.tell = model, settings, command, tell
        backbone = adapt(model)
        self.planned = Planned(settings, backbone)
        exits = Exits.of(backbone, ExitConfig(self.planned.exits, backbone.n_layers, head=None, candidates=0))
        exits.check_backbone(backbone)
        self.backbone, self.device = backbone, backbone.device
        self.zero_tail_from = zero_tail_from
        generator = torch.Generator().manual_seed(settings.seed)
        shape = (max(settings.batches), settings.prompt)
        self.ids = torch.randint(1, backbone.vocab_size, shape, generator=generator).to(self.device)
        self.facts = backbone_facts(name or str(backbone.config.name_or_path or backbone.model_type), backbone)
        self.place = describe(self.device, backbone.dtype)
        self.counted = Counted.of(backbone, self.ids[:, :2])
        self.done: dict[Setting, Measured] = {}
        self.missing: list[Missing] = []
        self.parity: list[Parity] = []
        self.early = EarlyExits(exits, settings, backbone.width, self.device)

    def call(self, setting: Setting, new: int) -> tuple[float, Any]:
        """Seconds of one greedy generation of exactly ``new`` tokens, and its output."""
        ids = self.ids[: setting.batch]
        options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "use_cache": True}
        if setting.kind != "stock":
            options["custom_generate"] = self.early(setting)
        elif setting.engine == COMPILED:
            options["cache_implementation"] = "static"
        mask = torch.ones_like(ids)
        return timed(lambda: self.model.generate(ids, attention_mask=mask, **options), self.device)

    # measuring

    def shared(self, group: list[Setting]) -> list[Setting]:
        """The group; if it compares with the eager engine and that was measured anyway, with that measurement."""
        head = group[0]
        own = dataclasses.replace(head, engine=self.settings.engine, new=self.settings.new)
        if head.engine != EAGER or own not in self.done or self.done[own].engine != EAGER:
            return group
        return [own, *(dataclasses.replace(setting, new=own.new) for setting in group[1:])]

    def measure(self, group: list[Setting]) -> None:
        """All settings of a group, once to build, then in turns."""
        ready = [setting for setting in group if self._built(setting)]
        before = {setting: len(self.done[setting].long) for setting in ready}
        for turn in range(self.settings.repeats):
            for setting in ready if turn % 2 == 0 else reversed(ready):
                measured = self.done[setting]
                forget_peak(self.device)
                seconds, measured.out = self.call(setting, setting.new)
                measured.long.append(seconds)
                measured.peak = max(measured.peak or 0, peak(self.device) or 0) or None
                measured.first.append(self.call(setting, 1)[0])
        full = group[0]
        times = {setting: self.done[setting].per_token(setting.new)[before[setting] :] for setting in ready}
        for setting in ready:
            measured = self.done[setting]
            if full in times and self.done[full].engine == measured.engine:
                measured.ratios += [whole / own for whole, own in zip(times[full], times[setting], strict=True)]
            median = 1e3 * statistics.median(times[setting])
            self.tell(f"batch {setting.batch}, {measured.engine}, {setting.label}: {median:.3f} ms per token")
            if self.settings.parity and setting.policy == "verify":
                self._compare_verify(setting, full)
        if any(setting.engine == COMPILED for setting in group):
            _forget_compiled(self.model)

    def _built(self, setting: Setting) -> bool:
        """Whether a setting runs; its first call, which builds what it needs."""
        if setting in self.done:
            return True
        try:
            if setting.engine == COMPILED and self.device.type != "cuda":
                raise UsageError("transformers compiles on a GPU only")
            seconds, out = self.call(setting, setting.new)
            if setting.engine == COMPILED and getattr(self.model, "_compiled_call", None) is None:
                raise UsageError("not supported by transformers: this family ran without being compiled")
        except torch.OutOfMemoryError:
            return self._miss(setting, "out of memory")
        except UsageError as error:
            if setting.kind == "full":
                raise
            return self._miss(setting, str(error))
        except Exception as error:  # whatever transformers and torch.compile raise for a family they do not support
            if setting.engine != COMPILED:
                raise
            return self._miss(setting, f"not supported by transformers ({first_line(error)})")
        engine = setting.engine if setting.kind == "stock" else getattr(out, "engine", EAGER)
        self.done[setting] = Measured(str(engine), tuple(getattr(out, "kernels", ())), out, seconds)
        return True

    def _miss(self, setting: Setting, reason: str) -> bool:
        where = f"{setting.engine}, {setting.label}" if setting.engine else setting.label
        self.missing.append(Missing(label=where, batch=setting.batch, reason=reason))
        self.tell(f"batch {setting.batch}, {where}: {reason}")
        return False

    # parity of engines

    def compare(self) -> None:
        """Full depth of the engine that ran against the eager one, and exact equality in float32."""
        for batch in self.settings.batches:
            measured = [setting for setting in self.done if setting.kind == "full" and setting.batch == batch]
            if measured:
                full = next((setting for setting in measured if setting.engine != EAGER), measured[0])
                self._compare_full(full, forced=batch == max(self.settings.batches))
        engines = {measured.engine for measured in self.done.values()}
        if self.place.dtype != "float32" and "cuda" in engines:
            self.parity += parity.twins(self.device, self.backbone.model_type, "cuda")

    def _compare_full(self, full: Setting, *, forced: bool) -> None:
        engine, prompt = self.done[full].engine, self.settings.prompt
        same = engine == EAGER
        plain = full if same else Setting("full", full.batch, min(full.new, self.settings.baseline_new), EAGER)
        text = self.done[plain].sequences if plain in self.done else self.call(plain, plain.new)[1].sequences
        others = {STOCK: Setting("stock", full.batch, plain.new, STOCK)}
        if not same:
            others[f"{engine}, full depth"] = full
        for of, setting in others.items():
            if setting in self.done:
                new = self.done[setting].sequences[:, prompt:]
                self.parity.append(parity.free(new, text[:, prompt:], self._facts(of, EAGER)))
        if not forced:
            return
        expected = parity.forced(self.early(plain), self.model, text, prompt)
        given = {"one pass of the stock model": parity.one_pass(self.model, text, prompt)}
        if not same:
            given[f"{engine}, full depth"] = parity.forced(self.early(full), self.model, text, prompt)
        self.parity += [parity.given_text(tokens, expected, self._facts(of, EAGER)) for of, tokens in given.items()]

    def _compare_verify(self, setting: Setting, full: Setting) -> None:
        """Given its own text, and in free generation, against full depth of the same engine."""
        prompt, text = self.settings.prompt, self.done[setting].sequences
        tokens = parity.forced(self.early(full), self.model, text, prompt)
        equal, first = parity.compared(text[:, prompt:], self.done[full].sequences[:, prompt:])
        facts = self._facts(f"{self.done[setting].engine}, {setting.label}", self.done[full].engine)
        free = {"equal": equal, "first_difference": first}
        self.parity.append(parity.given_text(tokens, text[:, prompt + 1 :], {**facts, **free}))

    def _facts(self, of: str, engine: str) -> dict[str, Any]:
        reference = f"{engine}, full depth"
        return {"of": of, "reference": reference, "model": self.facts.name, "dtype": self.place.dtype}

    # the document

    def document(self, *, complete: bool) -> Bench:
        """What is known so far."""
        load = {name: getattr(self.settings, name) for name in ("prompt", "new", "baseline_new", "repeats", "seed")}
        order = sorted(self.done, key=lambda setting: setting.batch)
        return Bench(
            complete=complete,
            run=run_facts(self.command, time.monotonic() - self.started),
            backbone=self.facts,
            place=self.place,
            load=Load(**load, zero_tail_from=self.zero_tail_from),
            rows=tuple(self._row(setting) for setting in order if self.done[setting].long),
            parity=tuple(self.parity),
            missing=tuple(self.missing),
        )

    def _row(self, setting: Setting) -> Row:
        measured = self.done[setting]
        times = measured.per_token(setting.new)
        median = statistics.median(times)
        (weights, state), facts = self._decided(setting)
        speed_ups = measured.ratios if setting.kind not in ("full", "stock") else []
        return Row(
            label=setting.label,
            kind=setting.kind,
            engine=measured.engine,
            kernels=measured.kernels,
            batch=setting.batch,
            new=setting.new,
            ms_per_token=Spread.of([1e3 * value for value in times]),
            tokens_per_second=Spread.of([setting.batch / value for value in times]),
            speed_up=Spread.of(speed_ups) if speed_ups else None,
            first_token=Spread.of(measured.first),
            first_call=measured.cold,
            building=measured.cold - statistics.median(measured.long),
            weight_bytes=weights,
            state_bytes=state,
            bandwidth=weights / median,
            bandwidth_share=weights / median / self.place.copy_bandwidth,
            state_bandwidth_share=(weights + state) / median / self.place.copy_bandwidth,
            peak_memory=measured.peak,
            **facts,
        )

    def _decided(self, setting: Setting) -> tuple[tuple[float, float], dict[str, Any]]:
        """Bytes of weights and state per step, and a row's facts about exits; none for the stock model."""
        context = self.settings.prompt + setting.new / 2
        if setting.kind == "stock":
            return self.counted.stock(setting.batch, context), {}
        early, out, n_layers = self.early(setting), self.done[setting].out, self.backbone.n_layers
        first = setting.exits[0] if setting.kind in ("exit", "spread") else n_layers
        checked = 0 if setting.kind == "full" else len(setting.exits)
        readout = early.exits.readout(self.backbone)
        depths = out.exit_layers[:, 1:]
        facts = {
            "policy": None if setting.kind == "full" else setting.policy,
            "window": setting.window,
            "exits": setting.exits,
            "estimator": self.settings.estimator if setting.kind == "checks" else None,
            "leave": self.settings.leave if setting.kind == "spread" else None,
            "together": setting.together,
            "mean_depth": float(depths.double().mean()) / n_layers,
            "left": float((depths < n_layers).double().mean()),
            "pass_reduction": out.trace.pass_reduction,
            "acceptance": None if out.verification is None else out.verification.acceptance_rate,
        }
        return self.counted.step(out, first, context, early.estimator, readout, checked), facts


def _forget_compiled(model: PreTrainedModel) -> None:
    """Drop what transformers compiled, and its memory."""
    torch._dynamo.reset()
    vars(model).pop("_compiled_call", None)
    vars(model).pop("_cache", None)
