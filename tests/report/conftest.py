"""The synthetic evaluation as a page, made once for all tests that read it, whichever worker they run in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from dynamax_llm.report import write_report
from tests.report import synthetic


@pytest.fixture(scope="session")
def page(tmp_path_factory) -> Path:
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # what the workers of one run share
    path = folder / "synthetic-report.html"
    with FileLock(folder / "synthetic-report.lock"):
        if not path.exists():
            write_report([synthetic.evaluation()], path)
    return path
