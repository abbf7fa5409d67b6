"""Losses of real sequences at every point of a path: on a GPU in minutes, on a CPU in hours. See README.md.

Everything is written as it is found, one JSON object a line, what matters most first:

    path        thresholds per exit of every point, learnt on sequences that are not in any pool
    agreement   per sequence: new tokens that differ, and the sum of the layers run for them
    generated   per prompt: the new token ids, and the sum of the layers; texts are compared where ROUGE-L is installed
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from dynamax_llm.backbones import adapt
from dynamax_llm.backbones.loading import load, shipped_exits
from dynamax_llm.calibration.fit import fit_path
from dynamax_llm.calibration.prompts import Item
from dynamax_llm.calibration.risks import AgreementRisk, TextRisk, inconsistency
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.exits.artifact import Exits
from texts import KINDS, load_texts

#: Tokens of a prompt, new tokens of a text read, and of one generated.
PROMPT, READ, GENERATED = 64, 64, 48
#: Sequences of the path's own; the pools of each kind come after them.
PATH = 100
#: λ of the points: of what could be saved at all, this share is saved on the path's own sequences.
PARAMETERS = {
    "agreement": [step / 40 for step in range(1, 27)],
    "consistency": [step / 40 for step in range(1, 23)],
}
#: The loss that the paths are meant for.
LIMITS = {"agreement": 0.02, "consistency": 0.1}
HEAD, POLICY = "four/mamba", "propagate"  # the exits that the recorded pools were harvested with


class ExitBatch:
    """One backbone with its exits; lines go to ``out``."""

    def __init__(self, model: str, texts: Path, out: Path, device: str, rows: int, limit: int | None) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.started = time.perf_counter()
        self.lm, self.tokenizer = load(model, dtype="float32", device_map=device)
        self.backbone, self.exits = adapt(self.lm), Exits.from_pretrained(shipped_exits(model, HEAD))
        self.rows = rows
        self.path_items: list[Item] = []
        self.pools: dict[str, list[Item]] = {}
        found = load_texts(texts)
        for kind in KINDS:
            items = [
                Item(tuple(self.tokenizer(text["text"]).input_ids[: PROMPT + READ]), PROMPT) for text in found[kind]
            ]
            if kind == "wikipedia":
                own = PATH if limit is None else min(PATH, limit)
                self.path_items, items = items[:own], items[own:]
            self.pools[kind] = items[:limit]
        self.file = out.open("w", encoding="utf-8")
        device_name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
        self.write(record="facts", model=model, head=HEAD, policy=POLICY, device=device_name, torch=torch.__version__)

    def write(self, **record: Any) -> None:
        self.file.write(json.dumps({**record, "seconds": round(time.perf_counter() - self.started, 1)}) + "\n")
        self.file.flush()
        print({name: value for name, value in record.items() if not isinstance(value, list)}, flush=True)

    def run(self) -> None:
        read = AgreementRisk(self.backbone, self.tokenizer, self.path_items, self.rows)
        agreement = self.path("agreement", read)
        self.read("wikipedia", agreement)
        spoken = self.risk(TextRisk, self.path_items)
        self.generate(self.path("consistency", spoken))
        for kind in KINDS[1:]:
            self.read(kind, agreement)

    def risk(self, kind: type[TextRisk], items: list[Item]) -> TextRisk:
        return kind(self.backbone, self.tokenizer, items, 512, GENERATED, loss=inconsistency)

    def path(self, measure: str, risk: Any) -> list[tuple[float | None, ...]]:
        found = fit_path(self.exits, risk, LIMITS[measure], {"policy": POLICY}, PARAMETERS[measure])
        points = [vars(point) | {"thresholds": list(point.thresholds)} for point in found.points]
        self.write(record="path", measure=measure, family=found.family, sequences=len(risk.items), points=points)
        return [point.thresholds for point in found.points]

    def early(self, thresholds: tuple[float | None, ...]) -> EarlyExit:
        return EarlyExit(self.exits, threshold=["never" if bar is None else bar for bar in thresholds], policy=POLICY)

    def read(self, kind: str, path: list[tuple[float | None, ...]]) -> None:
        risk = AgreementRisk(self.backbone, self.tokenizer, self.pools[kind], self.rows)
        for place, thresholds in enumerate(path):
            found = risk.measure(self.early(thresholds))
            differ = (found.losses * READ).round().int().tolist()
            layers = (found.depth * READ * self.backbone.n_layers).round().int().tolist()
            self.write(record="agreement", kind=kind, point=place, tokens=READ, differ=differ, layers=layers)

    def generate(self, path: list[tuple[float | None, ...]]) -> None:
        risk = self.risk(TextRisk, self.pools["wikipedia"])
        for place, thresholds in [(-1, (None,) * len(path[0])), *enumerate(path)]:
            rows, depth = risk.generate(self.early(thresholds))
            shares = [round(share, 5) for share in depth.tolist()]
            self.write(record="generated", kind="wikipedia", point=place, tokens=rows, depth=shares)
