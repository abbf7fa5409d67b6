"""What one check of every kind of head costs at a 7B shape, from the time per token with and without exits.

    PYTHONPATH=src python recipes/speed/checks.py --shape mistral-7b --out OUT [--batches 1 8]

Random weights; every exit is asked and no token leaves (``dynamax bench --checks``). With one exit the difference to
full depth is the first exit's check, which reads the whole LM head where its inputs need it; with three exits, a half
of the rest is a later exit's check. Writes OUT/checks-SHAPE.json. That the fused check decides as the same heads
through PyTorch do is a test: tests/engines, with the real kernels where there is a GPU.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import conditions, parsed, parser, write_json
from dynamax_llm.evaluation.bench import BenchSettings, bench
from dynamax_llm.evaluation.common.random_models import RANDOM_SHAPES, random_model
from dynamax_llm.exits.config import HEADS, INPUTS

COUNTS = (1, 3)


def check_times(model: torch.nn.Module, head: str, inputs: tuple[str, ...], batch: int, new: int, repeats: int) -> dict:
    """Microseconds of the first exit's check and of a later one, and of a layer."""
    more, layer = {}, 0.0
    for count in COUNTS:
        settings = BenchSettings(
            new=new,
            repeats=repeats,
            batches=(batch,),
            policies=(),
            checks=count,
            estimator=head,
            inputs=inputs,
            baselines=False,
            sameness=False,
        )
        rows = {row.kind: 1e3 * row.ms_per_token.median for row in bench(model, settings).rows}
        more[count] = rows["checks"] - rows["full"]
        layer = rows["full"] / model.config.num_hidden_layers
    later = (more[COUNTS[1]] - more[COUNTS[0]]) / (COUNTS[1] - COUNTS[0])
    about = {"batch": batch, "head": head, "inputs": list(inputs)}
    return {**about, "first_us": more[COUNTS[0]], "later_us": later, "layer_us": layer}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--shape", default="mistral-7b", choices=list(RANDOM_SHAPES))
    made.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    made.add_argument("--heads", nargs="+", default=list(HEADS))
    made.add_argument("--new", type=int, default=64)
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--out", type=Path, default=Path("."))
    args = parsed(made)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_model(args.shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    rows = []
    for batch, head, inputs in itertools.product(args.batches, args.heads, (("hidden",), INPUTS)):
        row = check_times(model, head, inputs, batch, args.new, args.repeats)
        shares = [f"{name} exit {row[f'{name}_us']:.1f} us" for name in ("first", "later")]
        print(f"batch {batch}, {head} on {'+'.join(inputs)}: {', '.join(shares)}, a layer {row['layer_us']:.1f} us")
        rows.append(row)
        write_json(args.out / f"checks-{args.shape}.json", {"shape": args.shape, **conditions(device), "times": rows})


if __name__ == "__main__":
    main()
