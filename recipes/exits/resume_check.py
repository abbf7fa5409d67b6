"""Bar 6: training on 1 M tokens stays under 2 GB, and a kill -9 half way changes nothing.

    python recipes/exits/resume_check.py --data FILE --out DIR [--model transformer-ee] [--tokens 1M] [--head mamba]

Runs `dynamax train` twice at once: unbroken, and killed with SIGKILL when half of the tokens are done and then given
again. Prints peak resident memory of each process, and both final losses.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors import safe_open

from dynamax_llm.cli.options import count


def start(args: argparse.Namespace, out: Path) -> subprocess.Popen:
    code = "import sys; from dynamax_llm.cli import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", args.model, "--data", str(args.data), "--head", args.head]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([*command, "--tokens", args.tokens, "--out", str(out)], env=environment)


def tokens_done(out: Path) -> int:
    """Training tokens in the newest checkpoint."""
    path = out / ".checkpoint" / "state.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        return int(json.loads(file.metadata()["state"])["tokens"])


def peak_mb(process: subprocess.Popen) -> float:
    """Peak resident memory so far, in MB (Linux)."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def watch(processes: dict[str, subprocess.Popen], peaks: dict[str, float]) -> None:
    for name, process in processes.items():
        peaks[name] = max(peaks.get(name, 0.0), peak_mb(process))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="transformer-ee")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", default="1M")
    parser.add_argument("--head", default="mamba")
    args = parser.parse_args()
    whole, broken = args.out / "unbroken", args.out / "killed"
    peaks: dict[str, float] = {}
    processes = {"unbroken": start(args, whole), "killed": start(args, broken)}
    half, resumed = count(args.tokens) // 2, False
    while any(process.poll() is None for process in processes.values()):
        watch(processes, peaks)
        if not resumed and tokens_done(broken) >= half:
            processes["killed"].send_signal(signal.SIGKILL)
            processes["killed"].wait()
            print(f"killed at checkpoint {tokens_done(broken):,} tokens", flush=True)
            processes["resumed"] = start(args, broken)
            resumed = True
        time.sleep(0.5)
    for name, peak in peaks.items():
        print(f"{name:9s} peak resident memory {peak / 1000:.2f} GB, exit code {processes[name].returncode}")
    reports = {path.name: json.loads((path / "exits.json").read_text())["provenance"] for path in (whole, broken)}
    for name, report in reports.items():
        held = report["held_out"]
        losses = f"train loss {report['train_loss']:.6f} held-out loss {held['loss']:.6f}"
        print(f"{name:9s} tokens {report['tokens']:,} {losses}")
    if not resumed:
        sys.exit("never killed: the run was over before a checkpoint showed half of the tokens")


if __name__ == "__main__":
    main()
