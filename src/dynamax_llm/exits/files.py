"""Folders that hold an artifact: found, made ready, and written without ever being half-written."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download

from dynamax_llm.errors import ArtifactError

#: What a folder of ours may hold beside its own files; in ``answers`` are those that exits learnt from. Hidden names
#: (git's, a run's resume files) are left alone.
COMPANIONS = ("README.md", "LICENSE", "answers")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def prepare_folder(folder: str | Path, own: Sequence[str]) -> Path:
    """The folder, made if need be and known to be writable; asked before long work starts, and again when saving.

    Raises ArtifactError if it is a file, cannot be made or written, or holds anything but ``own`` and companions.
    """
    target = Path(folder).expanduser()
    try:
        target.mkdir(parents=True, exist_ok=True)
        strange = sorted(
            item.name
            for item in target.iterdir()
            if not item.name.startswith(".") and item.name not in (*own, *COMPANIONS)
        )
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        raise ArtifactError(
            f"cannot write to {str(folder)!r} ({error.strerror or error}). Give a folder that is new or yours to write."
        ) from error
    if strange:
        raise ArtifactError(
            f"{str(folder)!r} holds something else ({', '.join(strange[:3])}{', …' if len(strange) > 3 else ''}). "
            "Give a new folder, or one that holds exits."
        )
    return target


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside ``path`` and rename: readers see the old file or the new one. Raises ArtifactError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ArtifactError(
            f"cannot write {path} ({error.strerror or error}). Free some space or give another folder."
        ) from error


def fetch(name: str, files: Sequence[str]) -> list[Path]:
    """Local paths of ``files`` in a folder, or in a hub repository (downloaded). Raises ArtifactError."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        absent = [file for file in files if not (folder / file).is_file()]
        if absent:
            raise ArtifactError(
                f"{name} holds no exits: {' and '.join(absent)} not found there. "
                "Give the folder that dynamax train wrote."
            )
        return [folder / file for file in files]
    if folder.exists() or not _HUB_ID.fullmatch(name):
        what = "is a file, not a folder" if folder.exists() else "is no folder, nor a hub id (owner/name)"
        raise ArtifactError(f"exits {name!r}: it {what}. Give the folder that dynamax train wrote.")
    try:
        return [Path(hf_hub_download(name, file)) for file in files]
    except Exception as error:  # the hub client raises its own, requests' and the system's errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ArtifactError(
            f"exits {name!r}: there is no such folder, and nothing of this name could be fetched ({reason}). "
            "Check the name and the connection, or give a folder that dynamax train wrote."
        ) from error
