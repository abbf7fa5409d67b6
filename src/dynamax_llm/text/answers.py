"""A model's own answers to prompts: the text on which exits decide when it chats.

    answers = make_answers(model, tokenizer, read_prompts("prompts.jsonl"), AnswerSettings(), "answers")

Stock ``generate`` answers batches of prompts, padded on the left. A share of the prompts, chosen by the hash of their
tokens, is answered by sampling, the others greedily. Prompts are sorted by length within large groups, so that little
is padding. Work is saved in parts of PART_BATCHES batches, each sampled with a seed of its own, so that answers that
were interrupted end as the same files.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamax_llm.backbones import adapt
from dynamax_llm.backbones.fingerprint import fingerprint
from dynamax_llm.errors import DataError, UsageError
from dynamax_llm.exits.files import prepare_folder, write_atomically
from dynamax_llm.progress import TokenBar
from dynamax_llm.text.answer_files import (
    FORMAT,
    MANIFEST,
    VERSION,
    Answers,
    Manifest,
    Part,
    Row,
    check_same,
    load_answers,
    read_manifest,
    read_part,
    write_part,
)
from dynamax_llm.text.prompts import Prompt, chat_ids
from dynamax_llm.text.settings import AnswerSettings

__all__ = ["AnswerSettings", "Answers", "load_answers", "make_answers"]

#: Prompts sorted by length together; batches of a part.
GROUP, PART_BATCHES = 4096, 8
#: Seconds between two looks at answers that another process makes.
PAUSE = 1.0


@dataclass(frozen=True)
class _Asked:
    """A prompt's index in the file and its tokens; ``sampled``: whether its answer is."""

    index: int
    ids: tuple[int, ...]
    sampled: bool


def make_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: AnswerSettings,
    folder: str | Path,
    *,
    name: str = "prompts",
    quiet: bool = False,
    writes: bool = True,
) -> Answers:
    """The model's answers to ``prompts``, made or completed in ``folder``; what is there already is only read.

    ``name`` says in messages and records where the prompts are from; without ``writes`` another process makes the
    answers, and this one waits for them. Prompts that are too long are left out and
    counted, repeated ones answered once. Raises DataError if none is left or ``folder`` holds answers to other prompts
    or with other settings, ArtifactMismatchError for those of another model, ArtifactCorruptError for damaged ones,
    UsageError if prompt and answer exceed the model's context or the device's memory.
    """
    _check_length(model, settings)
    asked, left_out = _encode(tokenizer, prompts[: settings.max_prompts], settings, name)
    place = Path(folder).expanduser()
    prepare_folder(place, (MANIFEST, *(path.name for path in place.glob("answers-*.safetensors"))))
    batches = _batches(asked, settings.rows)
    parts = [batches[start : start + PART_BATCHES] for start in range(0, len(batches), PART_BATCHES)]
    wanted = Manifest(
        format=FORMAT,
        version=VERSION,
        model=fingerprint(model),
        prompts={"name": name, "count": len(asked), "left_out": left_out, "sha256": _digest(asked)},
        settings={**settings.deciding(), "group": GROUP, "part_batches": PART_BATCHES},
        generation=_stored(model),
        parts_planned=len(parts),
    )
    manifest = _checked(place, wanted)
    if writes:
        for part in manifest.parts:
            read_part(place, part)
        _Writer(model, tokenizer, settings, place).complete(manifest, parts, quiet)
    while not (writes or _checked(place, wanted).complete):
        time.sleep(PAUSE)
    return load_answers(place)


def _checked(folder: Path, wanted: Manifest) -> Manifest:
    """The manifest in ``folder``, or ``wanted`` where there is none. Raises as ``check_same``."""
    found = read_manifest(folder) or wanted
    check_same(folder, found, wanted)
    return found


class _Writer:
    """Answers parts and writes them."""

    def __init__(self, model: Any, tokenizer: Any, settings: AnswerSettings, folder: Path) -> None:
        self.model, self.tokenizer, self.settings, self.folder = model, tokenizer, settings, folder
        stored = model.generation_config.eos_token_id
        stored = tokenizer.eos_token_id if stored is None else stored
        self.ends: list[int] = [] if stored is None else [stored] if isinstance(stored, int) else list(stored)
        pad = tokenizer.pad_token_id  # padding is masked, so any token will do
        self.pad: int = pad if pad is not None else self.ends[0] if self.ends else 0
        self.answered = 0

    def complete(self, manifest: Manifest, parts: Sequence[Sequence[Sequence[_Asked]]], quiet: bool) -> None:
        """Make the parts that ``manifest`` lacks, naming each in it as soon as it is written."""
        total = sum(len(batch) for part in parts for batch in part)
        self.answered = sum(part.prompts for part in manifest.parts)
        training = self.model.training
        self.model.eval()
        try:
            with TokenBar(total, self.answered, quiet or manifest.complete, "answering", unit="prompts") as bar:
                for number in range(len(manifest.parts), len(parts)):
                    part = self._part(number, parts[number], bar)
                    manifest = manifest.model_copy(update={"parts": (*manifest.parts, part)})
                    write_atomically(self.folder / MANIFEST, manifest.encoded())
        finally:
            self.model.train(training)

    def _part(self, number: int, batches: Sequence[Sequence[_Asked]], bar: TokenBar) -> Part:
        """Answer and write one part, in random numbers that depend on the seed and its number alone."""
        rows: list[Row] = []
        ended = new = 0
        start = time.monotonic()
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(_seed(self.settings.seed, number))
            for batch in batches:
                answers = self._answers(batch)
                ended += sum(answer[-1] in self.ends for answer in answers)
                new += sum(map(len, answers))
                rows += [
                    Row([*one.ids, *answer], len(one.ids), one.index)
                    for one, answer in zip(batch, answers, strict=True)
                ]
                self.answered += len(batch)
                rate = new / (time.monotonic() - start)
                bar.show(self.answered, functools.partial(_note, rate))
        return write_part(self.folder, number, rows, ended)

    def _answers(self, batch: Sequence[_Asked]) -> list[list[int]]:
        """New tokens of each row, the one that ends it included. Raises UsageError if memory does not suffice."""
        width = max(len(one.ids) for one in batch)
        rows = [[self.pad] * (width - len(one.ids)) + list(one.ids) for one in batch]
        lengths = torch.tensor([len(one.ids) for one in batch])
        mask = torch.arange(width) >= width - lengths[:, None]
        options: dict[str, Any] = {"max_new_tokens": self.settings.max_new_tokens, "num_beams": 1}
        options |= {"num_return_sequences": 1, "pad_token_id": self.pad, "do_sample": batch[0].sampled}
        if batch[0].sampled:
            options["temperature"] = self.settings.temperature
        if self.ends:
            options["eos_token_id"] = self.ends
        if self.model.generation_config.stop_strings:
            options["tokenizer"] = self.tokenizer
        device = self.model.device
        try:
            out: Tensor = self.model.generate(
                torch.tensor(rows, device=device), attention_mask=mask.to(device, torch.int64), **options
            )
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"{len(batch)} rows of up to {width + self.settings.max_new_tokens} tokens do not fit into the "
                f"memory of {device}: lower `rows`."
            ) from error
        return [self._cut(row) for row in out[:, width:].tolist()]

    def _cut(self, new: list[int]) -> list[int]:
        """A row's new tokens without what follows its end."""
        end = next((place for place, token in enumerate(new) if token in self.ends), None)
        if end is not None:
            return new[: end + 1]
        while len(new) > 1 and new[-1] == self.pad:  # ended by a stop string
            new.pop()
        return new


def _note(rate: float) -> tuple[str, str]:
    """Phase and figures for the bar."""
    return "answering", f"{rate:,.0f} tokens/s"


def _encode(tokenizer: Any, prompts: Sequence[Prompt], settings: AnswerSettings, name: str) -> tuple[list[_Asked], int]:
    """The prompts that can be answered, each once, and the number of those that are too long. Raises DataError."""
    kept: dict[tuple[int, ...], int] = {}
    left_out = 0
    for index, prompt in enumerate(prompts):
        ids = tuple(chat_ids(tokenizer, prompt, settings.system, settings.chat))
        if 0 < len(ids) <= settings.prompt_tokens:
            kept.setdefault(ids, index)
        else:
            left_out += 1
    if not kept:
        raise DataError(
            f"{name}: none of the {len(prompts)} prompts has between 1 and {settings.prompt_tokens} tokens. Raise "
            "`prompt_tokens`, or give shorter prompts."
        )
    return [_Asked(index, ids, _fraction("sampled", ids) < settings.sampled) for ids, index in kept.items()], left_out


def _batches(asked: Sequence[_Asked], rows: int) -> list[list[_Asked]]:
    """Batches of at most ``rows`` prompts of similar length, all sampled or all greedy."""
    batches = []
    for first in range(0, len(asked), GROUP):
        group = asked[first : first + GROUP]
        for sampled in (False, True):
            order = sorted((one for one in group if one.sampled == sampled), key=lambda one: (len(one.ids), one.index))
            batches += [order[start : start + rows] for start in range(0, len(order), rows)]
    return batches


def _check_length(model: Any, settings: AnswerSettings) -> None:
    limit = adapt(model).max_positions()
    if limit is not None and settings.prompt_tokens + settings.max_new_tokens > limit:
        raise UsageError(
            f"prompts of {settings.prompt_tokens} tokens and answers of {settings.max_new_tokens} exceed the context "
            f"of this model, {limit}. Lower `prompt_tokens` or `max_new_tokens`."
        )


def _stored(model: Any) -> dict[str, Any]:
    """The model's stored settings of ``generate``, which apply where ours say nothing, as JSON types."""
    stored = json.loads(json.dumps(model.generation_config.to_diff_dict(), default=str))
    return {
        name: value for name, value in stored.items() if not name.startswith("_") and name != "transformers_version"
    }


def _fraction(salt: str, ids: Sequence[int]) -> float:
    """A number in [0, 1) that depends on tokens alone."""
    digest = hashlib.blake2b(salt.encode() + np.asarray(ids, dtype="<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _seed(seed: int, part: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}-{part}".encode(), digest_size=7).digest(), "big")


def _digest(asked: Sequence[_Asked]) -> str:
    """sha256 over the prompts' indices and tokens, which text, template and tokenizer decide."""
    digest = hashlib.sha256()
    for one in asked:
        digest.update(np.asarray([one.index, len(one.ids), *one.ids], dtype="<i4").tobytes())
    return digest.hexdigest()
