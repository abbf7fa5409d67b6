"""Documents that run: links resolve, Python compiles and names what exists, commands and their options are real.

Documents are those at the top of the repository, in docs/, and the README files of recipes/, whose scripts and shell
files must exist and have the options that are given to them.

python tools/check_docs.py        prints every problem as FILE:LINE: what is wrong, and exits with 1 if there is one
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "dynamax_llm"

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\s*$")
INLINE_COMMAND = re.compile(r"`((?:[A-Z_]+=\S+ )*(?:dynamax|make|python recipes/|bash recipes/)\s?[^`]+)`")
ENVIRONMENT = re.compile(r"(?:[A-Z_]+=(?:\"[^\"]*\"|\S+) +)+")
HEADING = re.compile(r"^#+\s+(.*)$")
SHELL = ("bash", "sh", "console", "shell")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, first line number, and text."""

    language: str
    line: int
    text: str


def documents() -> list[Path]:
    """Every document a reader is sent to."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("README.md")])


def split(text: str) -> tuple[list[tuple[int, str]], list[Block]]:
    """Prose lines with their numbers, and fenced blocks."""
    prose: list[tuple[int, str]] = []
    blocks: list[Block] = []
    inside: tuple[str, int] | None = None
    kept: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        fence = FENCE.match(line)
        if inside is not None and line.startswith("```"):
            blocks.append(Block(inside[0], inside[1], "\n".join(kept)))
            inside, kept = None, []
        elif inside is not None:
            kept.append(line)
        elif fence:
            inside = (fence[1], number + 1)
        else:
            prose.append((number, line))
    return prose, blocks


def check(path: Path) -> Iterator[str]:
    """Problems of one document."""
    prose, blocks = split(path.read_text(encoding="utf-8"))
    where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    for number, line in prose:
        for match in LINK.finditer(line):
            problem = check_link(path, match[1] or match[2])
            if problem:
                yield f"{where}:{number}: {problem}"
        for match in INLINE_COMMAND.finditer(line):
            for problem in check_command(match[1]):
                yield f"{where}:{number}: {problem}"
    for block in blocks:
        if block.language == "python":
            for line_number, problem in check_python(block.text):
                yield f"{where}:{block.line + line_number - 1}: {problem}"
        elif block.language in SHELL:
            for line_number, command in commands(block.text):
                for problem in check_command(command):
                    yield f"{where}:{block.line + line_number - 1}: {problem}"


def check_link(path: Path, target: str) -> str | None:
    """Why a relative link or an anchor leads nowhere; links to the web are not followed."""
    if re.match(r"[a-z]+:", target):
        return None
    name, _, anchor = target.partition("#")
    file = (path.parent / name).resolve() if name else path
    if not file.exists():
        return f"link to {target}: no such file"
    if anchor and file.suffix == ".md" and anchor not in anchors(file):
        return f"link to {target}: {file.name} has no such heading"
    return None


def anchors(path: Path) -> set[str]:
    """The anchors GitHub makes of a document's headings."""
    prose, _ = split(path.read_text(encoding="utf-8"))
    headings = (match[1] for _, line in prose if (match := HEADING.match(line)))
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-") for heading in headings}


def commands(text: str) -> Iterator[tuple[int, str]]:
    """The commands of a shell block that can be checked, continued lines joined, prompts and comments dropped."""
    pending, start = "", 0
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip().removeprefix("$ ")
        start = start if pending else number
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        if ENVIRONMENT.sub("", pending).startswith(("dynamax ", "make ", "python recipes/", "bash recipes/")):
            yield start, pending
        pending = ""


def check_command(command: str) -> Iterator[str]:
    """Whether a make target, a dynamax verb, or a recipe's script exists, and its options."""
    plain = ENVIRONMENT.sub("", command.replace("…", "x"))
    program, *words = shlex.split(plain.replace("[", " ").replace("]", " "), comments=True)
    if program in ("python", "bash"):
        yield from check_recipe(words)
        return
    if program == "make":
        for word in words:
            if "=" not in word and not word.startswith("-") and word not in make_targets():
                yield f"make {word}: the Makefile has no such target"
        return
    if not words or words[0].startswith("-"):
        return
    if words[0] not in cli_options():
        yield f"dynamax {words[0]}: no such verb. There are: {', '.join(sorted(cli_options()))}"
        return
    for word in words[1:]:
        option = word.partition("=")[0]
        if re.match(r"--?[a-z]", option) and option not in cli_options()[words[0]]:
            yield f"dynamax {words[0]} has no option {option}"


def check_recipe(words: list[str]) -> Iterator[str]:
    """Whether a script of recipes/ exists and knows its options: read from its source, nothing is imported."""
    path = ROOT / words[0]
    if not path.is_file():
        yield f"{words[0]}: no such file"
        return
    if path.suffix != ".py":
        return
    for word in words[1:]:
        option = word.partition("=")[0]
        if re.match(r"--[a-z]", option) and option not in recipe_options(path):
            yield f"{words[0]} has no option {option}"


@cache
def recipe_options(path: Path) -> set[str]:
    """Options whose name is a string in the script, in what it imports from its folder, or in recipes/common.py."""
    source = path.read_text(encoding="utf-8")
    local = re.findall(r"^from (\w+) import", source, flags=re.MULTILINE)
    files = [path.parent / f"{name}.py" for name in local] + [ROOT / "recipes" / "common.py"]
    text = source + "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    words = re.findall(r'"(?:--)?([a-z][a-z_-]*)"', text)
    return {"--" + word.replace("_", "-") for word in words}


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


@cache
def cli_options() -> dict[str, set[str]]:
    """Every verb's options, as the command line itself knows them."""
    from typer.main import get_command

    from dynamax_llm.cli import app

    return {
        verb: {"--help", "-h", *(option for parameter in command.params for option in parameter.opts)}
        for verb, command in get_command(app).commands.items()
    }


def check_python(text: str) -> Iterator[tuple[int, str]]:
    """Syntax errors, and names that the package does not have."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        yield error.lineno or 1, f"Python block does not compile: {error.msg}"
        return
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {item.asname or item.name: item.name for item in node.names if item.name == PACKAGE}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            for item in node.names:
                if not has(node.module or "", item.name):
                    yield node.lineno, f"{node.module} has no {item.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module and not has(module, node.attr):
                yield node.lineno, f"{module} has no {node.attr}"


def has(module: str, name: str) -> bool:
    """Whether ``module`` can be imported and has this name, as an attribute or a submodule."""
    try:
        return hasattr(importlib.import_module(module), name) or bool(importlib.util.find_spec(f"{module}.{name}"))
    except ImportError:
        return False


def main() -> int:
    """Print every problem; 1 if there is one."""
    paths = documents()
    problems = [problem for path in paths for problem in check(path)]
    print("\n".join(problems) if problems else f"documents: {len(paths)} checked, nothing wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
