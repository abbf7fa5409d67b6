"""ExitBatches into pools, pools into simulated calibrations, and one promise on other text."""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from simulation import pool_of, simulate

from dynamax_llm.backbones.loading import REFERENCE_BACKBONES, load
from dynamax_llm.calibration.proof import Proof
from dynamax_llm.exits.promise import METHODS
from dynamax_llm.metrics import rouge_l
from texts import load_texts

#: Losses of texts are kept in so many parts, those of tokens in tokens.
PARTS = 10_000
PROMISES = {"agreement": (0.98, 0.95), "consistency": (0.95, 0.9)}
#: The point at which held-out sequences and others are compared.
COMPARED = 8
SIZES, DRAWS, CONFIDENCE = (100, 200, 400), 2000, 0.95
BOUND, CALIBRATED = 0.98, 400
#: Methods whose measurements on other text go into shift.json, which reports show; the others are printed.
SHOWN = (METHODS[0], "crc")


def proof_by(method: str, limit: float) -> Proof:
    """A proof at CONFIDENCE, where the method has one."""
    return Proof(method, limit, None if method == "crc" else CONFIDENCE)


def harvested(out: Path, model: str) -> list[dict[str, Any]]:
    """The lines of a exit batch, packed or not; a line that was cut off is left out."""
    path = next((p for p in (out / f"{model}.jsonl", out / f"{model}.jsonl.gz") if p.is_file()), None)
    if path is None:
        sys.exit(f"{out} holds no {model}.jsonl: run `study.py harvest` first")
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def pool(args: argparse.Namespace) -> None:
    """Write results/pool-MODEL.json: losses of every sequence at every point."""
    for model in REFERENCE_BACKBONES if args.model is None else [args.model]:
        records = harvested(args.out, model)
        paths = {record["measure"]: record for record in records if record["record"] == "path"}
        facts = next(record for record in records if record["record"] == "facts")
        document = {name: facts[name] for name in ("model", "head", "policy", "device", "torch")}
        document["seconds"] = records[-1]["seconds"]
        for measure, path in paths.items():
            points = [{"parameter": p["parameter"], "thresholds": p["thresholds"]} for p in path["points"]]
            document[measure] = {"family": path["family"], "points": points, "kinds": {}}
        _add_agreement(document, [record for record in records if record["record"] == "agreement"])
        _add_texts(document, model, [record for record in records if record["record"] == "generated"])
        _add_unseen(document, args.data)
        target = args.results / f"pool-{model}.json"
        target.write_text(json.dumps(document, separators=(",", ":")) + "\n")
        print(target, {m: {k: len(v["losses"]) for k, v in document[m]["kinds"].items()} for m in paths})


def _add_unseen(document: dict[str, Any], texts: Path) -> None:
    """Which sequences the backbones never saw either, and whether these differ from the others: printed."""
    for name, items in load_texts(texts).items():
        kind = document["agreement"]["kinds"][name]
        kind["held_out"] = [int(item["held_out"]) for item in items][-len(kind["losses"][0]) :]
        unseen = np.array(kind["held_out"], dtype=bool)
        losses = pool_of(document, "agreement", name)[0][:, COMPARED]
        error = losses[unseen].std() / unseen.sum() ** 0.5
        print(
            f"{document['model']}, {name}, point {COMPARED + 1}: {losses[unseen].mean():.4f} of the tokens differ in "
            f"{unseen.sum()} held-out sequences (standard error {error:.4f}), {losses[~unseen].mean():.4f} in others"
        )


def _add_agreement(document: dict[str, Any], records: list[dict[str, Any]]) -> None:
    layers = load(document["model"])[0].config.num_hidden_layers
    for record in records:
        kind = document["agreement"]["kinds"].setdefault(record["kind"], {"losses": [], "depth": []})
        kind["losses"].append(record["differ"])
        kind["depth"].append(round(sum(record["layers"]) / len(record["layers"]) / record["tokens"] / layers, 5))
        document["agreement"]["unit"] = record["tokens"]


def _add_texts(document: dict[str, Any], model: str, records: list[dict[str, Any]]) -> None:
    tokenizer = load(model)[1]
    full: list[str] = []
    for record in records:
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in record["tokens"]]
        if record["point"] < 0:
            full = texts
            continue
        kind = document["consistency"]["kinds"].setdefault(record["kind"], {"losses": [], "depth": []})
        scores = [rouge_l(text, whole) for text, whole in zip(texts, full, strict=True)]
        kind["losses"].append([round(PARTS * (1.0 - score)) for score in scores])
        kind["depth"].append(round(sum(record["depth"]) / len(record["depth"]), 5))
        document["consistency"]["unit"] = PARTS


def read_pools(results: Path) -> dict[str, dict[str, Any]]:
    """The committed pools by model."""
    return {m: json.loads((results / f"pool-{m}.json").read_text()) for m in REFERENCE_BACKBONES}


#: What is simulated, as the table and simulate.json name it, and the decimals printed.
FIGURES = {"depth": 3, "broken": 4, "loss": 4, "refused": 3}


def simulate_all(args: argparse.Namespace) -> None:
    """Print and write how often promises are broken, per backbone, promise, number of prompts and method."""
    rows = []
    heads = ["backbone", "promise", "n", *(f"{figure}: {method}" for figure in FIGURES for method in METHODS)]
    print("|" + "|".join(f" {head} " for head in heads) + "|\n" + "|---" * len(heads) + "|")
    for model, document in read_pools(args.results).items():
        for measure, bounds in PROMISES.items():
            losses, depth = pool_of(document, measure)
            for bound, n in itertools.product(bounds, SIZES):
                about = {"backbone": model, "promise": f"{measure}>={bound:g}", "n": n}
                found = [_simulated(losses, depth, n, method, round(1.0 - bound, 12)) for method in METHODS]
                rows += [about | row for row in found]
                cells = [
                    f"{row[figure]:.{4 if figure in ('broken', 'loss') else 3}f}" for figure in FIGURES for row in found
                ]
                print("|" + "|".join(f" {cell} " for cell in [*map(str, about.values()), *cells]) + "|")
    (args.results / "simulate.json").write_text(json.dumps(rows, indent=1) + "\n")
    _print_gains(rows)


def _print_gains(rows: list[dict[str, Any]]) -> None:
    """How much less depth betting takes than the other methods, where either promises anything."""
    depth = {(row["backbone"], row["promise"], row["n"], row["method"]): row["depth"] for row in rows}
    for other, measure, n in itertools.product(METHODS[1:], PROMISES, SIZES):
        known = [key[:2] for key in depth if key[2:] == (n, other) and key[1].startswith(measure)]
        pairs = {about: (depth[*about, n, other], depth[*about, n, METHODS[0]]) for about in known}
        pairs = {about: pair for about, pair in pairs.items() if min(pair) < 1}
        gains = [theirs - ours for theirs, ours in pairs.values()]
        times = ", ".join(f"{(1 - ours) / (1 - theirs):.1f}" for theirs, ours in pairs.values() if theirs < 1)
        about = ", ".join(map(" ".join, pairs))
        print(
            f"{measure}, n = {n}: {METHODS[0]} is {min(gains):+.3f} to {max(gains):+.3f} of the depth below {other} "
            f"and saves {times} times as much ({about})"
        )


def _simulated(losses: np.ndarray, depth: np.ndarray, n: int, method: str, limit: float) -> dict[str, Any]:
    proof = proof_by(method, limit)
    found = simulate(losses, depth, n, proof, DRAWS)
    return {
        "method": method,
        "draws": DRAWS,
        "pool": len(losses),
        "least_n": proof.prompts_needed(),
        "refused": float((found.kept == 0).mean()),
        "broken": found.broken(limit),
        "loss": float(found.loss.mean()),
        "depth": float(found.depth.mean()),
    }


def shift(args: argparse.Namespace) -> None:
    """Calibrate on Wikipedia, measure elsewhere: results/shift.json, objects with the fields of evaluation's Shift."""
    found, limit = [], round(1.0 - BOUND, 12)
    for model, document in read_pools(args.results).items():
        losses, _ = pool_of(document, "agreement")
        for method in METHODS:
            kept = int(proof_by(method, limit).kept(losses[:CALIBRATED]))
            if not kept:
                sys.exit(f"{model}, {method}: no point keeps the promise")
            items = [_shifted(model, document, method, kind, kept - 1) for kind in ("wikipedia", "dialogues", "novels")]
            found += items if method in SHOWN else []
    (args.results / "shift.json").write_text(json.dumps(found, indent=1) + "\n")


def _shifted(model: str, document: dict[str, Any], method: str, kind: str, point: int) -> dict[str, Any]:
    """The agreement at one point on one kind of text; of Wikipedia on the articles that did not calibrate."""
    from dynamax_llm.evaluation.harness.results import Interval, Shift

    losses, depth = pool_of(document, "agreement", kind)
    losses = losses[CALIBRATED:] if kind == "wikipedia" else losses
    agreement = 1.0 - losses[:, point]
    draws = np.random.default_rng(0).integers(0, len(agreement), (2000, len(agreement)))
    low, high = np.quantile(agreement[draws].mean(1), (0.025, 0.975))
    item = Shift(
        backbone=model,
        promise=f"agreement>={BOUND:g}" + (", in expectation only (crc)" if method == "crc" else ""),
        calibrated_on=f"wikipedia, {CALIBRATED} sequences",
        measured_on="wikipedia, other articles" if kind == "wikipedia" else kind,
        samples=len(agreement),
        value=Interval(value=float(agreement.mean()), low=float(low), high=float(high)),
        mean_depth=float(depth[point]),
        kept=bool(agreement.mean() >= BOUND),
    )
    print(
        f"| {model} | {method} | {item.measured_on} | {item.value.value:.4f} [{low:.4f}, {high:.4f}] | "
        f"{item.mean_depth:.3f} | {'yes' if item.kept else 'no'} |"
    )
    return item.model_dump()
