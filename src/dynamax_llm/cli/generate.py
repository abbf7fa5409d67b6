"""``dynamax generate``: text whose tokens show how deep each went."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamax_llm.cli.deciding import (
    ExitsAt,
    Measure,
    Policy,
    Promised,
    Rule,
    Schedule,
    Threshold,
    Window,
    saved_exits,
)
from dynamax_llm.cli.options import Device, Dtype, Model, load_backbone, peek_backbone
from dynamax_llm.errors import DataError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from dynamax_llm.exits.artifact import Exits
    from dynamax_llm.exits.promise import Promise
    from dynamax_llm.render import Piece


def generate(
    model: Model,
    exits: ExitsAt = None,
    measure: Measure = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given more than once.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file with one prompt per line.")] = None,
    threshold: Threshold = None,
    policy: Policy = None,
    window: Window = None,
    schedule: Schedule = "fixed",
    promise: Promised = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature; implies --sample.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling; implies --sample.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="Mark depths in plain text: the[8] cat[16].")] = False,
) -> None:
    """Continue prompts with as many layers as each token needs, and show the depth of every token."""
    prompts = _prompts(prompt, prompt_file)
    sampling = _sampling(sample, temperature, top_p)
    peek_backbone(model)

    from rich.console import Console

    from dynamax_llm.backbones import adapt
    from dynamax_llm.exits.artifact import Exits
    from dynamax_llm.exits.config import PAPER_EXITS

    rule = Rule(threshold=threshold, policy=policy, window=window, measure=measure, schedule=schedule, promise=promise)
    saved = saved_exits(model, exits, measure)
    # With saved exits, a wrong threshold is refused before the backbone is loaded, which may take minutes.
    early_exit = None if saved is None else rule.apply(saved)
    lm, tokenizer = load_backbone(model, dtype, device)
    if early_exit is None:
        early_exit = rule.apply(Exits.untrained(adapt(lm), exits if exits is not None else PAPER_EXITS))
    job = _Job(lm, tokenizer, early_exit.exits, prompts, early_exit.promise)
    console = Console(no_color=True if no_color else None, highlight=False, soft_wrap=True, markup=False)
    live = None if as_json or len(prompts) > 1 else _Live(console, job)
    if live is not None:
        early_exit.on_token = live.on_token
    inputs = job.encode()
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    start = time.perf_counter()
    out = lm.generate(**inputs, custom_generate=early_exit, max_new_tokens=max_new_tokens, **sampling)
    seconds = time.perf_counter() - start
    if as_json:
        typer.echo(json.dumps(job.document(out, seconds), ensure_ascii=False, indent=2))
        return
    if live is None:
        job.print_all(console, out)
    else:
        live.close()
    job.print_summary(console, out, seconds)


@dataclass
class _Job:
    """One generation: who continues what."""

    model: Any
    tokenizer: Any
    exits: Exits
    prompts: list[str]
    promise: Promise | None = None
    prompt_ids: list[list[int]] = field(default_factory=list)  # without padding; known after ``encode``

    @property
    def n_layers(self) -> int:
        return self.exits.config.n_layers

    def encode(self) -> dict[str, Any]:
        """Ids and mask of the left-padded prompts, on the model's device. Raises UsageError for an empty one."""
        batch = self.tokenizer(self.prompts, return_tensors="pt", padding=len(self.prompts) > 1)
        self.prompt_ids = [
            row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]
        for text, ids in zip(self.prompts, self.prompt_ids, strict=True):
            if not ids:
                raise UsageError(f"the prompt {text!r} has no tokens: give some text to continue.")
        device = self.model.get_input_embeddings().weight.device
        return {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}

    def rows(self, out: Any) -> list[tuple[list[int], list[int]]]:
        """New ids and their depths, per prompt."""
        new = out.exit_layers.shape[1]
        return list(zip(out.sequences[:, -new:].tolist(), out.exit_layers.tolist(), strict=True))

    def print_all(self, console: Console, out: Any) -> None:
        from dynamax_llm.render import pieces

        for text, context, (ids, depths) in zip(self.prompts, self.prompt_ids, self.rows(out), strict=True):
            console.print(text, style="dim", end="")
            items = pieces(self.tokenizer, ids, depths, context)
            self.show(console, items)
            console.print("\n")

    def show(self, console: Console, items: list[Piece]) -> None:
        """Print pieces of text without a line end, their depths as tints or as marks."""
        from dynamax_llm.render import marked, tinted

        config = self.exits.config
        first = config.layers[0] + config.tail_layers
        console.print(tinted(items, config.n_layers, first) if in_colour(console) else marked(items), end="")

    def print_summary(self, console: Console, out: Any, seconds: float) -> None:
        from dynamax_llm.render import exactness, legend, summary

        if in_colour(console):
            console.print(legend(out.trace.costs.depths, self.n_layers))
        trace = out.trace
        line = summary(
            tokens=trace.n_tokens,
            mean_depth=trace.mean_depth,
            n_layers=self.n_layers,
            counted_reduction=trace.counted_reduction,
            seconds=seconds,
        )
        console.print(line)
        if self.promise is not None:
            console.print(f"promise {self.promise.text}: {self.promise.sentence()}")
        exact = exactness(trace, out.verification)
        if exact is not None:
            console.print(exact)

    def document(self, out: Any, seconds: float) -> dict[str, Any]:
        """Everything as plain JSON types. Depths are layers, ``mean_depth`` and the two reductions shares."""
        from dynamax_llm.render import pieces

        rows = zip(self.prompts, self.prompt_ids, self.rows(out), strict=True)
        return {
            "results": [
                {
                    "prompt": text,
                    "text": self.tokenizer.decode(
                        [i for i, d in zip(ids, depths, strict=True) if d], skip_special_tokens=True
                    ),
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
            "promise": None if self.promise is None else self.promise.text,
            "window_bytes": out.trace.spent.window_bytes,
            "verification": None
            if out.verification is None
            else {**vars(out.verification), "acceptance_rate": out.verification.acceptance_rate},
            "seconds": seconds,
        }


class _Live:
    """Prints the only prompt and its continuation as it comes."""

    def __init__(self, console: Console, job: _Job) -> None:
        self.console, self.job = console, job
        self.stream: Any = None

    def on_token(self, tokens: Any, depths: Any) -> None:
        from dynamax_llm.render import Pieces

        if self.stream is None:
            self.console.print(self.job.prompts[0], style="dim", end="")
            self.stream = Pieces(self.job.tokenizer, self.job.prompt_ids[0])
        self._show(self.stream.push(int(tokens[0]), int(depths[0])))

    def close(self) -> None:
        self._show(self.stream.flush())
        self.console.print("\n")

    def _show(self, piece: Any) -> None:
        if piece is not None:
            self.job.show(self.console, [piece])


def in_colour(console: Console) -> bool:
    """Whether tints will be seen; otherwise depths are marked in the text."""
    return console.color_system is not None and not console.no_color


def _prompts(prompt: list[str] | None, prompt_file: Path | None) -> list[str]:
    """The texts to continue. Raises UsageError for none or an empty one, DataError for a file that cannot be read."""
    if (prompt is None) == (prompt_file is None):
        raise UsageError("give the text to continue: either --prompt TEXT or --prompt-file FILE.")
    texts = list(prompt or ())
    if prompt_file is not None:
        try:
            texts = [line for line in prompt_file.read_text(encoding="utf-8").split("\n") if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{prompt_file} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
        except OSError as error:
            raise DataError(
                f"cannot read the prompt file {str(prompt_file)!r} ({error.strerror}). "
                "Give a text file with one prompt per line."
            ) from error
        if not texts:
            raise DataError(f"{prompt_file} holds no prompt. Write one prompt per line.")
    for text in texts:
        if not text.strip():
            raise UsageError(f"the prompt {text!r} is empty: give some text to continue.")
    return texts


def _sampling(sample: bool, temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Arguments for ``generate``. Raises UsageError for values Hugging Face would not take."""
    if temperature is not None and not temperature > 0.0:
        raise UsageError(
            f"temperature {temperature}: give a number above 0, or leave it out to take the likeliest token."
        )
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise UsageError(f"top-p {top_p}: give a share above 0 and up to 1.")
    given = {"temperature": temperature, "top_p": top_p}
    chosen = {name: value for name, value in given.items() if value is not None}
    return {"do_sample": True, **chosen} if sample or chosen else {"do_sample": False}
