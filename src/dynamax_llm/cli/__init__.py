"""The command line: one verb per stage. Every refusal is one clear message on stderr and exit code 2.

Other codes: 0 done, 1 a bug (one line; DYNAMAX_TRACEBACK=1 shows where), 130 after Ctrl-C, 141 if stdout is closed.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command

from dynamax_llm.cli import bench, calibrate, demo, eval, export, generate, paper, report, scan, train, tune
from dynamax_llm.cli.options import INTERRUPTED
from dynamax_llm.errors import DynamaxError
from dynamax_llm.version import installed_version

BUG, REFUSED = 1, 2

app = typer.Typer(
    name="dynamax",
    help="Early exits for stock Hugging Face language models: as many layers as each token needs.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERBS = {
    "demo": demo.demo,
    "scan": scan.scan,
    "train": train.train,
    "tune": tune.tune,
    "calibrate": calibrate.calibrate,
    "generate": generate.generate,
    "eval": eval.evaluate,
    "bench": bench.bench,
    "export": export.export,
    "report": report.report,
    "paper": paper.paper,
}
for _name, _command in VERBS.items():
    app.command(name=_name)(_command)

#: Options of earlier versions, and what they are called now.
RENAMED = {
    "--batch": "--batch-size (rows) or --tokens-per-step (tokens)",
    "--new-tokens": "--max-new-tokens",
    "--new": "--max-new-tokens",
    "--prompt": "--prompt-tokens",
    "--baseline-new": "--baseline-tokens",
    "--exit-at": "--exit-layers",
    "--exits": "--exit-layers",
    "--schedule": "--threshold-schedule or --exit-schedule",
}


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dynamax {installed_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the verb."""


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    try:
        outcome = _parser()(list(arguments), prog_name="dynamax", standalone_mode=False)
    except typer.TyperException as error:  # arguments that do not parse
        return _refuse(_unparsed(error, arguments))
    except DynamaxError as error:
        # Of the processes of one run, which all refuse the same, one says so.
        return _refuse(str(error)) if os.environ.get("RANK", "0") == "0" else REFUSED
    except typer.Abort:
        typer.echo("interrupted", err=True)
        return INTERRUPTED
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _refuse(f"{error.strerror or error}{where}. Check the path, its permissions and the free space.")
    except Exception as error:  # whatever the libraries below raise
        return _unexpected(error)
    return outcome if isinstance(outcome, int) else 0


def main() -> None:
    """Entry point of the ``dynamax`` command."""
    if hasattr(sys.stdout, "reconfigure"):  # a pipe or terminal that does not take every character gets escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


@functools.cache
def _parser() -> Callable[..., object]:
    """The commands with their options, read from the functions' signatures once: it takes longer than most refusals."""
    return get_command(app)


def _refuse(message: str) -> int:
    typer.echo(f"error: {message}", err=True)
    return REFUSED


def _unexpected(error: Exception) -> int:
    """One line for an error that DYNAMAX did not raise on purpose."""
    message = " ".join(str(error).split())[:300].rstrip(".: ")
    if "out of memory" in message.lower():
        return _refuse("out of memory on the device. Use fewer rows or tokens at a time, or --dtype bfloat16.")
    if os.environ.get("DYNAMAX_TRACEBACK") == "1":
        raise error
    typer.echo(
        f"error: unexpected {type(error).__name__}: {message or 'no message'}. This is a bug in DYNAMAX: please report "
        "it with the lines that DYNAMAX_TRACEBACK=1 adds.",
        err=True,
    )
    return BUG


def _unparsed(error: typer.TyperException, arguments: Sequence[str]) -> str:
    """What is wrong with arguments that do not parse, and where the right ones are listed."""
    verb = next((argument for argument in arguments if argument in VERBS), None)
    now = [name for name in RENAMED.get(getattr(error, "option_name", ""), "").split(" or ") if name]
    has = {option for parameter in _parameters(verb) for option in parameter.opts}
    new = next((name for name in now if name.split()[0] in has), None)
    if new is not None:
        return f"{error.option_name} is now {new} in dynamax {verb}."  # type: ignore[attr-defined]
    problem = error.format_message().rstrip(".") + _given(error, arguments)
    return f"{problem}{'' if problem.endswith('?') else '.'} See: dynamax {verb + ' ' if verb else ''}--help"


def _parameters(verb: str | None) -> Sequence[Any]:
    return _parser().commands[verb].params if verb else ()  # type: ignore[attr-defined]


def _given(error: typer.TyperException, arguments: Sequence[str]) -> str:
    """The value that an option was given, which the parser's own message leaves out."""
    names = getattr(getattr(error, "param", None), "opts", ())
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    for name, value in (word.split("=", 1) if "=" in word else (word, after) for word, after in pairs):
        if name in names:
            return f" (got {value!r})"
    return ""
