"""The house keeps its own rules: sizes, names, documents, and what must not be in it."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from tools import check_docs

import dynamax_llm
from dynamax_llm import errors
from dynamax_llm.version import installed_version

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


#: Lines of a file and of a function, at most.
FILE, FUNCTION = 400, 60


def test_files_and_functions_stay_small():
    long = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") >= FILE:
            long.append(f"{name(path)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION:
                    long.append(f"{name(path)}:{node.lineno}: {node.name} has {lines} lines")
    assert long == []


def test_modules_say_what_they_are():
    wrong = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if not ast.get_docstring(ast.parse(text)):
            wrong.append(f"{name(path)}: no docstring")
        if "pickle" in re.findall(r"^\s*(?:import|from) (\w+)", text, flags=re.MULTILINE):
            wrong.append(f"{name(path)}: pickle")
        if "trust_remote_code=True" in text:
            wrong.append(f"{name(path)}: remote code")
    assert wrong == []


def test_public_names_resolve():
    assert dynamax_llm.__all__
    assert len(set(dynamax_llm.__all__)) == len(dynamax_llm.__all__)
    for public in dynamax_llm.__all__:
        assert getattr(dynamax_llm, public) is not None, public


def test_public_names_are_these():
    generate = ["load", "Exits", "EarlyExit", "EarlyExitOutput", "Thresholds", "Trace"]
    stages = ["scan", "train", "tune", "calibrate", "calibrate_draft", "bench_exits"]
    settings = ["ScanSettings", "TrainSettings", "TuneSettings", "CalibrationSettings", "ExitBenchSettings"]
    assert dynamax_llm.__all__ == [*generate, *stages, "ExitConfig", *settings, "Promise", "errors"]
    assert dynamax_llm.__version__ == installed_version()
    assert set(dir(dynamax_llm)) == {*dynamax_llm.__all__, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        _ = dynamax_llm.magic
    for room, inner in [("backbones", "adapt"), ("text.sources", "find_source"), ("exits.config", "place_exits")]:
        assert callable(getattr(import_module(f"dynamax_llm.{room}"), inner))


def test_errors_end_in_error_and_their_tree_is_drawn():
    classes = [item for item in vars(errors).values() if isinstance(item, type)]
    assert all(issubclass(item, errors.DynamaxError) and item.__name__.endswith("Error") for item in classes)
    drawn = re.findall(r"^[ │├└─]*(\w+Error)\b", errors.__doc__, flags=re.MULTILINE)
    assert sorted(drawn) == sorted(item.__name__ for item in classes)
    depth = {found[2]: len(found[1]) // 4 for found in re.finditer(r"^([ │├└─]*)(\w+Error)\b", errors.__doc__, re.M)}
    base = depth["DynamaxError"]
    assert all(depth[item.__name__] - base == item.__mro__.index(errors.DynamaxError) for item in classes)


def tracked() -> list[Path]:
    """Files git knows or would add; all of them outside a checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        return [path for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts]
    return [path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file()]


def test_no_package_registry_is_named():
    # Where packages come from is pip's configuration, not the project's business.
    hosts = re.compile(
        rb"https?://[^\s\"')>]*(?:p[y]pi|p[y]thonhosted|download\.p[y]torch|anaconda|/simple/?\b)|-inde[x]-url"
    )
    named = [name(path) for path in tracked() if hosts.search(path.read_bytes())]
    assert named == []


def test_every_dependency_is_pinned():
    def canonical(requirement: str) -> str:
        return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonical(line): line for line in lines if line and not line.startswith("#")}
    assert all("==" in line and "+" not in line and "@" not in line for line in pins.values())
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(item for extra in extras for item in extra)]
    wanted = [item for item in wanted if canonical(item) != PROJECT["project"]["name"]]  # an extra that names another
    assert len(wanted) > 20
    assert [item for item in wanted if canonical(item) not in pins] == []


def test_rooms_are_in_the_contract():
    layers = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    rooms = {room.strip("()") for layer in layers for room in layer.split(" | ")}
    package = ROOT / "src" / "dynamax_llm"
    found = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    assert found - {"__init__"} <= rooms


def test_documents_run():
    assert [problem for path in check_docs.documents() for problem in check_docs.check(path)] == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](nowhere.md)", "link to nowhere.md: no such file"),
        ("# One thing\n[a](#another-thing)", "no such heading"),
        ("```python\nx = (\n```", "does not compile"),
        ("```python\nimport dynamax_llm as dx\ndx.magic()\n```", "dynamax_llm has no magic"),
        ("```python\nfrom dynamax_llm.errors import Nothing\n```", "dynamax_llm.errors has no Nothing"),
        ("```bash\ndynamax conjure\n```", "no such verb"),
        ("```bash\ndynamax generate MODEL \\\n  --rabbits 3\n```", "has no option --rabbits"),
        ("Say `dynamax train --hat`.", "has no option --hat"),
        ("```console\n$ make tea\n```", "no such target"),
    ],
)
def test_the_document_check_finds(text, problem, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    assert any(problem in found for found in check_docs.check(path))


def test_the_document_check_accepts(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# A `b` c\n[x](#a-b-c)\n```bash\nmake test  # all\ndynamax train MODEL --data … --out DIR\n```\n")
    assert list(check_docs.check(path)) == []
