"""A training run on disk: one file, replaced whole, so that a kill at any moment leaves a usable one.

``OUT/.checkpoint/state.safetensors`` holds the tensors (heads, optimiser, best weights, random state) and, as JSON in
its metadata, everything else: position in the data, counts, history, and the identity of the run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynamax_llm.backbones.fingerprint import explain_mismatch
from dynamax_llm.errors import ArtifactCorruptError, UsageError
from dynamax_llm.exits.files import prepare_folder, write_atomically

FOLDER, FILE = ".checkpoint", "state.safetensors"


class Checkpoint:
    """The checkpoint of the run that writes to ``out``. ``identity`` is all that decides the result, as JSON types."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        """Raises ArtifactError if the folder cannot be written."""
        self.path = prepare_folder(out / FOLDER, (FILE,)) / FILE
        self.identity = json.loads(json.dumps(identity))

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace the checkpoint. Raises ArtifactError if it cannot be written."""
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"state": json.dumps(state), "identity": json.dumps(self.identity)}
        write_atomically(self.path, safetensors.torch.save(whole, metadata))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and state of the run so far, None if there is none.

        Raises UsageError, naming the difference, if it is another run's; ArtifactCorruptError if it cannot be read.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata()
                identity, state = json.loads(metadata["identity"]), json.loads(metadata["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ArtifactCorruptError(
                f"the checkpoint {self.path} cannot be read ({error}). Delete {self.path.parent} to start afresh."
            ) from error
        difference = _difference(identity, self.identity)
        if difference:
            raise UsageError(
                f"{self.path.parent.parent} holds another training run: {difference}. Repeat that run's arguments to "
                f"resume it, give another `out`, or delete {self.path.parent} to start afresh."
            )
        return tensors, state


def _difference(was: Any, now: Any, name: str = "") -> str | None:
    """The first thing that tells two identities apart, in words; None if nothing does."""
    if name == "backbone":
        return explain_mismatch(was, now)
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            found = _difference(was.get(key), now.get(key), key)
            if found:
                return found
        return None
    return None if was == now else f"{name} is {now!r} here, and was {was!r}"
