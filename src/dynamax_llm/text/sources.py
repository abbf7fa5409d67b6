"""Where training text comes from: a Hugging Face dataset, a file, or a folder of files, as a stream of documents.

    "corpus/"                                folder: every .jsonl, .jsonl.xz and .txt below it
    "squad_train.jsonl.xz"                   one record a line; the text field is found, or named by text_field
    "book.txt"                               paragraphs, joined into documents of up to TXT_DOCUMENT characters
    "HuggingFaceFW/fineweb-edu:sample-10BT"  dataset id, with configuration and split after colons, streamed

A path that exists wins over a dataset of that name. Only the lines being read are held in memory.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamax_llm.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.xz", ".txt")
#: A .txt file has no documents of its own: paragraphs are joined up to this many characters, and cut there.
TXT_DOCUMENT = 8192
#: Files of a folder read side by side when documents are shuffled.
OPEN_FILES = 16
#: Fields that may hold the text, in order of preference; the last three bring their questions and answers along.
FIELDS = ("text", "content", "document", "article", "story", "context", "question")

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*){0,2}")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Source:
    """Where documents come from; they are read by ``documents``."""

    spec: str
    files: tuple[Path, ...]  # empty: a dataset on the hub
    text_field: str | None = None

    def documents(self, seed: int | None = None) -> Iterator[str]:
        """The documents, empty ones left out. With a seed, files take turns in proportion to their size.

        Raises DataError for text that cannot be read, decoded or used, naming file and line or byte.
        """
        if not self.files:
            yield from _hub_documents(self.spec, self.text_field)
        elif seed is None:
            for path in self.files:
                yield from _file_documents(path, self.text_field)
        else:
            yield from _interleave(self.files, self.text_field, random.Random(seed))

    def identity(self) -> dict[str, Any]:
        """What decides which documents these are, as JSON types."""
        sizes = sum(path.stat().st_size for path in self.files)
        return {"data": self.spec, "text_field": self.text_field, "data_bytes": sizes}


def find_source(spec: str | Path, text_field: str | None = None) -> Source:
    """The Source that ``spec`` names. Raises DataError for a path that does not exist or has no usable file."""
    path = Path(spec).expanduser()
    if path.is_dir():
        files = tuple(sorted(item for item in path.rglob("*") if item.is_file() and _has_suffix(item)))
        if not files:
            raise DataError(f"folder {str(spec)!r} has no usable file. Allowed: {', '.join(SUFFIXES)}.")
        return Source(str(spec), files, text_field)
    if path.is_file():
        if not _has_suffix(path):
            raise DataError(
                f"file {str(spec)!r} is of an unknown kind. Allowed: {', '.join(SUFFIXES)}, or a folder of them."
            )
        return Source(str(spec), (path,), text_field)
    looks_local = isinstance(spec, Path) or _has_suffix(path) or str(spec).startswith((".", "/", "~"))
    if looks_local or not _HUB_ID.fullmatch(str(spec)):
        raise DataError(
            f"no file or folder {str(spec)!r}. Give a {', '.join(SUFFIXES)} file, a folder of them, "
            "or a dataset on the Hugging Face Hub (owner/name or owner/name:configuration:split)."
        )
    return Source(str(spec), (), text_field)


def documents(spec: str | Path, text_field: str | None = None) -> Iterator[str]:
    """Every document of ``spec``, in file order. Raises DataError; see ``find_source``."""
    return find_source(spec, text_field).documents()


def _has_suffix(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def _interleave(files: tuple[Path, ...], text_field: str | None, order: random.Random) -> Iterator[str]:
    """Documents of all files, at most OPEN_FILES at a time, each drawn with a chance in proportion to its size."""
    waiting = list(files)
    order.shuffle(waiting)
    active: list[tuple[Iterator[str], int]] = []
    while waiting or active:
        while waiting and len(active) < OPEN_FILES:
            path = waiting.pop()
            active.append((_file_documents(path, text_field), max(1, path.stat().st_size)))
        chosen = order.choices(range(len(active)), [size for _, size in active])[0]
        document = next(active[chosen][0], None)
        if document is None:
            del active[chosen]
        else:
            yield document


def _file_documents(path: Path, text_field: str | None) -> Iterator[str]:
    reader = _txt_documents(path) if path.name.endswith(".txt") else _json_documents(path, text_field)
    return (document for document in reader if document.strip())


def lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, decompressed if it is .xz. Raises DataError naming file and byte."""
    offset = 0
    try:
        with lzma.open(path, "rb") if path.suffix == ".xz" else open(path, "rb") as stream:
            for raw in stream:
                try:
                    yield raw.decode("utf-8-sig" if offset == 0 else "utf-8")
                except UnicodeDecodeError as error:
                    place = offset + error.start
                    raise DataError(
                        f"{path}: byte {raw[error.start]:#04x} at offset {place} is not UTF-8. Convert the file, "
                        f"for example: iconv -f latin1 -t utf-8 {path.name}."
                    ) from error
                offset += len(raw)
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path} is not an intact .xz file ({error}). Copy it again.") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}). Check that it exists and is yours."
        ) from error


def _txt_documents(path: Path) -> Iterator[str]:
    """Paragraphs (blank lines between them) joined into documents of at most TXT_DOCUMENT characters."""
    document, paragraph = "", ""
    for line in lines(path):
        paragraph += line
        if line.strip() and len(paragraph) < TXT_DOCUMENT:
            continue
        if document and len(document) + len(paragraph) > TXT_DOCUMENT:
            yield document
            document = ""
        document += paragraph
        paragraph = ""
        whole = (len(document) - 1) // TXT_DOCUMENT * TXT_DOCUMENT
        for start in range(0, whole, TXT_DOCUMENT):  # one endless paragraph
            yield document[start : start + TXT_DOCUMENT]
        document = document[max(whole, 0) :]
    yield document + paragraph


def json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a .jsonl or .jsonl.xz file, each with its place in words. Raises DataError."""
    for number, line in enumerate(lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}, column {error.colno}: not valid JSON ({error.msg}). A .jsonl file holds one "
                "JSON object per line."
            ) from error
        except (RecursionError, ValueError) as error:  # brackets without end; an integer of thousands of digits
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
            raise DataError(
                f"{path}, line {number}: the record cannot be parsed ({reason}). Repair or remove it."
            ) from error
        yield f"{path}, line {number}", record


def _json_documents(path: Path, text_field: str | None) -> Iterator[str]:
    for place, record in json_records(path):
        yield render(record, text_field, place)


def _hub_documents(spec: str, text_field: str | None) -> Iterator[str]:
    name, configuration, split = (*spec.split(":"), "", "")[:3]
    try:
        import datasets  # heavy, and only needed here
    except ImportError as error:
        raise DataError(
            f"no file or folder {spec!r}, and a dataset on the Hugging Face Hub needs the package datasets. "
            "Check the path, or install it: pip install 'dynamax-llm[text]'."
        ) from error
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split or "train", streaming=True)
        records = iter(rows)
        first = next(records, None)
    except Exception as error:  # the hub client raises its own, the network's and the parsers' errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DataError(
            f"no file or folder {spec!r}, and no dataset of that name could be opened on the Hugging Face Hub "
            f"({reason}). Check the name and the connection; without a network give a {', '.join(SUFFIXES)} file "
            "or a folder of them."
        ) from error
    number = 0
    while first is not None:
        number += 1
        document = render(first, text_field, f"{spec}, record {number}")
        if document.strip():
            yield document
        first = next(records, None)


def render(record: Any, text_field: str | None, place: str) -> str:
    """The text of one record. Questions and answers that belong to a passage follow it.

    Raises DataError, naming ``place`` and the fields there are, if no field holds text.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{place}: the record is a {type(record).__name__}, not a JSON object with named fields.")
    field = text_field or next((name for name in FIELDS if isinstance(record.get(name), str)), None)
    if field is None or not isinstance(record.get(field), str):
        wanted = f"no text in a field {text_field!r}" if text_field else f"no text in any of {', '.join(FIELDS)}"
        raise DataError(
            f"{place}: {wanted}. It has {', '.join(map(str, record)) or 'no fields'}. Name one: `text_field`."
        )
    text = _rendered(record, field, text_field)
    if (lone := _SURROGATE.search(text)) is not None:
        raise DataError(
            f"{place}: the text holds half a character ({lone.group().encode('ascii', 'backslashreplace').decode()}, a "
            "lone surrogate, from text that was cut in the middle of one). Repair or remove the record."
        )
    return text


def _rendered(record: Mapping[str, Any], field: str, text_field: str | None) -> str:
    """The text in ``field``, with the questions and answers that belong to it unless the field was named."""
    text = record[field]
    if text_field is not None:
        return text
    if field in ("story", "context"):
        return "\n\n".join([text, *_turns(record)])
    if field == "question":
        answer = _answer(record)
        return f"Question: {text}\nAnswer: {answer}" if answer else text
    return text


def _turns(record: Mapping[str, Any]) -> list[str]:
    """Question and answer pairs of a CoQA story, a SQuAD passage, or a list of ``qas``."""
    pairs: Iterable[tuple[Any, Any]] = ()
    questions, answers = record.get("questions"), record.get("answers")
    if isinstance(questions, Mapping) and isinstance(answers, Mapping):
        pairs = zip(questions.get("input_text", ()), answers.get("input_text", ()), strict=False)
    elif isinstance(record.get("qas"), list):
        pairs = ((turn.get("question", ""), _answer(turn)) for turn in record["qas"] if isinstance(turn, Mapping))
    elif isinstance(record.get("question"), str):
        pairs = [(record["question"], _answer(record))]
    return [f"Q: {question}\nA: {answer}" for question, answer in pairs if question and answer]


def _answer(record: Mapping[str, Any]) -> str:
    """The first answer of a record, in any of the common shapes; "" if there is none."""
    answer = next((record[name] for name in ("answer", "answers", "best_answer") if record.get(name)), "")
    if isinstance(answer, Mapping):
        answer = next((answer[name] for name in ("value", "text", "input_text") if answer.get(name)), "")
    if isinstance(answer, list):
        answer = answer[0] if answer else ""
    return answer if isinstance(answer, str) else ""
