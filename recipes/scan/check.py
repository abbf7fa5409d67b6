"""Does a scan predict what a trained head reaches? Both on the same text, at 95, 98 and 99 % agreement.

    python recipes/scan/check.py transformer-ee --data TEXT [--exits-dir DIR] [--tokens 20000] [--out DIR]

MODEL is a folder or a shipped backbone, DIR what `dynamax train` wrote for it (default: the exits that ship with it).
Where TEXT is what those exits were trained on, only documents that training held out are read. Depths are of tokens
whose states are intact, as training's own `held_out.depth` is. Writes DIR/MODEL-TEXT.json with both, and the scan.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dynamax_llm as dx
from common import command, parsed, parser, write_json
from dynamax_llm.evaluation.scan.collect import Chunk, gather, packed
from dynamax_llm.evaluation.scan.scan import TARGETS
from dynamax_llm.report.scanned import write_scan
from dynamax_llm.text.batches import pad
from dynamax_llm.traces.collect import collect_exits
from dynamax_llm.training.held_out import HeldOut, on_policy


def reached(backbone, exits: dx.Exits, chunks: list[Chunk], batch_tokens: int) -> dict[float, dict[str, float]]:
    """What the trained head reaches at each target on these chunks."""
    batches = [pad([chunk.ids for chunk in group]) for group in packed(chunks, batch_tokens)]
    readout, estimator = exits.readout(backbone), exits.estimator()
    held = HeldOut(batches, lambda batch: collect_exits(backbone, readout, batch))
    return {target: on_policy(estimator, held, exits.config, target) for target in TARGETS}


def main() -> None:
    made = parser(__doc__, "model", "device")
    made.add_argument("--data", required=True)
    made.add_argument("--exits-dir", help="default: the exits that ship with a shipped backbone")
    made.add_argument("--tokens", type=int, default=20_000)
    made.add_argument("--out", type=Path)
    args = parsed(made)
    lm, tokenizer = dx.load(args.model, dtype="float32", device_map=args.device)
    backbone, source = dx.adapt(lm), dx.find_source(args.data)
    exits = dx.Exits.from_pretrained(args.exits_dir or args.model)
    exits.heads.to(backbone.device)
    trained = exits.provenance
    share = trained["settings"]["held_out"] if trained["data"] == source.spec else 1.0
    settings = dx.ScanSettings(tokens=args.tokens, held_out=share, candidates=exits.config.candidates)
    name = f"{Path(args.model).name}-{Path(args.data).name.partition('.')[0]}"
    facts = {"name": Path(args.model).name, "command": command()}
    found = dx.scan(backbone, tokenizer, source, exits.config.layers, settings, **facts)
    sequence = min(settings.sequence, backbone.max_positions() or settings.sequence)
    chunks = gather(source, tokenizer, settings, sequence)
    truth = reached(backbone, exits, chunks, settings.batch_tokens)
    rows = [
        {
            "agreement": point.target,
            "margin": margin.depth.value,
            "predicted": point.depth.value,
            "reached": truth[point.target]["depth"],
            "difference": point.depth.value - truth[point.target]["depth"],
        }
        for margin, point in zip(found.points, found.predicted, strict=False)
    ]
    own = trained["held_out"]
    print(f"{name}: {found.data.tokens:,} tokens of {found.data.documents:,} documents, {exits.config.head} head")
    for row in rows:
        print(", ".join(f"{key} {value:.3f}" for key, value in row.items()))
    print(f"training's own held-out text: depth {own['depth']:.3f} at {own['agreement']:.2f}, {own['tokens']:,} tokens")
    print(f"{found.verdict.answer}. {found.verdict.reason} ({found.run.seconds:.0f} s)")
    if args.out:
        document = {"name": name, "tokens": found.data.tokens, "head": exits.config.head, "rows": rows, "own": own}
        write_json(args.out / f"{name}.json", document)
        write_scan(found, args.out / f"{name}-scan.json")


if __name__ == "__main__":
    main()
