"""What several verbs share: options, and a backbone that is looked at first and loaded later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A model folder, a hub id, or a shipped backbone: transformer-ee, mamba-ee."),
]
Dtype = Annotated[
    str,
    typer.Option(help="float32, bfloat16, float16, or auto: as stored on a GPU, float32 on a CPU.", metavar="NAME"),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 …, or auto to spread layers. Default: a GPU if there is one.", metavar="NAME"),
]


def peek_backbone(model: str) -> PreTrainedConfig:
    """The model's configuration: a wrong name or an unsupported type is refused before anything slow happens."""
    from dynamax_llm.backbones.loading import peek

    quiet()
    return peek(model)


def load_backbone(model: str, dtype: str, device: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, on a GPU if there is one and no device was named, and its tokenizer."""
    import torch

    from dynamax_llm.backbones.loading import load

    quiet()
    return load(model, dtype=dtype, device_map=device or ("cuda" if torch.cuda.is_available() else "cpu"))


def quiet() -> None:
    """Bars, warnings and retries of the libraries below off: what matters is said by DYNAMAX's errors."""
    import logging as standard

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    standard.getLogger("huggingface_hub").setLevel(standard.CRITICAL)
