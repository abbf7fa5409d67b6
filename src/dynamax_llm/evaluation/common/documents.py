"""Reading what a command wrote: documents that say their format and version, checked field by field."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dynamax_llm.errors import DataError

Document = TypeVar("Document", bound=BaseModel)


def read_document(
    kind: type[Document], path: Path, *, what: str, command: str, known: tuple[str, int], given: str = "file"
) -> Document:
    """The document of ``kind`` in ``path``, written by ``command``; ``what`` names it, "a scan" say.

    ``known`` is the format, and the newest version, that can be read. Raises DataError naming what is at fault.
    """
    name, newest = known
    try:
        document = kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"cannot read {str(path)!r} ({error.strerror}). Give the {given} that {command} wrote."
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the document"
        raise DataError(
            f"{path} is no {what} that can be used: {place}: {first['msg']}. Run {command} again."
        ) from error
    said: Any = document  # its kind has both fields
    if said.format != name or said.version > newest:
        raise DataError(
            f"{path} says format {said.format!r}, version {said.version}; this DYNAMAX reads {name!r} "
            f"up to version {newest}. Upgrade: pip install --upgrade dynamax-llm."
        )
    return document
