"""All cells of one model and judge: thresholds, then every policy at every depth. README.md says what is measured."""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from bench import STATIC, Bench, Threshold, first_difference
from prompts import load_prompts
from records import Log, Row, Settings, pack, read
from torch import Tensor

from dynamax_llm.backbones.loading import load
from dynamax_llm.decoding import EarlyExitOutput
from dynamax_llm.decoding.thresholds import NEVER
from tuning import find_threshold


def family_of(run: str) -> str:
    """Whose threshold a run takes: ``verify`` drafts as ``defer`` decides."""
    return "defer" if run.startswith("verify") else run


def part_of(run: str) -> str:
    """The file a run's cells go to: verification is slow, so each of its windows can have a process of its own."""
    return run if run.startswith("verify") else "batched"


class Group:
    """One model and one judge, and runs of one part: one file of finished cells."""

    def __init__(self, model: str, estimator: str, part: str, settings: Settings, prompts: Path, out: Path) -> None:
        self.model, self.estimator, self.settings, self.prompts = model, estimator, settings, prompts
        self.log = Log(out / f"{model}-{estimator}-{part}.jsonl", settings)
        self.started = time.perf_counter()

    @functools.cached_property
    def batched(self) -> Bench:
        return self._bench("eval", self.settings.prompts, self.settings.device, self.settings.prompts)

    @functools.cached_property
    def alone(self) -> Bench:
        count = max(self.settings.checked, self.settings.alone)
        return self._bench("eval", count, self.settings.alone_device, 1)

    @functools.cached_property
    def tuning(self) -> Bench:
        return self._bench("tune", self.settings.tuning, self.settings.device, self.settings.tuning)

    def _bench(self, split: str, count: int, device: str, batch: int) -> Bench:
        s = self.settings
        length = s.prompt_tokens + s.new_tokens
        return Bench(self.model, device, self._texts(split, count, length), s.prompt_tokens, batch)

    def _texts(self, split: str, count: int, length: int) -> Tensor:
        return load_prompts(self.prompts, load(self.model)[1], split, count, length)

    def run(self, runs: Sequence[str], depths: Sequence[float]) -> None:
        """Every cell that is not finished yet; policies that the model's layers do not know are left out.

        ``verify`` and the costs of ``defer`` are measured one prompt at a time: a batch shares its catch-up passes.
        """
        self.cell("machine", self._machine)
        if any(part_of(name) == "batched" for name in runs):
            self.cell("full", lambda: {"tokens": pack(self.batched.full[:, self.settings.prompt_tokens :].tolist())})
        for target in self._targets(depths):
            for name in filter(self.batched.defines, runs):
                family, exact = family_of(name), name.startswith("verify")
                threshold = self.cell(f"threshold|{family}|{target}", self._finding(family, target))["threshold"]
                if not exact:
                    self.cell(f"quality|{name}|{target}", lambda n=name, t=threshold: self._quality(n, t))
                if exact or name == "defer":
                    self.cell(f"alone|{name}|{target}", lambda n=name, t=threshold: self._alone(n, t))

    def cell(self, key: str, measure: Callable[[], Row]) -> Row:
        """A finished row, from the file or from ``measure``."""
        if key not in self.log:
            start = time.perf_counter()
            row = measure()
            seconds = time.perf_counter() - start
            row = self.log.add(key, {**row, "seconds": round(seconds, 2)})
            shown = " ".join(
                f"{name} {row[name]:.4f}" for name in ("threshold", "depth") if isinstance(row.get(name), float)
            )
            elapsed = time.perf_counter() - self.started
            print(f"{elapsed:7.1f} s  {self.model} {self.estimator} {key}: {seconds:.1f} s  {shown}", flush=True)
        return self.log[key]

    def _targets(self, depths: Sequence[float]) -> list[float]:
        """Mean depths to reach; a fixed exit has its own."""
        if self.estimator != STATIC:
            return list(depths)
        return [round(stop / self.batched.backbone.n_layers, 4) for stop in self._stops()[:-1]]

    def _stops(self) -> tuple[int, ...]:
        return self.batched.early(STATIC, "propagate", 0.0).exits.config.layers

    def _finding(self, family: str, target: float) -> Callable[[], Row]:
        return lambda: self._static(target) if self.estimator == STATIC else self._find(family, target)

    def _static(self, target: float) -> Row:
        stops = [round(stop / self.batched.backbone.n_layers, 4) for stop in self._stops()]
        return {"threshold": [0.0 if stop == target else NEVER for stop in stops], "depth": target}

    def _find(self, family: str, target: float) -> Row:
        found = self._elsewhere(f"threshold|{family}|{target}")
        return self._search(family, target) if found is None else found

    def _elsewhere(self, key: str) -> Row | None:
        """A row that another part of the same model and judge has finished under the same settings."""
        for path in sorted(self.log.path.parent.glob(f"{self.model}-{self.estimator}-*.jsonl")):
            row = None if path == self.log.path else read(path).get(key)
            if row is not None and row["settings"] == self.log.digest:
                return row
        return None

    def _search(self, family: str, target: float) -> Row:
        bench, points = self.tuning, self._points(family)

        def depth_at(threshold: float) -> float:
            early = bench.early(self.estimator, family, threshold)
            return bench.depth(early, self.settings.tuning, self.settings.tuning_tokens)

        floor = self._stops()[0] / self.batched.backbone.n_layers
        threshold, depth = find_threshold(depth_at, target, floor, points)
        return {"threshold": threshold, "depth": depth, "points": sorted(points.items())}

    def _points(self, family: str) -> dict[float, float]:
        """What earlier targets measured."""
        found = [row["points"] for key, row in self.log.rows.items() if key.startswith(f"threshold|{family}|")]
        return {x: depth for points in found for x, depth in points}

    def _quality(self, run: str, threshold: Threshold) -> Row:
        """Free generation in batches, and agreement along two texts."""
        bench, s = self.batched, self.settings
        early = bench.early(self.estimator, run, threshold)
        outs = bench.run(early, s.prompts, s.new_tokens)
        layers = torch.cat([out.exit_layers for out in outs])
        own, own_depth = bench.agreement(early, own=True)
        real, real_depth = bench.agreement(early, own=False)
        return {
            "depth": float(layers.float().mean()) / bench.backbone.n_layers,
            "layers": {str(depth): int((layers == depth).sum()) for depth in layers.unique().tolist()},
            "decoded_depth": float(layers[:, 1:].float().mean()) / bench.backbone.n_layers,
            "tokens": pack(torch.cat([out.sequences[:, s.prompt_tokens :] for out in outs]).tolist()),
            "forced": s.new_tokens - 1,
            "agreeing": own,
            "agreeing_depth": own_depth,
            "agreeing_real": real,
            "agreeing_real_depth": real_depth,
            "counted_reduction": _mean([out.trace.counted_reduction for out in outs]),
        }

    def _alone(self, run: str, threshold: Threshold) -> Row:
        """One prompt at a time: passes, costs, and under ``verify`` the tokens and what became of the proposals."""
        bench, s, exact = self.alone, self.settings, run.startswith("verify")
        count = s.checked if exact else s.alone
        early = bench.early(self.estimator, run, threshold)
        outs = bench.run(early, count, s.new_tokens)
        row: Row = {
            "prompts": count,
            "depth": _mean([out.trace.mean_depth for out in outs]),
            "counted_reduction": _mean([out.trace.counted_reduction for out in outs]),
            "pass_reduction": _mean([out.trace.pass_reduction for out in outs]),
            "window_bytes": max(out.trace.stats.window_bytes for out in outs),
        }
        return {**row, **self._checked(outs)} if exact else row

    def _checked(self, outs: list[EarlyExitOutput]) -> Row:
        """Equality with the full model's text, which ``generate`` made on the same device, one prompt at a time."""
        bench, prompt = self.alone, self.settings.prompt_tokens
        new = [out.sequences[0, prompt:].tolist() for out in outs]
        full = bench.full[: len(new), prompt:].tolist()
        firsts = [first_difference(one, other) for one, other in zip(new, full, strict=True)]
        facts = [vars(out.verification) for out in outs]
        return {
            "tokens": pack(new),
            "full": pack(full),
            "gaps": [self._gap(i, first) for i, first in enumerate(firsts) if first < self.settings.new_tokens],
            "replayed": sum(out.trace.stats.replayed for out in outs),
            "verification": {name: sum(fact[name] for fact in facts) for name in facts[0]},
        }

    def _gap(self, row: int, place: int) -> dict[str, float]:
        """How much the full model prefers its token to the next best where a text first differs."""
        bench = self.alone
        prefix = bench.full[row : row + 1, : self.settings.prompt_tokens + place]
        with torch.no_grad():
            best = bench.model(prefix).logits[0, -1].float().topk(2).values
        return {"prompt": row, "place": place, "gap": float(best[0] - best[1])}

    def _machine(self) -> Row:
        def name(device: str) -> str:
            return torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()

        return {
            "device_name": name(self.settings.device),
            "alone_device_name": name(self.settings.alone_device),
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
            f"Python {platform.python_version()}",
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
