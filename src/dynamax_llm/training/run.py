"""A resumable run over a stream of text: its loop and counters, its checkpoint, and the identity that both rest on.

``OUT/.checkpoint/state.safetensors`` is one file, replaced whole, so that a kill at any moment leaves a usable one. It
holds the tensors of what is learned and, as JSON in its metadata, everything else: counters, position in the data, and
the identity of the run, all that decides the result. When the run's result is saved, a small file without tensors
takes its place: it tells the same call, made again, that nothing is left to do.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.backbones.fingerprint import explain_mismatch, fingerprint
from dynamax_llm.errors import ArtifactCorruptError, UsageError
from dynamax_llm.exits.files import prepare_folder, write_atomically
from dynamax_llm.progress import TokenBar
from dynamax_llm.text.answer_source import AnySource, stream_of
from dynamax_llm.text.batches import Batch, Position, Stream
from dynamax_llm.training.settings import RunSettings

FOLDER, FILE = ".checkpoint", "state.safetensors"
#: Gradients longer than this are shortened to it.
GRADIENT_NORM = 1.0
#: A checkpoint may take this share of the time at most: writing all weights of a large model takes long.
CHECKPOINT_SHARE = 0.1


@dataclass
class Counters:
    """How far a run is: tokens and steps learned from, seconds of training, position in the data."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    position: Position = field(default_factory=Position)


class Learning(Protocol):
    """What a run advances. ``step`` learns from a batch, given the counters before it; ``note`` is the phase and the
    latest figures for the progress bar; ``tensors`` and ``state`` (JSON types) are what ``restore`` needs."""

    def step(self, batch: Batch, counters: Counters) -> None: ...
    def finished(self, counters: Counters) -> bool: ...
    def note(self) -> tuple[str, str]: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None: ...


class Checkpoint:
    """The checkpoint of the run that writes to ``out``; ``identity`` is all that decides the result, as JSON types."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        """Raises ArtifactError if the folder cannot be written."""
        self.path = prepare_folder(out / FOLDER, (FILE,)) / FILE
        self.identity = json.loads(json.dumps(identity))

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace the checkpoint. Raises ArtifactError if it cannot be written."""
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = {"state": json.dumps(state), "identity": json.dumps(self.identity)}
        write_atomically(self.path, safetensors.torch.save(whole, content))

    def finish(self) -> None:
        """Replace the checkpoint by the note that the run's result is saved."""
        self.save({}, {"finished": True})

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and state of the run so far, None if there is none.

        Raises UsageError, naming the difference, if it is another run's; ArtifactCorruptError if it cannot be read.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                content = file.metadata()
                identity, state = json.loads(content["identity"]), json.loads(content["state"])
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

    @property
    def finished(self) -> bool:
        """Whether this run's result is saved already. Raises as ``load``."""
        loaded = self.load()
        return loaded is not None and loaded[1].get("finished", False)


def run(
    learning: Learning,
    stream: Stream,
    checkpoint: Checkpoint,
    settings: RunSettings,
    bar: TokenBar,
    writes: bool = True,
) -> Counters:
    """Advance ``learning`` to its end, from the checkpoint where there is one; an interruption is saved first.

    ``writes``: whether this process writes the checkpoint. Raises as ``Checkpoint``, DataError for unusable text.
    """
    counters = Counters()

    def save() -> None:
        if writes:
            checkpoint.save(learning.tensors(), {"counters": asdict(counters), "learning": learning.state()})

    loaded = checkpoint.load()
    if loaded is not None and not loaded[1].get("finished"):
        tensors, state = loaded
        counters = Counters(**{**state["counters"], "position": Position.of(state["counters"]["position"])})
        learning.restore(tensors, state["learning"])
    try:
        start = saved = time.monotonic()
        before, pause = counters.seconds, settings.checkpoint_seconds
        for batch, position in stream.batches(counters.position):
            if learning.finished(counters):
                break
            learning.step(batch, counters)
            counters.tokens += batch.tokens
            counters.steps += 1
            counters.position = position
            now = time.monotonic()
            counters.seconds = before + now - start
            bar.show(counters.tokens, learning.note)
            if now - saved >= pause:
                save()
                saved = time.monotonic()
                pause = max(settings.checkpoint_seconds, (saved - now) / CHECKPOINT_SHARE)
    except KeyboardInterrupt:
        save()
        raise
    save()
    return counters


def splits(
    source: AnySource, tokenizer: Any, backbone: Backbone, settings: RunSettings, alone: bool = False
) -> list[Stream]:
    """The training and the held-out documents, in chunks that the backbone has positions for. ``alone``: one document
    a batch."""
    sequence = min(settings.sequence, backbone.max_positions() or settings.sequence)
    shape = (settings.held_out, sequence, settings.batch_tokens, settings.seed, alone)
    return [stream_of(source, tokenizer, held_out, *shape) for held_out in (False, True)]


def identity(backbone: Backbone, source: AnySource, settings: RunSettings, **more: Any) -> dict[str, Any]:
    """Everything that decides the result of a run, as JSON types; ``more`` is what this kind of run adds."""
    return {
        "backbone": fingerprint(backbone.model),
        **source.identity(),
        **more,
        "settings": settings.deciding(),
    }


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, torch, transformers and of the packages ``more``, for a record."""
    packages = ("torch", "transformers", *more)
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _difference(was: Any, now: Any, name: str = "") -> str | None:
    """The first difference between two identities, in words; None if there is none."""
    if name == "backbone":
        return explain_mismatch(was, now)
    if isinstance(was, dict) and isinstance(now, dict):
        differences = (_difference(was.get(key), now.get(key), key) for key in sorted(was.keys() | now.keys()))
        return next(filter(None, differences), None)
    return None if was == now else f"{name} is {now!r} here, and was {was!r}"
