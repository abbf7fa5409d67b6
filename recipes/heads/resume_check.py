"""Training on 1 M tokens stays under 2 GB, and a kill -9 half way changes nothing.

    python recipes/heads/resume_check.py --data FILE --out DIR [--model transformer-ee] [--tokens 1000000]

Runs `dynamax train` twice at once: unbroken, and killed when a checkpoint holds half of the tokens and then started
again. Prints peak resident memory of each process (Linux), and both final losses.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import parsed, parser


def tokens_done(out: Path) -> int:
    """Training tokens in the newest checkpoint."""
    path = out / ".checkpoint" / "state.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        return int(json.loads(file.metadata()["state"])["tokens"])


def main() -> None:
    made = parser(__doc__, "data", "out")
    made.add_argument("--model", default="transformer-ee")
    made.add_argument("--tokens", type=int, default=1_000_000)
    args = parsed(made)

    def start(out: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "dynamax_llm.cli", "train", args.model, "--data", str(args.data)]
        return subprocess.Popen([*command, "--tokens", str(args.tokens), "--out", str(out)])

    folders = {name: args.out / name for name in ("unbroken", "killed")}
    processes, peaks = {name: start(folder) for name, folder in folders.items()}, {}
    while any(process.poll() is None for process in processes.values()):
        for name, process in processes.items():
            status = Path(f"/proc/{process.pid}/status")
            found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
            peaks[name] = max(peaks.get(name, 0.0), int(found[1]) / 1e6 if found else 0.0)
        if "resumed" not in processes and tokens_done(folders["killed"]) >= args.tokens // 2:
            processes["killed"].kill()
            processes["killed"].wait()
            processes["resumed"] = start(folders["killed"])
        time.sleep(0.5)
    for name, peak in peaks.items():
        print(f"{name:9s} peak resident memory {peak:.2f} GB, exit code {processes[name].returncode}")
    for name, folder in folders.items():
        report = json.loads((folder / "exits.json").read_text())["provenance"]
        print(f"{name:9s} tokens {report['tokens']:,}, held-out loss {report['held_out']['loss']:.6f}")
    if "resumed" not in processes:
        sys.exit("never killed: the run was over before a checkpoint held half of the tokens")


if __name__ == "__main__":
    main()
