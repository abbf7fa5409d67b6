"""Which files of the package one decoded token passes: python recipes/house/files_of_a_token.py [ENGINE]

Traces calls during steps of a session on a tiny random model with MLP heads, under ``propagate``; ENGINE "cuda" runs in
Triton's interpreter where there is no GPU. Prints one file a line, in the order of their first call.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from transformers.utils import logging

import dynamax_llm
from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit, RowSettings
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.testing import random_ids, tiny_model

ROOT = Path(dynamax_llm.__file__).parent


def main() -> None:
    logging.set_verbosity_error()
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    backbone = adapt(tiny_model("mistral", layers=4, vocab=19, **sizes))
    config = ExitConfig((1, 2, 3), 4, "mlp", width=16)
    exits = Exits.of(backbone, config, ExitHeads(config, backbone.width).requires_grad_(False))
    engine = sys.argv[1] if len(sys.argv) > 1 else "eager"
    session = EarlyExit(exits, threshold=[0.5, 0.5, "never"], engine=engine).open(backbone.model)
    session.admit(random_ids(1, 5, vocab=19), RowSettings(6))
    session.step()
    passed: dict[str, None] = {}

    def note(frame: Any, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT):
            passed.setdefault(str(path.relative_to(ROOT)))

    sys.setprofile(note)
    for _ in range(5):
        session.step()
    sys.setprofile(None)
    print("\n".join(passed))
    print(f"{len(passed)} files", file=sys.stderr)


if __name__ == "__main__":
    main()
