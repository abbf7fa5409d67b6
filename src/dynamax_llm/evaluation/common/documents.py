"""JSON documents of evaluations, scans and benchmarks: their common parts, how they are written, one reader for all."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from dynamax_llm.errors import DataError
from dynamax_llm.exits.files import write_atomically


class Part(BaseModel):
    """A part of a document: immutable, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(Part):
    """A mean with its bootstrap interval (95 %, over samples); both ends None where none can be had."""

    value: float
    low: float | None = None
    high: float | None = None


class Run(Part):
    """How a part of a document was made."""

    command: str
    created: str  # ISO 8601, UTC
    seconds: float
    hardware: str
    versions: dict[str, str]
    commit: str | None = None


class BackboneFacts(Part):
    """The backbone that was measured."""

    name: str
    model_type: str
    n_layers: int
    parameters: int
    fingerprint: str


class Document(Part):
    """A whole document: ``FILE`` in a folder, or a file of another name; its ``format`` and ``version`` are fields.

    ``WHAT`` and ``COMMAND`` name it and the command that writes it in messages.
    """

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int] = 1
    FILE: ClassVar[str]
    WHAT: ClassVar[str]
    COMMAND: ClassVar[str]

    format: str
    version: int

    @classmethod
    def path(cls, place: str | Path) -> Path:
        """The file that a place stands for: a folder, existing or not, or a .json file."""
        given = Path(place).expanduser()
        return given if given.suffix == ".json" and not given.is_dir() else given / cls.FILE

    def save(self, place: str | Path) -> None:
        """Write the document, whole or not at all; the folder is made. Raises ArtifactError."""
        path = self.path(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (self.model_dump_json(indent=1) + "\n").encode())

    @classmethod
    def read(cls, place: str | Path) -> Self:
        """Read what ``save`` wrote. Raises DataError naming the field at fault."""
        path = cls.path(place)
        try:
            document = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise DataError(
                f"cannot read {str(Path(place))!r} ({error.strerror}). Give the folder that {cls.COMMAND} wrote, or "
                f"{cls.FILE} in it."
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the document"
            raise DataError(
                f"{path} is not a usable {cls.WHAT}: {field}: {first['msg']}. Run {cls.COMMAND} again."
            ) from error
        if document.format != cls.FORMAT or document.version > cls.VERSION:
            raise DataError(
                f"{path} has format {document.format!r}, version {document.version}; this DYNAMAX reads "
                f"{cls.FORMAT!r} up to version {cls.VERSION}. Upgrade: pip install --upgrade dynamax-llm."
            )
        return document
