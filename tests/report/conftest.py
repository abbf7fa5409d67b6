"""The synthetic evaluation as a page, made once for all tests that read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamax_llm.report import write_report
from tests.report import synthetic


@pytest.fixture(scope="session")
def page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report([synthetic.evaluation()], path)
    return path
