"""What is committed carries no path of the machine that made it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Folders of a machine, and the folder that only this project's GPU machines have.
MACHINE = re.compile(r"(?<![\w.~])/(?:work|tmp|root|home|mnt|Users|private)/[\w.]|\.carry\b")
KINDS = (".json", ".jsonl", ".md", ".html", ".svg", ".log")
ROOMS = ("recipes", "docs", "src", "tests/data")


def recorded() -> list[Path]:
    """Documents, recorded results and shipped artifacts."""
    found = [path for room in ROOMS for path in (ROOT / room).rglob("*") if path.suffix in KINDS]
    return [*ROOT.glob("*.md"), *found]


def test_the_pattern_finds_paths_of_a_machine() -> None:
    for text in ('"/work/main/src"', "--out /tmp/o", "`.carry/texts`", "/root/out", "file:///home/x"):
        assert MACHINE.search(text), text
    for text in ("recipes/work/x", "https://example.org/home/x", "multiply-carry", "a/tmp/b", "~/work/x"):
        assert not MACHINE.search(text), text


def test_no_recorded_file_carries_a_path_of_the_machine_that_made_it() -> None:
    files = recorded()
    assert len(files) > 60
    bad = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        if (match := MACHINE.search(path.read_text(encoding="utf-8")))
    ]
    assert not bad, "\n".join(bad)
