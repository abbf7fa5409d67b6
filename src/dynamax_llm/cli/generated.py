"""What ``dynamax generate`` prints: text with depths, live or at its end, a summary, or one JSON document."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from dynamax_llm.cli.tables import Terminal
from dynamax_llm.errors import UsageError
from dynamax_llm.render import Piece, Pieces, exactness, legend, marked, pieces, summary, tinted
from dynamax_llm.text.prompts import chat_ids, has_template

if TYPE_CHECKING:
    from dynamax_llm.exits.artifact import Exits
    from dynamax_llm.exits.promise import Promise


@dataclass
class Generation:
    """Prompts with the model, tokenizer and exits that continue them."""

    model: Any
    tokenizer: Any
    exits: Exits
    prompts: list[str]
    promise: Promise | None = None
    chat: bool = False
    system: str | None = None
    prompt_ids: list[list[int]] = field(default_factory=list)  # without padding; known after ``encode``

    @property
    def n_layers(self) -> int:
        return self.exits.config.n_layers

    def encode(self) -> dict[str, Any]:
        """Ids and mask of the left-padded prompts, on the model's device.

        Raises UsageError for a prompt without tokens, DataError for a chat template that fails.
        """
        import torch

        if self.chat and not has_template(self.tokenizer):
            typer.echo("note: this tokenizer has no chat template: prompts are continued as they are.", err=True)
        self.prompt_ids = [chat_ids(self.tokenizer, text, self.system, self.chat) for text in self.prompts]
        for text, ids in zip(self.prompts, self.prompt_ids, strict=True):
            if not ids:
                raise UsageError(f"the prompt {text!r} has no tokens: give some text to continue.")
        width, pad = max(map(len, self.prompt_ids)), self.tokenizer.pad_token_id or 0  # masked: any token will do
        rows = [[pad] * (width - len(ids)) + ids for ids in self.prompt_ids]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in self.prompt_ids]
        device = self.model.get_input_embeddings().weight.device
        return {
            "input_ids": torch.tensor(rows, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }

    def rows(self, out: Any) -> list[tuple[list[int], list[int]]]:
        """New ids up to the row's end and their depths, per prompt."""
        new = out.exit_layers.shape[1]
        lengths = (out.trace.exit_index >= 0).sum(1).tolist()
        rows = zip(out.sequences[:, -new:].tolist(), out.exit_layers.tolist(), lengths, strict=True)
        return [(ids[:length], depths[:length]) for ids, depths, length in rows]

    def print_all(self, terminal: Terminal, out: Any) -> None:
        """Print every prompt with its continuation."""
        for text, context, (ids, depths) in zip(self.prompts, self.prompt_ids, self.rows(out), strict=True):
            self.prompt(terminal, text)
            self.show(terminal, pieces(self.tokenizer, ids, depths, context))
            typer.echo("\n")

    def prompt(self, terminal: Terminal, text: str) -> None:
        """Print a prompt without a line end."""
        if in_colour(terminal):
            terminal.print(text, style="dim", end="")
        else:  # rich would expand tabs and drop control characters
            typer.echo(text, nl=False)

    def show(self, terminal: Terminal, items: list[Piece]) -> None:
        """Print pieces of text without a line end, their depths as tints or as marks."""
        config = self.exits.config
        first = config.layers[0] + (config.tail_layers if config.readout == "tail" else 0)
        if in_colour(terminal):
            terminal.print(tinted(items, config.n_layers, first), end="")
        else:
            typer.echo(marked(items), nl=False)

    def print_summary(self, terminal: Terminal, out: Any, seconds: float) -> None:
        """Print tokens, depth and cost, and what is promised or exact."""
        if in_colour(terminal):
            terminal.print(legend(out.trace.costs.depths, self.n_layers))
        trace = out.trace
        terminal.write_line(
            summary(
                tokens=trace.n_tokens,
                mean_depth=trace.mean_depth,
                n_layers=self.n_layers,
                counted_reduction=trace.counted_reduction,
                seconds=seconds,
            )
        )
        if self.promise is not None:
            terminal.write_line(f"promise {self.promise.text}: {self.promise.sentence()}")
        exact = exactness(trace, out.verification)
        if exact is not None:
            terminal.write_line(exact)
        if out.drafting is not None:
            terminal.write_line(f"draft: {out.drafting}")

    def json(self, out: Any, seconds: float) -> str:
        """Everything as one JSON document, escaped where stdout does not take every character."""
        escaped = "utf" not in (sys.stdout.encoding or "utf-8").lower()
        return json.dumps(self.document(out, seconds), ensure_ascii=escaped, indent=2)

    def document(self, out: Any, seconds: float) -> dict[str, Any]:
        """Everything as plain JSON types. Depths are layers, ``mean_depth`` and the two reductions shares."""
        rows = zip(self.prompts, self.prompt_ids, self.rows(out), strict=True)
        verification = out.verification
        return {
            "results": [
                {
                    "prompt": text,
                    "text": self.tokenizer.decode(ids, skip_special_tokens=True),
                    "tokens": [vars(piece) for piece in pieces(self.tokenizer, ids, depths, context)],
                }
                for text, context, (ids, depths) in rows
            ],
            "tokens": out.trace.n_tokens,
            "layers": self.n_layers,
            "mean_depth": out.trace.mean_depth,
            "counted_reduction": out.trace.counted_reduction,
            "pass_reduction": out.trace.pass_reduction,
            "state_policy": out.trace.policy,
            "engine": out.engine,
            "promise": None if self.promise is None else self.promise.text,
            "drafting": out.drafting,
            "window_bytes": out.trace.stats.window_bytes,
            "verification": verification and verification.counts(),
            "seconds": seconds,
        }


class Live:
    """Prints the only prompt and its continuation as it comes."""

    def __init__(self, terminal: Terminal, job: Generation) -> None:
        self.terminal, self.job = terminal, job
        self.stream: Pieces | None = None

    def on_token(self, tokens: Any, depths: Any) -> None:
        """Print a step's token."""
        if self.stream is None:
            self.job.prompt(self.terminal, self.job.prompts[0])
            self.stream = Pieces(self.job.tokenizer, self.job.prompt_ids[0])
        self._show(self.stream.push(int(tokens[0]), int(depths[0])))

    def close(self) -> None:
        """Print what is left."""
        if self.stream is not None:
            self._show(self.stream.flush())
        typer.echo("\n")

    def _show(self, piece: Piece | None) -> None:
        if piece is not None:
            self.job.show(self.terminal, [piece])


def in_colour(terminal: Terminal) -> bool:
    """Whether tints will be seen; otherwise depths are marked in the text."""
    return terminal.color_system is not None and not terminal.no_color
