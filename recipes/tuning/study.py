"""What several ways of tuning made of one checkpoint, as a table: from OUT/NAME/tuning.json of each way.

python recipes/tuning/study.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import markdown, parsed, parser

COLUMNS = {
    "full model's loss": "loss",
    "exits' loss": "exit_loss",
    "oracle, all layers": "oracle_depth",
    "oracle, exits": "oracle_depth_at_exits",
    "margin rule at 98 %": "margin_depth",
}


def table(out: Path) -> str:
    """One row for the model before, one for each way."""
    records = {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("*/tuning.json"))}
    if not records:
        raise SystemExit(f"{out} holds no NAME/tuning.json: run dynamax tune with --out {out}/NAME first")
    first = next(iter(records.values()))
    rows = [("before", first["before"], 1.0)]
    rows += [(name, record["after"], record["tokens_kept"]) for name, record in records.items()]
    lines = [[name, *(f"{found[key]:.3f}" for key in COLUMNS.values()), f"{kept:.3f}"] for name, found, kept in rows]
    return (
        f"{first['tokens']:,} training tokens, {first['after']['tokens']:,} held-out tokens, exits after layers "
        f"{', '.join(map(str, first['layers']))} of {len(first['after']['loss_per_layer'])}.\n\n"
        + markdown(["", *COLUMNS, "tokens that are the original's"], lines)
    )


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("out", type=Path)
    print(table(parsed(made).out))
