"""What a scan reads: text, or the model's own greedy answers to a few of the prompts."""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynamax_llm.backbones import Backbone
from dynamax_llm.evaluation.scan.settings import ScanSettings
from dynamax_llm.text.answer_source import AnswerSource
from dynamax_llm.text.answers import make_answers
from dynamax_llm.text.prompts import read_prompts
from dynamax_llm.text.settings import AnswerSettings
from dynamax_llm.text.sources import Source


def text_to_scan(
    backbone: Backbone, tokenizer: Any, source: Source, settings: ScanSettings
) -> tuple[Source | AnswerSource, int]:
    """The source as it is, or answers to ``settings.prompts`` of its prompts, and the number of these.

    Answers are made for this scan and kept in memory alone. Raises DataError for prompts that cannot be read.
    """
    if settings.answers is None:
        return source, 0
    prompts = read_prompts(source.spec)
    drawn = random.Random(settings.seed).sample(prompts, min(settings.prompts, len(prompts)))
    asked = AnswerSettings(
        sampled=0.0,
        rows=settings.prompts,
        max_new_tokens=settings.max_new_tokens,
        chat=settings.chat,
        system=settings.system,
    )
    limit = backbone.max_positions()
    if limit is not None and asked.prompt_tokens + asked.max_new_tokens > limit:
        asked = replace(asked, prompt_tokens=max(1, limit - asked.max_new_tokens))
    with tempfile.TemporaryDirectory() as folder:
        name = Path(source.spec).name
        answers = make_answers(backbone.model, tokenizer, drawn, asked, folder, name=name, quiet=settings.quiet)
    return AnswerSource(answers), len(answers)
