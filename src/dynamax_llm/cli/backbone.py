"""What verbs do with a model and text: look at it first, load it later, and leave no empty folder behind."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamax_llm.errors import DataError, DynamaxError
from dynamax_llm.settings import PlaceSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from dynamax_llm.text.sources import Source


def command_line(verb: str) -> str:
    """The command as a document records it."""
    return shlex.join(["dynamax", *(sys.argv[1:] if sys.argv[1:2] == [verb] else [verb])])


def peek_backbone(model: str) -> PreTrainedConfig:
    """The model's configuration: a wrong name or an unsupported type is refused before anything slow happens."""
    from dynamax_llm.backbones.loading import peek

    quiet()
    return peek(model)


def load_backbone(model: str, place: Mapping[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, on a GPU if there is one and ``place`` names no device, and its tokenizer."""
    from dynamax_llm.backbones.loading import load

    quiet()
    chosen = PlaceSettings(**place)
    return load(model, dtype=chosen.dtype, device_map=chosen.device or default_device())


def default_device() -> str:
    """A GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def quiet() -> None:
    """Bars, warnings and retries of the libraries below off: DYNAMAX's own errors name what matters."""
    import logging as standard

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    standard.getLogger("huggingface_hub").setLevel(standard.CRITICAL)


def text_of(data: str, text_field: str | None) -> Source:
    """The documents in ``data``. Raises DataError for text that cannot be found, and for an empty file."""
    from dynamax_llm.text.sources import find_source

    path = Path(data).expanduser()
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"data {data!r}: the file is empty. Give a file that holds text.")
    return find_source(data, text_field)


@contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """On an error of DYNAMAX, remove ``folder`` and its parents again if they are new and hold nothing."""
    folder = folder.expanduser()
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except DynamaxError:
        for path in new:
            if not path.is_dir() or any(path.iterdir()):
                break
            path.rmdir()
        raise
