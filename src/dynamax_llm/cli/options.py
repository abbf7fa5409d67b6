"""Options of the verbs: derived from the fields of settings dataclasses, so that every default stands once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any

import typer

from dynamax_llm.errors import DynamaxError, UsageError
from dynamax_llm.exits.config import DEFAULT_EXITS
from dynamax_llm.settings import Option, PlaceSettings, option_of

INTERRUPTED, BROKEN_PIPE = 130, 141

#: The values given for one group of options, by field name: arguments of that group's dataclass.
Given = dict[str, Any]

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A model folder, a hub id, or a shipped backbone: transformer-ee, mamba-ee."),
]
Data = Annotated[
    str, typer.Option(help="A .jsonl, .jsonl.xz or .txt file, a folder of them, or a dataset id.", metavar="PATH|ID")
]
ExitLayers = Annotated[
    str, typer.Option(help="Where exits sit: layers (8,12) or shares of the depth (1/2,0.75).", metavar="LAYERS")
]
DEFAULT_LAYERS = ",".join(DEFAULT_EXITS)
TextField = Annotated[str | None, typer.Option(help="Field of a .jsonl or dataset record that holds the text.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the whole document as JSON.")]
Target = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the document and the plot as SVG and PNG, or the .json file, with the plot beside it.",
        metavar="DIR|FILE",
    ),
]

_SCALES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def count(text: str, name: str = "tokens") -> int:
    """A number of tokens from ``300k``, ``1M``, ``2.5M``, ``1_000_000``. Raises UsageError."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)\s*([kmbg]?)", text.strip(), flags=re.IGNORECASE)
    number = int(float(match[1].replace("_", "")) * _SCALES[match[2].lower()]) if match else 0
    if number < 1:
        raise UsageError(f"{name} {text!r}: give a positive number such as 300k, 1M or 2500000.")
    return number


def items(text: str) -> tuple[str, ...]:
    """The parts of a comma list, without blanks."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


class Fields:
    """Fields of a settings dataclass that are options of a verb.

    ``only``: these fields; None: all that have an option. ``options`` describes the fields of a class whose own fields
    carry no option; ``flags`` renames options for one verb.
    """

    def __init__(
        self,
        settings: type,
        *only: str,
        options: Mapping[str, Option] | None = None,
        flags: Mapping[str, str] | None = None,
    ) -> None:
        self.settings, self.only, self.options, self.flags = settings, only, options or {}, flags or {}

    def derive(self, group: str) -> Iterator[Derived]:
        hints = typing.get_type_hints(self.settings)
        fields = {field.name: field for field in dataclasses.fields(self.settings)}
        for name in self.only or self.options or fields:
            field = fields[name]
            option = self.options.get(name) or option_of(field)
            flag = self.flags.get(name) or (option.flag if option else "")
            if option is not None and flag != "":
                yield Derived(group, field, option, _plain(hints[name]), flag or f"--{name.replace('_', '-')}")


def _plain(hint: Any) -> Any:
    """The type without None; text where that is one of several."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not NoneType] if isinstance(hint, UnionType) else [hint]
    return str if str in kinds else kinds[0]


#: Where the model runs: an option group of most verbs.
PLACE = Fields(PlaceSettings)


@dataclass(frozen=True)
class Derived:
    """One option made from one field; ``group`` is the verb's parameter that gets its value."""

    group: str
    field: dataclasses.Field
    option: Option
    kind: Any
    flag: str

    @property
    def name(self) -> str:
        """The parameter's name in the parser."""
        return self.flag.split("/")[0].removeprefix("--").replace("-", "_")

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.kind) is tuple

    @property
    def item_type(self) -> type:
        """The type of the value, or of one item of a tuple."""
        return typing.get_args(self.kind)[0] if self.is_list else self.kind

    @property
    def default(self) -> Any:
        """The field's default as the parser shows it."""
        value: Any = self.field.default
        if self.option.count:
            scale, letter = next(((n, c) for n, c in ((10**6, "M"), (10**3, "k")) if value % n == 0), (1, ""))
            return f"{value // scale}{letter}"
        if self.is_list:
            return ",".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value or ()) or None
        return str(value) if self.item_type is str and value is not None else value

    def parameter(self) -> inspect.Parameter:
        """The parameter that the parser reads."""
        as_text = self.is_list or self.option.count
        kind: Any = str if as_text else self.item_type
        kind = kind | None if self.default is None else kind
        metavar = self.option.metavar or (None if not self.is_list else "NAMES" if self.item_type is str else "NUMBERS")
        declared = typer.Option(self.flag, help=self.option.help.replace("[", r"\["), metavar=metavar)
        annotation = Annotated[kind, declared]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=annotation)

    def value(self, given: Any) -> Any:
        """The field's value for what was given. Raises UsageError naming the option."""
        flag = self.flag.split("/")[0]
        if self.option.count:
            value: Any = count(given, flag)
        elif self.is_list:
            try:
                value = tuple(self.item_type(item) for item in items(given))
            except ValueError:
                like = "1,8" if self.item_type is int else "0,0.5,1"
                raise UsageError(
                    f"{flag} {given!r}: give numbers separated by commas, like {like}.{self.option.note}"
                ) from None
            if not value:
                raise UsageError(f"{flag} {given!r}: give at least one, separated by commas.")
        else:
            value = given
        problem = self.option.problem(value)
        if problem is not None:
            raise UsageError(f"{flag} {given!r}: {problem}")
        return value


def verb(*, resumes: bool = False, **groups: Fields) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn a function into a verb: its parameter ``group`` becomes that group's options, those given.

    Values are checked before the function runs. Errors name options instead of arguments. Ctrl-C ends with one line:
    ``resumes`` says that the same command goes on afterwards.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        derived = {group: list(fields.derive(group)) for group, fields in groups.items()}
        flat = [item for group in derived.values() for item in group]

        @functools.wraps(function)
        def command(context: typer.Context, **values: Any) -> None:
            given: dict[str, Given] = {group: {} for group in groups}
            for item in flat:
                value = values.pop(item.name)
                if was_given(context, item.name):
                    given[item.group][item.field.name] = item.value(value)
            with_context = {"context": context} if "context" in inspect.signature(function).parameters else {}
            try:
                function(**with_context, **values, **given)
                sys.stdout.flush()
            except DynamaxError as error:
                error.args = (in_flags(str(error), _flags(context, flat)),)
                raise
            except KeyboardInterrupt:
                typer.echo("interrupted" + ("; the same command goes on where it stopped" if resumes else ""), err=True)
                raise typer.Exit(INTERRUPTED) from None
            except BrokenPipeError:  # the reader (head, less) has gone
                # Python would complain once more when it flushes stdout on the way out.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(BROKEN_PIPE) from None

        command.__signature__ = _signature(function, derived)  # type: ignore[attr-defined]
        command.__annotations__ = {
            name: item.annotation
            for name, item in command.__signature__.parameters.items()  # type: ignore[attr-defined]
        }
        command.derived = flat  # type: ignore[attr-defined]
        return command

    return decorate


def _signature(function: Callable[..., None], derived: Mapping[str, Sequence[Derived]]) -> inspect.Signature:
    """The function's own parameters, with each group replaced by its options."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    context = inspect.Parameter("context", keyword, annotation=typer.Context)
    parameters = [context]
    for name, item in inspect.signature(function, eval_str=True).parameters.items():
        if name in derived:
            parameters += [option.parameter() for option in derived[name]]
        elif name != "context":
            parameters.append(item.replace(kind=keyword))
    return inspect.Signature(parameters)


def was_given(context: typer.Context, name: str) -> bool:
    """Whether the option was on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _flags(context: typer.Context, derived: Sequence[Derived]) -> dict[str, str]:
    """The option of every argument: of the verb's own by parameter name, of derived ones by field name."""
    own = {str(item.name): max(item.opts, key=len) for item in context.command.params if item.opts[0].startswith("-")}
    return {**own, **{item.field.name: item.flag.split("/")[-1] for item in derived}}


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """An error message of the library in the words of the command line.

    "training setting lr = 2" becomes "--lr 2", and an argument in backticks its option; ``flags`` is by argument.
    """

    def assigned(match: re.Match[str]) -> str:
        return f"{flags[match[1]]} " if match[1] in flags else match[0]

    message = re.sub(r"(?:\b\w+ setting )?\b(\w+) = (?=\S)", assigned, message)
    return re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[0]), message)
