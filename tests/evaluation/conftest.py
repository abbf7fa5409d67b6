"""Shared by the tests of evaluation: tiny backbones with their exits, and the shipped rows of every task."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from dynamax_llm.backbones.loading import load
from dynamax_llm.evaluation.harness.settings import Subject
from dynamax_llm.evaluation.harness.tasks import EvalTask, load_tasks
from dynamax_llm.exits.artifact import Exits
from tests.folders import exits_folder, model_folder

ROWS = Path(__file__).resolve().parent.parent / "data" / "tasks"
FAMILIES = ("llama", "mamba2")
TASKS = ("triviaqa", "coqa", "truthfulqa_gen", "truthfulqa_mc1", "truthfulqa_mc2")
LIMIT, NEW = 2, 6


@functools.cache
def subject(model_type: str) -> Subject:
    """A tiny backbone. Its context is short, so that prompts are cut on the left as long ones are."""
    model, tokenizer = load(model_folder(model_type))
    if model_type == "mamba2":
        model.config.max_position_embeddings = 160  # the harness's limit where a model has none is 2,048
    return Subject(model_type, model, tokenizer)


@functools.cache
def heads(model_type: str, head: str = "mamba") -> Exits:
    """Random heads for ``subject(model_type)``."""
    return Exits.from_pretrained(exits_folder(model_type, head))


@functools.cache
def task(name: str) -> EvalTask:
    """A task on its shipped rows."""
    # The harness draws a thousand times for every ROUGE score of truthfulqa_gen.
    limit = 1 if name == "truthfulqa_gen" else LIMIT
    return load_tasks([name], data_dir=ROWS, limit=limit, max_new_tokens=NEW)[0]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param
