"""What ``dynamax train`` learns from: text, or the model's own answers, or both."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dynamax_llm.cli.backbone import text_of
from dynamax_llm.cli.options import Given
from dynamax_llm.errors import UsageError
from dynamax_llm.text.settings import AnswerSettings, LearnSettings

if TYPE_CHECKING:
    from dynamax_llm.text.answer_source import AnySource
    from dynamax_llm.text.prompts import Prompt
    from dynamax_llm.text.sources import Source
    from dynamax_llm.training.parallel import Group


@dataclass
class Lesson:
    """What was asked for; ``read`` finds what can be wrong with it before a model is loaded."""

    data: str
    text_field: str | None
    learn: LearnSettings
    answering: AnswerSettings
    text: Source | None = None  # what is in --data, or mixed with the answers
    prompts: list[Prompt] = field(default_factory=list)

    @classmethod
    def of(cls, data: str, text_field: str | None, learn: Given, answering: Given) -> Lesson:
        """``learn`` and ``answering`` are the options given. Raises UsageError for those that do not go together."""
        chosen = LearnSettings(**learn)
        if chosen.answers is None and answering:
            raise UsageError("options of answers are given, and no answers asked for: add --answers own.")
        if "mix_share" in learn and chosen.mix_text is None:
            raise UsageError(f"mix_share = {chosen.mix_share!r}: there is no text to mix. Give `mix_text`.")
        return cls(data, text_field, chosen, AnswerSettings(**answering))

    def read(self) -> None:
        """Find the text and read the prompts. Raises DataError."""
        if self.learn.answers is None:
            self.text = text_of(self.data, self.text_field)
            return
        from dynamax_llm.text.prompts import read_prompts

        if self.learn.mix_text is not None:
            self.text = text_of(self.learn.mix_text, self.text_field)
        self.prompts = read_prompts(text_of(self.data, None).spec, self.answering.max_prompts)

    def source(self, model: Any, tokenizer: Any, out: Path, group: Group) -> AnySource:
        """The text, or the answers, which are made first; the first process of ``group`` makes them."""
        if self.learn.answers is None:
            assert self.text is not None
            return self.text
        from dynamax_llm.text.answer_source import AnswerSource, MixedSource
        from dynamax_llm.text.answers import make_answers
        from dynamax_llm.text.prompts import has_template

        if group.main and self.answering.chat and not has_template(tokenizer):
            typer.echo("note: this tokenizer has no chat template: prompts are continued as they are.", err=True)
        folder = self.learn.answers_dir or out / "answers"
        how: dict[str, Any] = {"name": Path(self.data).name, "quiet": not group.main, "writes": group.main}
        answers = make_answers(model, tokenizer, self.prompts, self.answering, folder, **how)
        if group.main:
            typer.echo(f"{answers.summary()}, in {folder}", err=True)
        source = AnswerSource(answers)
        return source if self.text is None else MixedSource(source, self.text, self.learn.mix_share)
