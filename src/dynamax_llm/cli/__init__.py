"""The command line: one verb per stage. Every refusal is one clear message on stderr and exit code 2."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer
from typer.main import get_command

from dynamax_llm.cli import bench, calibrate, demo, eval, generate, paper, report, scan, train, tune
from dynamax_llm.errors import DynamaxError

REFUSED, INTERRUPTED = 2, 130

app = typer.Typer(
    name="dynamax",
    help="Early exits for stock Hugging Face language models: as many layers as each token needs.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(scan.scan)
app.command()(train.train)
app.command()(tune.tune)
app.command()(calibrate.calibrate)
app.command()(generate.generate)
app.command(name="eval")(eval.evaluate)
app.command()(bench.bench)
app.command()(report.report)
app.command()(paper.paper)


def _show_version(wanted: bool) -> None:
    if wanted:
        from dynamax_llm.version import installed_version

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
    """Run one command and return its exit code: 0, 2 after a refusal, 130 after Ctrl-C."""
    try:
        outcome = _parser()(list(arguments), prog_name="dynamax", standalone_mode=False)
    except typer.TyperException as error:  # arguments that do not parse
        problem = error.format_message().rstrip(".") + _given(error, arguments)
        return _refuse(f"{problem}. See: dynamax {_verb(arguments)}--help")
    except DynamaxError as error:
        # Of the processes of one run, which all refuse the same, one says so.
        return _refuse(str(error)) if os.environ.get("RANK", "0") == "0" else REFUSED
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would complain once more when it flushes stdout on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return REFUSED
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _refuse(f"{error.strerror or error}{where}. Check the path, its permissions and the free space.")
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        return _refuse("out of memory on the device. Use a smaller --batch, or --dtype bfloat16.")
    return outcome if isinstance(outcome, int) else 0


def main() -> None:
    """Entry point of the ``dynamax`` command."""
    sys.exit(run(sys.argv[1:]))


@functools.cache
def _parser() -> Callable[..., object]:
    """The commands with their options, read from the functions' signatures once: it takes longer than most refusals."""
    return get_command(app)


def _refuse(message: str) -> int:
    typer.echo(f"error: {message}", err=True)
    return REFUSED


def _given(error: typer.TyperException, arguments: Sequence[str]) -> str:
    """The value that an option was given, which the parser's own message leaves out."""
    names = getattr(getattr(error, "param", None), "opts", ())
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    for name, value in (word.split("=", 1) if "=" in word else (word, after) for word, after in pairs):
        if name in names:
            return f" (got {value!r})"
    return ""


def _verb(arguments: Sequence[str]) -> str:
    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    return next((f"{argument} " for argument in arguments if argument in names), "")
