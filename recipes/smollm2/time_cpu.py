"""Wall clock of a draft beside plain generate, on a CPU, in float32.

    OMP_NUM_THREADS=1 dynamax calibrate MODEL --exits DRAFT --data heldout.jsonl --chat --prompts 48 --out CALIBRATED
    python -m recipes.smollm2.time_cpu MODEL --exits CALIBRATED --prompts heldout.jsonl --out FILE

The last prompts of every kind, which calibration did not read. Both sides write the same greedy text, in turns; a
prompt's figure is the median of the ratios of neighbours. Beside the wall clock stands the process's own CPU time,
which other programs on the machine disturb less. ``--threshold`` and ``--window`` in place of those chosen.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recipes.common import conditions, parsed, parser, write_json

from dynamax_llm.backbones.loading import load
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.decoding.draft_choice import kept_choices
from dynamax_llm.evaluation.common.timing import in_turns, timed
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.text.prompts import Prompt, chat_ids, read_prompts

#: Names of the two ratios.
FIGURES = ("speed_up", "speed_up_cpu_time")


def last_of_each_kind(prompts: list[Prompt], count: int) -> dict[str, list[Prompt]]:
    """The last ``count`` prompts of every kind."""
    kinds: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        kinds.setdefault(prompt.kind or "all", []).append(prompt)
    return {kind: found[-count:] for kind, found in sorted(kinds.items())}


def spent(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds of wall clock and of CPU time, and what the call returned."""
    start = time.process_time()
    seconds, out = timed(call)
    return seconds, time.process_time() - start, out


def measured(model: Any, early: EarlyExit, ids: torch.Tensor, new: int, repeats: int) -> dict[str, Any]:
    """Medians over pairs of runs on one prompt."""
    request = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new}

    def plain() -> tuple[float, float, Any]:
        return spent(lambda: model.generate(ids, **request))

    def drafted() -> tuple[float, float, Any]:
        return spent(lambda: model.generate(ids, custom_generate=early, **request))

    pairs = [in_turns(plain, drafted, turn) for turn in range(repeats)]
    wall = [slow[0] / fast[0] for slow, fast in pairs]
    cpu = [slow[1] / fast[1] for slow, fast in pairs]
    (_, _, text), (_, _, out) = pairs[-1]
    found = out.verification
    return {
        "speed_up": statistics.median(wall),
        "speed_up_cpu_time": statistics.median(cpu),
        "ratios": wall,
        "ratios_cpu_time": cpu,
        "plain_cpu_seconds": statistics.median(slow[1] for slow, _ in pairs),
        "tokens": out.trace.n_tokens,
        "same_text": out.sequences.tolist() == text.tolist(),
        "counts": found.counts(),
        "drafting": out.drafting,
    }


def main() -> None:
    made = parser(__doc__, "model")
    made.add_argument("--exits", type=Path, required=True)
    made.add_argument("--prompts", type=Path, required=True)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--per-kind", type=int, default=3)
    made.add_argument("--new-tokens", type=int, default=96)
    made.add_argument("--repeats", type=int, default=4)
    made.add_argument("--threshold", type=float)
    made.add_argument("--window", type=int)
    made.add_argument("--no-adaptive", dest="adaptive", action="store_false")
    args = parsed(made)
    model, tokenizer = load(args.model, dtype="float32")
    exits = Exits.from_pretrained(args.exits)
    early = EarlyExit(exits, threshold=args.threshold, window=args.window, adaptive=args.adaptive)
    record: dict[str, Any] = {"conditions": conditions(), "kinds": {}}
    record["choices"] = [choice.model_dump(mode="json") for choice in kept_choices(exits)]
    measured(model, early, torch.ones(1, 8, dtype=torch.int64), 8, 1)  # not counted
    for kind, prompts in last_of_each_kind(read_prompts(args.prompts), args.per_kind).items():
        rows = record["kinds"][kind] = []
        for prompt in prompts:
            ids = torch.tensor([chat_ids(tokenizer, prompt)])
            rows.append(measured(model, early, ids, args.new_tokens, args.repeats))
        for name in FIGURES:
            print(kind, name, " ".join(f"{row[name]:.2f}" for row in rows), flush=True)
        write_json(args.out, record)
    every = [row for rows in record["kinds"].values() for row in rows]
    for name in FIGURES:
        record[name] = statistics.fmean(row[name] for row in every)
        print(f"mean {name} {record[name]:.3f}")
    record["same_text"] = sum(row["same_text"] for row in every)
    write_json(args.out, record)
    print(f"same text in {record['same_text']} of {len(every)}")


if __name__ == "__main__":
    main()
