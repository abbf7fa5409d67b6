"""Do promises hold? Calibrations simulated on real losses, and one promise measured on other text. See README.md.

    python recipes/texts.py promises --data DIR --out texts.jsonl.xz
    python recipes/promises/study.py pool --data texts.jsonl.xz --out OUT [--models mamba-ee] [--device cuda]
    python recipes/promises/study.py simulate       # results/simulate.json: how often promises are broken
    python recipes/promises/study.py shift          # results/shift.json: Wikipedia's promise elsewhere

`pool` writes OUT/pool-MODEL.json: the loss of every sequence at every point of a path that was learned on sequences
that are not in any pool. The document is written after every point, the most important ones first, so a run that is cut
off leaves what it measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import bootstrap, device_name, markdown, parsed, parser, write_json
from dynamax_llm.backbones import adapt
from dynamax_llm.backbones.loading import REFERENCE_BACKBONES, load, shipped_exits
from dynamax_llm.calibration.fit import fit_path
from dynamax_llm.calibration.prompts import Item
from dynamax_llm.calibration.risk_test import RiskTest
from dynamax_llm.calibration.risks import AgreementRisk, Risk, TextRisk, inconsistency
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.evaluation.harness.results import Interval, Shift
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.promise import METHODS
from dynamax_llm.text.sources import json_records

RESULTS = Path(__file__).resolve().parent / "results"
KINDS = ("wikipedia", "dialogues", "novels")
#: Tokens of a prompt, new tokens of a text that is read, and of one that is generated; sequences of the path.
PROMPT, READ, GENERATED, PATH = 64, 64, 48, 100
#: λ of the points: of what could be saved at all, this share is saved on the path's sequences; the path's own limit.
PARAMETERS = {"agreement": [i / 40 for i in range(1, 27)], "consistency": [i / 40 for i in range(1, 23)]}
LIMITS = {"agreement": 0.02, "consistency": 0.1}
#: Losses are kept as integers, in these parts of one.
UNITS = {"agreement": READ, "consistency": 10_000}
HEAD, POLICY = "four/mamba", "propagate"  # the exits of the recorded pools
#: What is simulated: promises, calibration sizes, draws; and the promise that is measured on other text.
PROMISES = {"agreement": (0.98, 0.95), "consistency": (0.95, 0.9)}
SIZES, DRAWS, CONFIDENCE, BOUND, CALIBRATED = (100, 200, 400), 2000, 0.95, 0.98, 400
#: Methods whose measurements on other text go into shift.json, which reports show; the others are printed.
SHOWN = (METHODS[0], "crc")
#: Figures of the simulation and their decimals.
FIGURES = {"depth": 3, "broken": 4, "loss": 4, "refused": 3}


class Pool:
    """One backbone with its exits and sequences; the document is written to ``out`` as it grows."""

    def __init__(self, model: str, args: argparse.Namespace) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.started, self.out, self.rows = time.perf_counter(), args.out / f"pool-{model}.json", args.rows
        lm, self.tokenizer = load(model, dtype="float32", device_map=args.device)
        self.backbone, self.exits = adapt(lm), Exits.from_pretrained(shipped_exits(model, HEAD))
        rows = [row for _, row in json_records(args.data)]
        self.items: dict[str, list[Item]] = {}
        held_out: dict[str, list[int]] = {}
        for kind in KINDS:
            mine = [row for row in rows if row["kind"] == kind]
            texts = [self.tokenizer(row["text"]).input_ids[: PROMPT + READ] for row in mine]
            self.items[kind] = [Item(tuple(ids), PROMPT) for ids in texts]
            held_out[kind] = [int(row["held_out"]) for row in mine]
        path = PATH if args.limit is None else args.limit
        self.path, self.items["wikipedia"] = self.items["wikipedia"][:path], self.items["wikipedia"][path:]
        held_out["wikipedia"] = held_out["wikipedia"][path:]
        self.items = {kind: items[: args.limit] for kind, items in self.items.items()}
        about = {"model": model, "head": HEAD, "policy": POLICY, "torch": torch.__version__}
        self.document: dict[str, Any] = {**about, "device": device_name(args.device)}
        self.held_out = {kind: flags[: args.limit] for kind, flags in held_out.items()}

    def risk(self, measure: str, items: list[Item]) -> Risk:
        if measure == "agreement":
            return AgreementRisk(self.backbone, self.tokenizer, items, self.rows)
        return TextRisk(self.backbone, self.tokenizer, items, 8 * self.rows, GENERATED, loss=inconsistency)

    def measure(self, measure: str, kinds: tuple[str, ...]) -> None:
        """The path, then every sequence's loss at every point, kind after kind."""
        if measure not in self.document:
            risk = self.risk(measure, self.path)
            path = fit_path(self.exits, risk, LIMITS[measure], {"policy": POLICY}, PARAMETERS[measure])
            points = [{"parameter": point.parameter, "thresholds": list(point.thresholds)} for point in path.points]
            part = {"family": path.family, "points": points, "kinds": {}, "unit": UNITS[measure]}
            self.document[measure] = part
        part = self.document[measure]
        for kind in kinds:
            found = part["kinds"][kind] = {"losses": [], "depth": [], "held_out": self.held_out[kind]}
            risk = self.risk(measure, self.items[kind])
            for point in part["points"]:
                thresholds = ["never" if bar is None else bar for bar in point["thresholds"]]
                here = risk.measure(EarlyExit(self.exits, threshold=thresholds, policy=POLICY))
                found["losses"].append((here.losses * part["unit"]).round().int().tolist())
                found["depth"].append(round(float(here.depth.mean()), 5))
                self.document["seconds"] = round(time.perf_counter() - self.started, 1)
                write_json(self.out, self.document)
            print(f"{self.out.name}: {measure}, {kind}, {self.document['seconds']} s", flush=True)


def pool(args: argparse.Namespace) -> None:
    """Losses of every sequence at every point: what a calibration draws from."""
    if args.data is None:
        sys.exit("pool needs --data: the texts that `python recipes/texts.py promises` writes")
    for model in args.models:
        made = Pool(model, args)
        for measure, kinds in (("agreement", KINDS[:1]), ("consistency", KINDS[:1]), ("agreement", KINDS[1:])):
            made.measure(measure, kinds)


class Outcomes(NamedTuple):
    """Per calibration: points kept (0: nothing could be promised), and the true mean loss and depth of what was."""

    kept: np.ndarray
    loss: np.ndarray
    depth: np.ndarray


def losses_of(document: dict[str, Any], measure: str, kind: str = "wikipedia") -> tuple[np.ndarray, np.ndarray]:
    """Losses (pool, points) and mean depth (points,) of a pool document."""
    found = document[measure]["kinds"][kind]
    return np.array(found["losses"], dtype=np.float64).T / document[measure]["unit"], np.array(found["depth"])


def simulate(
    losses: np.ndarray, depth: np.ndarray, n: int, test: RiskTest, draws: int = DRAWS, seed: int = 0
) -> Outcomes:
    """``draws`` calibrations on ``n`` sequences drawn with replacement from ``losses`` (pool, points), safe to risky,
    with mean ``depth`` (points,). The pool's mean is the truth: the pool is the whole population."""
    rows = np.random.default_rng(seed).integers(0, len(losses), (draws, n))
    kept = np.concatenate([test.accepted(losses[some]) for some in np.array_split(rows, -(-draws // 100))])
    truth = np.concatenate(([0.0], losses.mean(0)))
    return Outcomes(kept, truth[kept], np.concatenate(([1.0], depth))[kept])


def test_by(method: str, limit: float) -> RiskTest:
    """A test at CONFIDENCE, where the method has one."""
    return RiskTest(method, limit, None if method == "crc" else CONFIDENCE)


def pools(results: Path) -> dict[str, dict[str, Any]]:
    """The recorded pools by model."""
    return {model: json.loads((results / f"pool-{model}.json").read_text()) for model in REFERENCE_BACKBONES}


def simulate_all(args: argparse.Namespace) -> None:
    """How often promises are broken, per backbone, promise, number of prompts and method."""
    rows, lines = [], []
    for (model, document), measure in itertools.product(pools(args.results).items(), PROMISES):
        losses, depth = losses_of(document, measure)
        for bound, n in itertools.product(PROMISES[measure], SIZES):
            limit = round(1.0 - bound, 12)
            about = {"backbone": model, "promise": f"{measure}>={bound:g}", "n": n}
            here = []
            for method in METHODS:
                test = test_by(method, limit)
                found = simulate(losses, depth, n, test)
                facts = {"method": method, "draws": DRAWS, "pool": len(losses), "least_n": test.prompts_needed()}
                facts |= {"refused": float((found.kept == 0).mean()), "broken": float((found.loss > limit).mean())}
                here.append({**about, **facts, "loss": float(found.loss.mean()), "depth": float(found.depth.mean())})
            rows += here
            lines.append([*about.values(), *(f"{row[name]:.{FIGURES[name]}f}" for name in FIGURES for row in here)])
    write_json(args.results / "simulate.json", rows)
    header = ["backbone", "promise", "n", *(f"{figure}: {method}" for figure in FIGURES for method in METHODS)]
    print(markdown(header, lines))


def shift(args: argparse.Namespace) -> None:
    """Calibrate on Wikipedia, measure elsewhere: objects with the fields of an evaluation's Shift."""
    found, lines, limit = [], [], round(1.0 - BOUND, 12)
    for (model, document), method in itertools.product(pools(args.results).items(), METHODS):
        kept = int(test_by(method, limit).accepted(losses_of(document, "agreement")[0][:CALIBRATED]))
        if not kept:
            sys.exit(f"{model}, {method}: no point keeps the promise")
        for kind in KINDS:
            item = _shifted(model, document, method, kind, kept - 1)
            value = f"{item.value.value:.4f} [{item.value.low:.4f}, {item.value.high:.4f}]"
            yes = "yes" if item.kept else "no"
            lines.append([model, method, item.measured_on, value, f"{item.mean_depth:.3f}", yes])
            found += [item.model_dump()] * (method in SHOWN)
    write_json(args.results / "shift.json", found)
    print(markdown(["backbone", "calibrated by", "measured on", "agreement", "depth", f"at least {BOUND:g}"], lines))


def _shifted(model: str, document: dict[str, Any], method: str, kind: str, point: int) -> Shift:
    """The agreement at one point on one kind of text; of Wikipedia on the articles that did not calibrate."""
    losses, depth = losses_of(document, "agreement", kind)
    agreement = 1.0 - (losses[CALIBRATED:] if kind == "wikipedia" else losses)[:, point]
    found = bootstrap(agreement.tolist())
    return Shift(
        backbone=model,
        promise=f"agreement>={BOUND:g}" + (", in expectation only (crc)" if method == "crc" else ""),
        calibrated_on=f"wikipedia, {CALIBRATED} sequences",
        measured_on="wikipedia, other articles" if kind == "wikipedia" else kind,
        samples=len(agreement),
        value=Interval(value=found["mean"], low=found["low"], high=found["high"]),
        mean_depth=float(depth[point]),
        kept=bool(found["mean"] >= BOUND),
    )


def main() -> None:
    stages = {"pool": pool, "simulate": simulate_all, "shift": shift}
    made = parser(__doc__, "device")
    made.add_argument("stage", choices=stages)
    made.add_argument("--data", type=Path, help="the texts that recipes/texts.py wrote")
    made.add_argument("--out", type=Path, default=RESULTS, help="pool: folder of pool-MODEL.json")
    made.add_argument("--results", type=Path, default=RESULTS, help="simulate, shift: folder of the pools")
    made.add_argument("--models", nargs="+", choices=REFERENCE_BACKBONES, default=list(REFERENCE_BACKBONES))
    made.add_argument("--rows", type=int, default=64, help="sequences per pass")
    made.add_argument("--limit", type=int, help="sequences per pool and for the path, to try things out")
    args = parsed(made)
    stages[args.stage](args)


if __name__ == "__main__":
    main()
