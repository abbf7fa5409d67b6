"""Measuring: every setting in turns with full depth of the same engine, in one run.

A token takes what a generation of many tokens takes longer than one of a single token, over the tokens between; so the
prompt's pass and whatever surrounds it cancel, for every engine alike, transformers' own included. The first call of a
setting builds what it needs and is not among the repeats.
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
from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.bench import agree
from dynamax_llm.evaluation.bench.counted import Counted
from dynamax_llm.evaluation.bench.deciders import Deciders
from dynamax_llm.evaluation.bench.device import describe, forget_peak, peak, wait
from dynamax_llm.evaluation.bench.document import Bench, Load, Missing, Row, Sameness, Spread
from dynamax_llm.evaluation.bench.plan import COMPILED, EAGER, STOCK, BenchSettings, Planned, Setting
from dynamax_llm.evaluation.common.provenance import backbone_facts, run_facts
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import ExitConfig


@dataclass
class Measured:
    """What became of a setting so far; times in seconds."""

    engine: str
    kernels: tuple[str, ...]
    out: Any  # of the last generation
    cold: float
    long: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)  # full depth of the same engine over this one, per turn
    peak: int | None = None

    def per_token(self, new: int) -> list[float]:
        """Seconds per token after the first, one per repeat."""
        # On a tiny model a moment of noise can outlast the whole text: then the prompt is counted too, never less than
        # nothing.
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
    """Measure ``model`` where it lies, in the dtype it has; see the module and ``document.Bench``.

    ``zero_tail_from`` is noted: the depth from which ``random_models.zero_tail`` was applied. ``tell`` hears of every
    setting, ``on_part`` gets the document so far after every group. Raises ExitPlacementError, PolicyMismatchError,
    UsageError for what cannot be asked of this model; what cannot be measured is listed in the document as missing.
    """
    settings = settings or BenchSettings()
    run = _Run(model, settings, name, zero_tail_from, command, tell or (lambda line: None))
    config, ends = model.generation_config, model.generation_config.eos_token_id
    config.eos_token_id = None  # every text is as long as asked
    try:
        for group in run.planned.groups():
            run.measure(run.shared(group))
            if on_part is not None:
                on_part(run.document(complete=False))
        if settings.sameness:
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
        config = ExitConfig(self.planned.exits, backbone.n_layers, head=None, candidates=0)
        self.exits = Exits.of(backbone, config)
        self.exits.check_backbone(backbone)
        self.backbone, self.device = backbone, backbone.device
        self.name = name or str(backbone.config.name_or_path or backbone.model_type)
        self.zero_tail_from = zero_tail_from
        generator = torch.Generator().manual_seed(settings.seed)
        shape = (max(settings.batches), settings.prompt)
        self.ids = torch.randint(1, backbone.vocab_size, shape, generator=generator).to(self.device)
        self.facts = backbone_facts(self.name, backbone)
        self.place = describe(self.device, backbone.dtype)
        self.counted = Counted.of(backbone, self.ids[:, :2] if settings.prompt > 1 else self.ids)
        self.done: dict[Setting, Measured] = {}
        self.missing: list[Missing] = []
        self.sameness: list[Sameness] = []
        self.early = Deciders(self.exits, settings, backbone.width, self.device)

    def call(self, setting: Setting, new: int) -> tuple[float, Any]:
        """Seconds of one greedy generation of exactly ``new`` tokens, and what it gave."""
        ids = self.ids[: setting.batch]
        options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "use_cache": True}
        if setting.kind != "stock":
            options["custom_generate"] = self.early(setting)
        elif setting.engine == COMPILED:
            options["cache_implementation"] = "static"
        wait(self.device)
        begun = time.perf_counter()
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        wait(self.device)
        return time.perf_counter() - begun, out

    # measuring

    def shared(self, group: list[Setting]) -> list[Setting]:
        """The group, or, where it is about the eager engine and that has run anyway, about what ran."""
        head = group[0]
        if head.engine != EAGER:
            return group
        own = dataclasses.replace(head, engine=self.settings.engine, new=self.settings.new)
        if own not in self.done or self.done[own].engine != EAGER:
            return group
        return [own, *(dataclasses.replace(setting, new=own.new) for setting in group[1:])]

    def measure(self, group: list[Setting]) -> None:
        """All settings of a group, once to build, then in turns."""
        ready = [setting for setting in group if self._built(setting)]
        begun = {setting: len(self.done[setting].long) for setting in ready}
        for turn in range(self.settings.repeats):
            for setting in ready if turn % 2 == 0 else reversed(ready):
                found = self.done[setting]
                forget_peak(self.device)
                seconds, found.out = self.call(setting, setting.new)
                found.long.append(seconds)
                found.peak = max(found.peak or 0, peak(self.device) or 0) or None
                found.first.append(self.call(setting, 1)[0])
        for setting in ready:
            self._pair(group[0], setting, begun)
            found = self.done[setting]
            fresh = found.per_token(setting.new)[begun[setting] :]
            self.tell(
                f"batch {setting.batch}, {found.engine}, {setting.label}: "
                f"{1e3 * statistics.median(fresh):.3f} ms per token"
            )
            if self.settings.sameness and setting.policy == "verify":
                self._compare_verify(setting, group[0])
        if any(setting.engine == COMPILED for setting in group):
            _forget_compiled(self.model)

    def _pair(self, full: Setting, setting: Setting, begun: dict[Setting, int]) -> None:
        """Ratios of this group's turns, where full depth ran in the same engine."""
        if full not in begun or self.done[full].engine != self.done[setting].engine:
            return
        whole = self.done[full].per_token(full.new)[begun[full] :]
        own = self.done[setting].per_token(setting.new)[begun[setting] :]
        self.done[setting].ratios += [a / b for a, b in zip(whole, own, strict=True)]

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
            return self._miss(setting, f"not supported by transformers ({_first_line(error)})")
        engine = setting.engine if setting.kind == "stock" else getattr(out, "engine", EAGER)
        self.done[setting] = Measured(str(engine), tuple(getattr(out, "kernels", ())), out, seconds)
        return True

    def _miss(self, setting: Setting, reason: str) -> bool:
        where = f"{setting.engine}, {setting.label}" if setting.engine else setting.label
        self.missing.append(Missing(label=where, batch=setting.batch, reason=reason))
        self.tell(f"batch {setting.batch}, {where}: {reason}")
        return False

    # what engines say

    def compare(self) -> None:
        """Full depth of the engine that ran against the eager one, and exact equality in float32."""
        dtype = self.place.dtype
        for batch in self.settings.batches:
            full = next((s for s in self.done if s.kind == "full" and s.batch == batch and s.engine != EAGER), None)
            full = full or next((s for s in self.done if s.kind == "full" and s.batch == batch), None)
            if full is None:
                continue
            engine = self.done[full].engine
            self._compare_full(full, engine, dtype, forced=batch == max(self.settings.batches))
        ran = {found.engine for found in self.done.values()}
        if dtype != "float32" and "cuda" in ran:
            self.sameness += agree.twins(self.device, self.backbone.model_type, "cuda")

    def _compare_full(self, full: Setting, engine: str, dtype: str, *, forced: bool) -> None:
        same = engine == EAGER
        plain = full if same else Setting("full", full.batch, min(full.new, self.settings.baseline_new), EAGER)
        text = self.done[plain].sequences if plain in self.done else self.call(plain, plain.new)[1].sequences
        prompt, reference = self.settings.prompt, "eager, full depth"
        stock = Setting("stock", full.batch, plain.new, STOCK)
        if stock in self.done:
            said = self.done[stock].sequences[:, prompt:]
            self.sameness.append(agree.free(said, text[:, prompt:], STOCK, reference, self.name, dtype))
        if not same:
            own, of = self.done[full].sequences[:, prompt:], f"{engine}, full depth"
            self.sameness.append(agree.free(own, text[:, prompt:], of, reference, self.name, dtype))
        if not forced:
            return
        expected = agree.forced(self.early(plain), self.model, text, prompt)
        found = {"one pass of the stock model": agree.at_once(self.model, text, prompt)}
        if not same:
            found[f"{engine}, full depth"] = agree.forced(self.early(full), self.model, text, prompt)
        for of, said in found.items():
            self._note_forced(of, reference, said, expected)

    def _compare_verify(self, setting: Setting, full: Setting) -> None:
        prompt, text = self.settings.prompt, self.done[setting].sequences
        said = agree.forced(self.early(full), self.model, text, prompt)
        equal, first = agree.compared(text[:, prompt:], self.done[full].sequences[:, prompt:])
        of = f"{self.done[setting].engine}, {setting.label}"
        self._note_forced(of, f"{self.done[full].engine}, full depth", said, text[:, prompt + 1 :], equal, first)

    def _note_forced(
        self, of: str, reference: str, said: Tensor, other: Tensor, equal: float | None = None, first: int | None = None
    ) -> None:
        self.sameness.append(
            Sameness(
                of=of,
                reference=reference,
                model=self.name,
                dtype=self.place.dtype,
                batch=len(said),
                positions=said.numel(),
                differing=agree.differing(said, other),
                equal=equal,
                first_difference=first,
            )
        )

    # the document

    def document(self, *, complete: bool) -> Bench:
        """What is known so far."""
        s = self.settings
        order = sorted(self.done, key=lambda setting: setting.batch)
        return Bench(
            complete=complete,
            run=run_facts(self.command, time.monotonic() - self.started),
            backbone=self.facts,
            place=self.place,
            load=Load(
                prompt=s.prompt,
                new=s.new,
                baseline_new=s.baseline_new,
                repeats=s.repeats,
                seed=s.seed,
                zero_tail_from=self.zero_tail_from,
            ),
            rows=tuple(self._row(setting) for setting in order if self.done[setting].long),
            sameness=tuple(self.sameness),
            missing=tuple(self.missing),
        )

    def _row(self, setting: Setting) -> Row:
        found, stock = self.done[setting], setting.kind == "stock"
        times = Spread.of(found.per_token(setting.new))
        context = self.settings.prompt + setting.new / 2
        weights, state = self.counted.stock(setting.batch, context)
        facts: dict[str, Any] = {}
        if not stock:
            early, out, n = self.early(setting), found.out, self.backbone.n_layers
            first = setting.exits[0] if setting.kind in ("exit", "spread") else n
            readout = early.exits.readout(self.backbone)
            asked = 0 if setting.kind == "full" else len(setting.exits)
            weights, state = self.counted.step(out, first, context, early.estimator, readout, asked)
            depths = out.exit_layers[:, 1:]
            facts = {
                "policy": None if setting.kind == "full" else setting.policy,
                "window": setting.window,
                "exits": setting.exits,
                "estimator": self.settings.estimator if setting.kind == "checks" else None,
                "leave": self.settings.leave if setting.kind == "spread" else None,
                "together": setting.together,
                "mean_depth": float(depths.double().mean()) / n,
                "left": float((depths < n).double().mean()),
                "pass_reduction": out.trace.pass_reduction,
                "acceptance": None if out.verification is None else out.verification.acceptance_rate,
            }
        speed, copied = weights / times.median, self.place.copy_bandwidth
        return Row(
            label=setting.label,
            kind=setting.kind,
            engine=found.engine,
            kernels=found.kernels,
            batch=setting.batch,
            new=setting.new,
            ms_per_token=Spread.of([1e3 * value for value in found.per_token(setting.new)]),
            tokens_per_second=Spread.of([setting.batch / value for value in found.per_token(setting.new)]),
            speed_up=Spread.of(found.ratios) if found.ratios and setting.kind not in ("full", "stock") else None,
            first_token=Spread.of(found.first),
            first_call=found.cold,
            building=found.cold - statistics.median(found.long),
            weight_bytes=weights,
            state_bytes=state,
            bandwidth=speed,
            bandwidth_share=speed / copied,
            state_bandwidth_share=(weights + state) / times.median / copied,
            peak_memory=found.peak,
            **facts,
        )


def _forget_compiled(model: PreTrainedModel) -> None:
    """Programs that transformers compiled, and their memory."""
    torch._dynamo.reset()
    vars(model).pop("_compiled_call", None)
    vars(model).pop("_cache", None)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".: ")
