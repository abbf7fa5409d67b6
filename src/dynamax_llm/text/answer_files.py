"""Answers on the disk: parts in safetensors, and a manifest that says what they are and is checked before use.

    answers.json                 model, prompts, settings, and every finished part with its sha256
    answers-00000.safetensors    ids (N) int32, the sequences one after another, each a prompt and its answer;
                                 lengths (R) and prompt_lengths (R) int32, in tokens; prompt_index (R) int32

A part is renamed into place whole, then named in the manifest, which is replaced whole as well: a kill at any moment
loses the part in progress and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from dynamax_llm.backbones.fingerprint import explain_mismatch, fingerprint
from dynamax_llm.errors import (
    ArtifactCorruptError,
    ArtifactMismatchError,
    ArtifactVersionError,
    DataError,
    first_line,
)
from dynamax_llm.exits.files import write_atomically

FORMAT, VERSION, MANIFEST = "dynamax-answers", 1, "answers.json"
TENSORS = ("ids", "lengths", "prompt_lengths", "prompt_index")


@dataclass(frozen=True)
class Row:
    """A prompt with its answer: all ``ids``, the number of them that are the prompt, its index among the prompts."""

    ids: list[int]
    prompt: int
    index: int


class Part(BaseModel):
    """A finished part: its file, its sha256, and what it holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    sha256: str
    prompts: int
    tokens: int
    answer_tokens: int
    ended: int  # answers that the model ended itself


class Manifest(BaseModel):
    """What the parts are. ``model`` is a fingerprint, ``parts_planned`` their number when all are made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    version: int
    model: dict[str, Any]
    prompts: dict[str, Any]
    settings: dict[str, Any]
    generation: dict[str, Any]
    parts_planned: int
    parts: tuple[Part, ...] = ()

    @property
    def complete(self) -> bool:
        return len(self.parts) == self.parts_planned

    def encoded(self) -> bytes:
        """The file's content; the same answers give the same bytes."""
        return (self.model_dump_json(indent=1) + "\n").encode()


@dataclass(frozen=True)
class Answers:
    """A model's answers in memory: ``ids`` (N) int32 of R sequences one after another; see the parts' tensors."""

    folder: Path
    manifest: Manifest
    ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    prompt_index: Tensor
    ends: Tensor = field(init=False)  # (R) int64: where each sequence ends in ``ids``

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", self.lengths.long().cumsum(0))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Row:
        end = int(self.ends[number])
        ids = self.ids[end - int(self.lengths[number]) : end].tolist()
        return Row(ids, int(self.prompt_lengths[number]), int(self.prompt_index[number]))

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))

    @property
    def sha256(self) -> str:
        """Of the manifest, and with it of all parts."""
        return hashlib.sha256(self.manifest.encoded()).hexdigest()

    def summary(self) -> str:
        """Numbers of answers and tokens, and of prompts that were left out, in one sentence."""
        total = {
            name: sum(getattr(part, name) for part in self.manifest.parts)
            for name in ("tokens", "answer_tokens", "ended")
        }
        left_out = self.manifest.prompts["left_out"]
        return (
            f"{len(self):,} answers of {total['answer_tokens']:,} tokens ({total['tokens']:,} with their prompts), "
            f"{total['ended'] / max(len(self), 1):.0%} ended by the model"
            + (f"; {left_out:,} prompts left out as too long" if left_out else "")
        )


def part_file(number: int) -> str:
    """The name of a part's file."""
    return f"answers-{number:05d}.safetensors"


def write_part(folder: Path, number: int, rows: list[Row], ended: int) -> Part:
    """Write a part whole; its entry in the manifest is for the caller. Raises ArtifactError."""
    columns = {
        "ids": [token for row in rows for token in row.ids],
        "lengths": [len(row.ids) for row in rows],
        "prompt_lengths": [row.prompt for row in rows],
        "prompt_index": [row.index for row in rows],
    }
    blob = safetensors.torch.save({name: torch.tensor(column, dtype=torch.int32) for name, column in columns.items()})
    write_atomically(folder / part_file(number), blob)
    tokens = len(columns["ids"])
    return Part(
        file=part_file(number),
        sha256=hashlib.sha256(blob).hexdigest(),
        prompts=len(rows),
        tokens=tokens,
        answer_tokens=tokens - sum(columns["prompt_lengths"]),
        ended=ended,
    )


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in ``folder``; None if there is none. Raises ArtifactCorruptError, ArtifactVersionError."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _corrupt(path, f"cannot be read ({error.strerror or error})") from error
    try:
        fields = json.loads(content)
        version = fields["version"] if fields["format"] == FORMAT else None
    except (ValueError, KeyError, TypeError) as error:
        raise _corrupt(path, "is no manifest of answers") from error
    if isinstance(version, int) and version > VERSION:
        raise ArtifactVersionError(
            f"{path} was written by a newer DYNAMAX (answers of version {version}; this one reads up to {VERSION}). "
            "Upgrade: pip install --upgrade dynamax-llm."
        )
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        reason = error.errors()[0]
        raise _corrupt(
            path, f"is no manifest of answers ({'.'.join(map(str, reason['loc']))}: {reason['msg']})"
        ) from None


def check_same(folder: Path, found: Manifest, wanted: Manifest) -> None:
    """Raise if ``found`` is of other answers than ``wanted``: ArtifactMismatchError for another model, DataError for
    other prompts, settings or a tokenizer that encodes them otherwise."""
    check_model(folder, found, wanted.model)
    for what in ("prompts", "settings", "generation"):
        was, now = getattr(found, what), getattr(wanted, what)
        name = next((key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)), None)
        if name is not None:
            raise DataError(
                f"{folder} holds other answers: {what} {name} is {_short(now.get(name))} here, and was "
                f"{_short(was.get(name))}. Repeat those arguments, give another folder, or delete this one."
            )


def check_model(folder: Path, found: Manifest, model: dict[str, Any]) -> None:
    """Raise ArtifactMismatchError unless the answers are those of the model with this fingerprint."""
    difference = explain_mismatch(found.model, model)
    if difference is not None:
        raise ArtifactMismatchError(
            f"{folder} holds answers of another model: {difference}. Give another folder, or delete this one."
        )


def load_answers(folder: str | Path, model: nn.Module | None = None) -> Answers:
    """The answers in ``folder``, once it is known that all parts are there and unchanged.

    Raises DataError for a folder without answers or with some still to be made, ArtifactMismatchError if they are not
    those of ``model``, ArtifactCorruptError for damaged files, ArtifactVersionError.
    """
    place = Path(folder).expanduser()
    manifest = read_manifest(place)
    if manifest is None:
        raise DataError(
            f"{str(folder)!r} holds no answers: {MANIFEST} is not there. Give the folder they were made in."
        )
    if model is not None:
        check_model(place, manifest, fingerprint(model))
    if not manifest.complete:
        raise DataError(
            f"{folder} holds {len(manifest.parts)} of {manifest.parts_planned} parts of its answers. Make the rest "
            "with the command that began them."
        )
    parts = [read_part(place, part) for part in manifest.parts]
    return Answers(place, manifest, *(torch.cat([part[name] for part in parts]) for name in TENSORS))


def read_part(folder: Path, part: Part) -> dict[str, Tensor]:
    """A part's tensors. Raises ArtifactCorruptError for a file that is missing or differs from what was written."""
    path = folder / part.file
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise _corrupt(path, f"cannot be read ({error.strerror or error})") from error
    if hashlib.sha256(blob).hexdigest() != part.sha256:
        raise _corrupt(path, f"has changed since it was written ({len(blob):,} bytes)")
    try:
        tensors = safetensors.torch.load(blob)
        lengths, prompts = tensors["lengths"], tensors["prompt_lengths"]
        whole = int(lengths.sum()) == len(tensors["ids"]) == part.tokens and len(lengths) == part.prompts
        fits = len(prompts) == len(lengths) == len(tensors["prompt_index"]) and bool((prompts < lengths).all())
    except (SafetensorError, KeyError) as error:
        raise _corrupt(path, f"is no part of answers ({first_line(error)})") from error
    if not (whole and fits):
        raise _corrupt(path, "does not hold what the manifest says")
    return tensors


def _corrupt(path: Path, problem: str) -> ArtifactCorruptError:
    return ArtifactCorruptError(f"{path} {problem}. Delete {path.parent} to make the answers anew.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
