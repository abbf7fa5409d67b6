"""Per-sample records: one file of JSON lines per cell, appended as samples finish, so that a killed run goes on.

    OUT/records/<backbone>/<task>/<setting>.jsonl
    {"format": "dynamax-records", "version": 1, "identity": {…}}      the settings they were made with
    {"kind": "sample", "doc": 0, …}                                   one line per sample
    {"kind": "timing", "doc": 0, …}                                   one line per timed sample

A last line that was cut off is dropped and made again. Anything else that cannot be read is an error that names file
and line; nothing is overwritten. Files of another run's settings are refused.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from dynamax_llm.errors import DataError, UsageError
from dynamax_llm.evaluation.harness.combine import difference

FORMAT, VERSION = "dynamax-records", 1
#: The folder of an evaluation that holds them.
FOLDER = "records"


class Records:
    """The records of one cell; opened for reading and appending. ``samples`` and ``timings`` are by document."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Read ``path`` if it exists. Raises DataError for a damaged line, UsageError if ``identity`` differs."""
        self.path, self.identity = path, json.loads(json.dumps(identity))
        self.samples: dict[int, dict[str, Any]] = {}
        self.timings: dict[int, dict[str, Any]] = {}
        self._size = 0  # bytes of whole lines
        self._read()

    def append(self, *records: dict[str, Any]) -> None:
        """Write records to the end of the file, on the disk when this returns."""
        lines = list(records)
        if self._size == 0:
            lines.insert(0, {"format": FORMAT, "version": VERSION, "identity": self.identity})
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.truncate(self._size)  # a line that was cut off
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(content)
        for record in records:
            self._keep(record)

    def _read(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            record = self._parsed(number, line)
            if number == 1:
                self._check(record)
            else:
                self._keep(record)
        self._size = len(whole)

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
            wanted = "identity" if number == 1 else "doc"
            problem = None if isinstance(record, dict) and wanted in record else f"it has no {wanted!r}"
            if problem is None and number > 1 and record.get("kind") not in ("sample", "timing"):
                problem = f"its kind is {record.get('kind')!r}"
        except ValueError as error:
            problem = f"not valid JSON ({error})"
        if problem is not None:
            raise DataError(
                f"{self.path}, line {number}: {problem}. Nothing was changed. Take the line out, or move the file away "
                "to have its samples made again."
            )
        return record

    def _check(self, header: dict[str, Any]) -> None:
        if header.get("format") != FORMAT or header.get("version") != VERSION:
            raise DataError(
                f"{self.path}, line 1: it has format {header.get('format')!r}, version {header.get('version')!r}; "
                f"this DYNAMAX reads {FORMAT!r}, version {VERSION}. Give another `out`."
            )
        change = difference(header["identity"], self.identity)
        if change:
            raise UsageError(
                f"{self.path} holds records of another run: {change}. Give another `out`, or the options of that run."
            )

    def _keep(self, record: dict[str, Any]) -> None:
        kept = self.samples if record["kind"] == "sample" else self.timings
        kept[int(record["doc"])] = record


def cell_path(out: Path, backbone: str, task: str, setting: str) -> Path:
    """Where the records of a cell lie."""
    return out / FOLDER / _safe(backbone) / _safe(task) / f"{_safe(setting)}.jsonl"


def _safe(name: str) -> str:
    """A name that is a file name on any system."""
    return re.sub(r"[^\w.@=+,-]", "_", Path(name).name or name) or "_"
