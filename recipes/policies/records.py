"""Finished work as JSON lines: one file per model, judge and part, so that a killed run continues where it stopped."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What every number of a study depends on; cells made under other settings are not mixed with these."""

    prompts_sha256: str
    prompts: int = 64  # judged, in batches
    tuning: int = 32  # for finding thresholds, disjoint from the former
    checked: int = 16  # of the judged ones, under verify: alone, not in a batch
    alone: int = 8  # of the judged ones, for the passes of defer: alone, not in a batch
    prompt_tokens: int = 64
    new_tokens: int = 128
    tuning_tokens: int = 96
    device: str = "cpu"
    alone_device: str = "cpu"

    @property
    def digest(self) -> str:
        """What tells these settings from others."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


class Log:
    """The finished rows of one file by key; a line that a kill cut short is dropped and written anew."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.digest = path, settings.digest
        self.rows: dict[str, Row] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        if len(whole) < len(lines):
            path.write_bytes(b"".join(whole))
        for line in whole:
            row = json.loads(line)
            if row["settings"] != self.digest:
                sys.exit(f"{path} holds cells of other settings or prompts: give another --out, or remove it")
            self.rows[row["key"]] = row
        if not self.rows:
            self.add("settings", {**asdict(settings)})

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __getitem__(self, key: str) -> Row:
        return self.rows[key]

    def add(self, key: str, row: Row) -> Row:
        """Keep a finished row."""
        row = {"key": key, "settings": self.digest, **row}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows[key] = row
        return row


def read(path: Path) -> dict[str, Row]:
    """All rows of a file by key, whatever their settings."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return {row["key"]: row for row in (json.loads(line) for line in lines if line.endswith("\n"))}


def pack(tokens: list[list[int]]) -> str:
    """Token ids below 65,536 as text."""
    return base64.b64encode(zlib.compress(np.asarray(tokens, dtype="<u2").tobytes())).decode()


def unpack(packed: str, width: int) -> list[list[int]]:
    """The rows of ``width`` ids that ``pack`` was given."""
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype="<u2").reshape(-1, width).tolist()
