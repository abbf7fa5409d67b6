"""Exit heads trained on a GPU are those trained on a CPU, but for rounding, and the same to the bit twice on the GPU.

PYTHONPATH=src:. python recipes/scale/same.py

The GPU trains heads in a stream of their own beside the backbone, with a fused optimiser.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.training.conftest import ByteTokenizer, sentences, write_jsonl

from dynamax_llm.backbones import adapt
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.registries import HEADS
from dynamax_llm.testing import tiny_model
from dynamax_llm.text.batches import find_source
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.trainer import train_many

SIZES = {"max_tokens": 8000, "sequence": 64, "batch_tokens": 512, "eval_tokens": 600, "eval_every": 2000}
SETTINGS = TrainSettings(**SIZES, held_out=0.2, checkpoint_seconds=0.0, quiet=True)


def run(device: str, folder: Path, corpus: Path) -> dict[str, Exits]:
    configs = {head: ExitConfig(layers=(2, 3, 4), n_layers=5, head=head) for head in HEADS}
    backbone = adapt(tiny_model("mistral").to(device))
    return train_many(backbone, ByteTokenizer(), find_source(corpus), configs, SETTINGS, folder)


def gap(one: Exits, other: Exits) -> float:
    """The greatest difference between two weights."""
    pairs = zip(one.heads.state_dict().values(), other.heads.state_dict().values(), strict=True)
    return max(float((a.cpu() - b.cpu()).abs().max()) for a, b in pairs)


def main(devices: tuple[str, str, str] = ("cpu", "cuda", "cuda")) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_jsonl(folder / "corpus.jsonl", sentences(200))
        cpu, gpu, again = (run(device, folder / str(i), corpus) for i, device in enumerate(devices))
    for head in HEADS:
        losses = [made[head].provenance["held_out"]["loss"] for made in (cpu, gpu)]
        print(f"{head:12s} GPU - CPU {gap(cpu[head], gpu[head]):.1e}, GPU - GPU {gap(gpu[head], again[head]):.1e}")
        print(f"{'':12s} held-out loss {losses[0]:.7f} on the CPU, {losses[1]:.7f} on the GPU")
        assert gap(cpu[head], gpu[head]) < 1e-3 and gap(gpu[head], again[head]) == 0.0


if __name__ == "__main__":
    main()
