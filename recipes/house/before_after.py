"""Is this tree as fast as a commit before it? Both trees in one run, in turn, in processes of their own.

    python recipes/house/before_after.py COMMIT [--rounds 7] [--tokens 48] [--out DIR] [--gpu] [--shapes mistral-7b …]

The commit is checked out with `git worktree` into a temporary folder. Each round runs every case once in each tree, the
order alternating; a case's figure is the median over rounds of new time / old time, with its least and greatest. The
cases on a CPU are those of recipes/cpu on both shipped backbones: Hugging Face's own generate (both trees run the same
code there: it shows the noise), full depth, leaving at half depth under each policy, and the shipped heads. `--gpu`
adds decoding at 7B shapes with random weights on the GPU engine. Prints a table and writes DIR/before_after.json.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "The river rises in the mountains of the north and flows through three countries before it reaches the sea."
MODELS, SHAPES = ("transformer-ee", "mamba-ee"), ("mistral-7b", "codestral-mamba-7b")
#: Runs of every case in a process.
REPEATS = 3
#: Policy and threshold by case; None: Hugging Face's generate.
CASES = {
    "Hugging Face generate": None,
    "full depth": ("propagate", "never"),
    "half depth, propagate": ("propagate", 0.0),
    "half depth, defer": ("defer", 0.0),
    "half depth, verify": ("verify", 0.0),
}


def decode_seconds(model: Any, ids: Any, tokens: int, early: Any) -> float:
    """Wall clock of ``tokens`` greedy tokens less that of one: the decode steps alone."""
    import torch

    extra = {} if early is None else {"custom_generate": early}
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, **extra}
    taken = []
    for count in (tokens, 1):
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
        if ids.is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return taken[0] - taken[1]


def random_model(name: str) -> Any:
    """A model of a 7B shape with random weights on the GPU whose second half adds nothing."""
    for module in ("dynamax_llm.evaluation.common.random_models", "dynamax_llm.evaluation.random_models"):
        if importlib.util.find_spec(module.rpartition(".")[0]) and importlib.util.find_spec(module):
            made = importlib.import_module(module)
            model = made.random_model(name, "cuda")
            return made.zero_tail(model, model.config.num_hidden_layers // 2)
    sys.exit("this tree has no random models")


def worker(name: str, tokens: int, on_gpu: bool) -> None:
    """Seconds of the decode steps by case, as one line of JSON; only names that both trees have are used."""
    import torch
    from transformers.utils import logging

    import dynamax_llm as dx
    from dynamax_llm.backbones import adapt

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if on_gpu:
        model, options = random_model(name), {"engine": "cuda"}
        ids = torch.randint(1, model.config.vocab_size, (1, 64), device="cuda")
    else:
        model, tokenizer = dx.load(name, device_map="cpu")
        ids, options = tokenizer(PROMPT, return_tensors="pt").input_ids, {}
    half = dx.Exits.untrained(adapt(model), (model.config.num_hidden_layers // 2,))

    def early(policy: str, threshold: Any) -> Any:
        for keyword in ("measure", "confidence"):  # the cheapest measure, under either tree's name for it
            try:
                chosen = {keyword: "state_similarity", **options}
                return dx.EarlyExit(half, threshold=threshold, policy=policy, **chosen)
            except TypeError:
                continue
        sys.exit("this tree's EarlyExit takes no measure")

    decodings = {label: None if case is None else early(*case) for label, case in CASES.items()}
    if not on_gpu:
        decodings["shipped heads at 0.9, propagate"] = dx.EarlyExit(dx.Exits.from_pretrained(name), threshold=0.9)
    for decoding in decodings.values():
        decode_seconds(model, ids, 4, decoding)
    found: dict[str, float] = {}
    for _ in range(REPEATS):  # the least of them is what other work on the machine disturbed least
        for label, decoding in decodings.items():
            found[label] = min(found.get(label, float("inf")), decode_seconds(model, ids, tokens, decoding))
    print(json.dumps({"package": dx.__file__, "seconds": found}))


def measure(tree: Path, name: str, tokens: int, on_gpu: bool) -> dict[str, float]:
    """One process of a tree."""
    flags = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {
        **os.environ,
        **flags,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(tree / "src"), os.environ.get("EXTRA_PATH")))),
    }
    command = [sys.executable, __file__, "worker", name, str(tokens), str(int(on_gpu))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{tree}, {name}:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["package"].startswith(str(tree)), f"{found['package']} is not of {tree}"
    return found["seconds"]


def compare(trees: tuple[Path, Path], name: str, rounds: int, tokens: int, on_gpu: bool) -> dict[str, dict[str, float]]:
    """New over old time by case: median, least and greatest over rounds of alternating order."""
    ratios: dict[str, list[float]] = {}
    for turn in range(rounds):
        order = trees if turn % 2 else trees[::-1]
        times = {tree: measure(tree, name, tokens, on_gpu) for tree in order}
        for label, seconds in times[trees[1]].items():
            if on_gpu:
                before, after = tokens / times[trees[0]][label], tokens / seconds
                print(f"{name}, {label}: {before:.1f} before, {after:.1f} after, tokens/s", flush=True)
            ratios.setdefault(label, []).append(seconds / times[trees[0]][label])
        print(f"{name}: round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    return {
        label: {"median": statistics.median(found), "least": min(found), "greatest": max(found)}
        for label, found in ratios.items()
    }


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def checked_out(commit: str, stack: contextlib.ExitStack) -> Path:
    """The commit in a temporary folder, until the stack closes."""
    before = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "before"
    git("worktree", "add", "--detach", str(before), git("rev-parse", commit))
    stack.callback(git, "worktree", "remove", "--force", str(before))
    return before


def main() -> None:
    sys.path.insert(0, str(ROOT / "recipes"))
    from common import conditions, markdown, parser, write_json

    made = parser(__doc__)
    made.add_argument("commit", help="the tree before: a commit, or a folder that holds its src/")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--tokens", type=int, default=48)
    made.add_argument("--models", nargs="*", default=list(MODELS))
    made.add_argument("--gpu", action="store_true", help="also 7B shapes on the GPU engine")
    made.add_argument("--shapes", nargs="+", default=list(SHAPES))
    made.add_argument("--out", type=Path, default=Path("out"))
    args = made.parse_args()
    cases = [(name, False) for name in args.models] + [(name, True) for name in args.shapes * args.gpu]
    document: dict[str, Any] = {"before": args.commit, **conditions("cuda" if args.gpu else "cpu")}
    with contextlib.ExitStack() as stack:
        given = Path(args.commit)
        trees = (given.resolve() if given.is_dir() else checked_out(args.commit, stack), ROOT)
        document["ratios"] = {c[0]: compare(trees, c[0], args.rounds, args.tokens, c[1]) for c in cases}
    rows = [
        [name, label, f"{ratio['median']:.3f}", f"{ratio['least']:.3f} to {ratio['greatest']:.3f}"]
        for name, found in document["ratios"].items()
        for label, ratio in found.items()
    ]
    print(markdown(["model", "case", "time, after / before", "least to greatest"], rows))
    write_json(args.out / "before_after.json", document)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], int(sys.argv[3]), bool(int(sys.argv[4])))
    else:
        main()
