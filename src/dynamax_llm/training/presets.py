"""Named sets of options for exits and their training.

**dynamax-paper** is the training of arXiv 2504.20922 as far as it is known (its author's public thesis code of November
2024, the abstract, second-hand summaries): exits after 1/2, 5/8, 3/4 and 7/8 of the depth; heads on the hidden state
alone; two-class cross-entropy, which for two classes is the binary one of a single logit, neither balanced nor with
tokens that leave while training, exits weighing i / Σj; schedule-free AdamW at 2.5e-4; 1,000 documents of up to 4,096
tokens, the first of each, one a step; the label asks whether the full model's token is among the exit's likeliest 15; a
token that leaves runs the last layer, then final norm and LM head.

Not known, and taken from DYNAMAX's defaults: the sizes of the paper's Mamba and feed-forward heads (ours:
``exits/heads.py``; its "transformer" head is a feed-forward block, ours also attends); warm-up and weight decay (none
here); held-out text. Summaries and code differ on two points, and the code is followed: the label (a summary has it the
other way round, the exit's token among the full model's likeliest 15) and the exits' weights (a summary has them fall
with depth). Inputs are standardised, as everywhere in DYNAMAX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dynamax_llm.exits.config import ExitConfig, place_exits
from dynamax_llm.registry import Registry
from dynamax_llm.training.settings import SCHEDULE_FREE, TrainSettings


@dataclass(frozen=True)
class Preset:
    """Where exits sit, fields of an ``ExitConfig``, and fields of a ``TrainSettings``."""

    exits: str
    config: dict[str, Any]
    settings: dict[str, Any]

    def exit_config(self, n_layers: int, **changes: Any) -> ExitConfig:
        """For a backbone of ``n_layers``; ``changes`` come first. Raises UsageError, ExitPlacementError."""
        return ExitConfig.from_options(place_exits(self.exits, n_layers), n_layers, **{**self.config, **changes})

    def train_settings(self, **changes: Any) -> TrainSettings:
        """``changes`` come first. Raises UsageError."""
        return TrainSettings(**{**self.settings, **changes})


PRESETS: Registry[Preset] = Registry(
    "preset",
    {
        "dynamax-paper": Preset(
            exits="1/2,5/8,3/4,7/8",
            config={
                "head": "mamba",
                "inputs": ("hidden",),
                "readout": "tail",
                "tail_layers": 1,
                "candidates": 0,
            },
            settings={
                "preset": "dynamax-paper",
                "label": "topk",
                "label_k": 15,
                "documents": 1000,
                "max_tokens": 1000 * 4096,
                "sequence": 4096,
                "batch_tokens": 4096,
                "optimiser": SCHEDULE_FREE,
                "lr": 2.5e-4,
                "weight_decay": 0.0,
                "warmup": 0.0,
                "no_exit_share": 1.0,
                "balanced": False,
            },
        )
    },
)
