"""Do promises hold? Calibrations simulated on real losses, and one promise measured on other text. See README.md.

python recipes/promises/study.py prepare --data DIR      # DIR: the reference backbones' training folder
python recipes/promises/study.py exit batch --model transformer-ee --out OUT [--device cuda]
python recipes/promises/study.py pool --out OUT          # results/pool-MODEL.json from what exit batch wrote
python recipes/promises/study.py simulate                # results/simulate.json: how often promises are broken
python recipes/promises/study.py shift                   # results/shift.json: Wikipedia's promise elsewhere
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from transformers.utils import logging

from dynamax_llm.backbones.loading import REFERENCE_BACKBONES

HERE = Path(__file__).resolve().parent
TEXTS = HERE.parents[1] / ".carry" / "promises" / "texts.jsonl.xz"
RESULTS = HERE / "results"
#: Documents per kind: 100 of Wikipedia's for the path, the rest for the pools.
COUNTS = {"wikipedia": 1100, "dialogues": 600, "novels": 600}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("prepare", "harvest", "pool", "simulate", "shift"))
    parser.add_argument("--data", type=Path, help="prepare: the training folder; harvest: what prepare wrote")
    parser.add_argument("--out", type=Path, help="folder of harvests, MODEL.jsonl each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--model", choices=REFERENCE_BACKBONES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=64, help="sequences per pass")
    parser.add_argument("--limit", type=int, help="sequences per pool and for the path, to try things out")
    return parser.parse_args()


def main() -> int:
    args = parse()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.stage == "prepare":
        from texts import prepare

        if args.data is None:
            sys.exit("prepare needs --data DIR, the folder that the reference backbones were trained on")
        facts = prepare(args.data, TEXTS, COUNTS)
        TEXTS.with_name("texts.json").write_text(json.dumps(facts, indent=1) + "\n")
        print(json.dumps(facts, indent=1))
    elif args.stage == "harvest":
        from collect_exits import ExitBatch

        if args.out is None or args.model is None:
            sys.exit("harvest needs --model and --out, a folder")
        args.out.mkdir(parents=True, exist_ok=True)
        target = args.out / f"{args.model}.jsonl"
        ExitBatch(args.model, args.data or TEXTS, target, args.device, args.rows, args.limit).run()
    else:
        import losses

        args.data = args.data or TEXTS
        {"pool": losses.pool, "simulate": losses.simulate_all, "shift": losses.shift}[args.stage](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
