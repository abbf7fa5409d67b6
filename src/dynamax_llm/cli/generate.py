"""``dynamax generate``: text whose tokens show how deep each went."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamax_llm.cli import options as opt
from dynamax_llm.cli.backbone import load_backbone, peek_backbone
from dynamax_llm.cli.deciding import (
    ExitsFolder,
    MeasureLayers,
    at_layers,
    check_exits,
    decode_options,
    note_closed,
    note_unused_window,
    saved_exits,
)
from dynamax_llm.errors import DataError, UsageError
from dynamax_llm.settings import DecodeSettings, GenerateSettings

if TYPE_CHECKING:
    from dynamax_llm.cli.generated import Generation


@opt.verb(place=opt.PLACE, decode=opt.Fields(DecodeSettings), settings=opt.Fields(GenerateSettings))
def generate(
    *,
    model: opt.Model,
    exits: ExitsFolder = None,
    exit_layers: MeasureLayers = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given more than once.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file with one prompt per line.")] = None,
    decode: opt.Given,
    settings: opt.Given,
    place: opt.Given,
    as_json: opt.AsJson = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="Mark depths in plain text: the[8] cat[16].")] = False,
) -> None:
    """Continue prompts with as many layers as each token needs, and show the depth of every token."""
    prompts = _prompts(prompt, prompt_file)
    request = GenerateSettings(**settings)
    measure = decode.get("measure")
    check_exits(exits, exit_layers, measure)
    options = decode_options(decode, exits)
    peek_backbone(model)

    from dynamax_llm.backbones import adapt
    from dynamax_llm.cli.generated import Generation, Live
    from dynamax_llm.cli.tables import Terminal
    from dynamax_llm.decoding import EarlyExit

    saved = saved_exits(model, exits, exit_layers, measure)
    # With saved exits, a wrong threshold is refused before the backbone is loaded, which may take minutes.
    early_exit = None if saved is None else EarlyExit(saved, **options)
    if early_exit is not None and exits is not None:
        note_unused_window({**options, "policy": early_exit.policy.name})
    lm, tokenizer = load_backbone(model, place)
    backbone = adapt(lm)
    if early_exit is None:
        early_exit = at_layers(backbone, exit_layers, options)
    job = Generation(lm, tokenizer, early_exit.exits, prompts, early_exit.promise, request.chat, request.system)
    terminal = Terminal(no_color=True if no_color else None, soft_wrap=True)
    live = None if as_json or len(prompts) > 1 else Live(terminal, job)
    if live is not None:
        early_exit.on_token = live.on_token
    inputs = job.encode()
    note_closed(early_exit, options)
    new = _within(backbone.max_positions(), job, request.max_new_tokens)
    if request.seed is not None:
        import torch

        torch.manual_seed(request.seed)
    start = time.perf_counter()
    out = lm.generate(
        **inputs, custom_generate=early_exit, max_new_tokens=new, **request.arguments(), **_stored(lm, tokenizer)
    )
    seconds = time.perf_counter() - start
    if as_json:
        typer.echo(job.json(out, seconds))
        return
    if live is None:
        job.print_all(terminal, out)
    else:
        live.close()
    job.print_summary(terminal, out, seconds)


def _within(limit: int | None, job: Generation, new: int) -> int:
    """As many of ``new`` tokens as the context has room for, with a note if that is fewer."""
    if limit is None:
        return new
    longest = max(map(len, job.prompt_ids))
    room = limit - longest
    if room < 1:
        raise UsageError(
            f"the prompt has {longest} tokens, and the context of this model holds {limit}: give at most {limit - 1}."
        )
    if room >= new:
        return new
    typer.echo(f"note: the context holds {limit} tokens: generation stops after {room} new ones.", err=True)
    return room


def _stored(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Arguments that replace what a stored generation config would add: beams, several sequences, stop strings."""
    from transformers import StoppingCriteriaList, StopStringCriteria

    arguments: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1}
    stored = model.generation_config
    if stored is not None and stored.stop_strings:
        criterion = StopStringCriteria(tokenizer, stored.stop_strings)
        arguments["stopping_criteria"] = StoppingCriteriaList([criterion])
        stored.stop_strings = None
    return arguments


def _prompts(prompt: list[str] | None, prompt_file: Path | None) -> list[str]:
    """The texts to continue. Raises UsageError for none or an empty one, DataError for a file that cannot be read."""
    if (prompt is None) == (prompt_file is None):
        raise UsageError("give the text to continue: either --prompt TEXT or --prompt-file FILE.")
    texts = list(prompt or ())
    if prompt_file is not None:
        try:
            lines = prompt_file.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{prompt_file} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
        except OSError as error:
            raise DataError(
                f"cannot read the prompt file {str(prompt_file)!r} ({error.strerror}). "
                "Give a text file with one prompt per line."
            ) from error
        texts = [line for line in lines if line.strip()]
        if not texts:
            raise DataError(f"{prompt_file} holds no prompt. Write one prompt per line.")
    for text in texts:
        if not text.strip():
            raise UsageError(f"the prompt {text!r} is empty: give some text to continue.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(f"the prompt {text!a} is not valid UTF-8 text: give it as UTF-8.") from None
    return texts
