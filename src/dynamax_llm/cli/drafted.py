"""What ``train`` and ``calibrate`` say of a draft, and the calibration of one: no promise, but a choice by time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamax_llm.cli.backbone import load_backbone, no_empty_folder, text_of
from dynamax_llm.decoding.draft_choice import drafts, kept_choices

if TYPE_CHECKING:
    from dynamax_llm.calibration.settings import CalibrationSettings
    from dynamax_llm.cli.tables import Terminal
    from dynamax_llm.decoding.draft_choice import DraftChoice
    from dynamax_llm.exits.artifact import Exits


def calibrate_draft(
    model: str,
    found: Exits,
    target: Path,
    data: str | None,
    draws: CalibrationSettings,
    batch_size: int,
    place: dict[str, Any],
) -> None:
    """Measure what chains cost here, choose threshold and window, keep the choice in ``target`` and print it.

    ``data``: prompts whose chains take the place of the recorded ones. Raises what ``traces.chain_choice`` raises.
    """
    from rich.console import Console

    from dynamax_llm.cli.tables import Terminal
    from dynamax_llm.exits.artifact import MANIFEST, TENSORS
    from dynamax_llm.exits.files import prepare_folder
    from dynamax_llm.traces.chain_choice import recorded

    prompts = None
    if data is None:
        recorded(found)
    else:
        from dynamax_llm.text.prompts import read_prompts

        prompts = read_prompts(text_of(data, None).spec, draws.prompts)
    with no_empty_folder(target):
        prepare_folder(target, (MANIFEST, TENSORS))
        lm, tokenizer = load_backbone(model, place)
        from dynamax_llm.api import calibrate_draft as measure

        with Console(stderr=True).status("measuring what chains cost …"):
            how: dict[str, Any] = {"batch_size": batch_size, "chat": draws.chat, "system": draws.system}
            choice = measure(lm, found, tokenizer=tokenizer, prompts=prompts, **how)
        found.save(target)
    terminal = Terminal()
    write_choice(terminal, choice)
    write_matches(terminal, found)
    terminal.write_line(f"Saved in {target}. Next:")
    terminal.write_line(f'  dynamax generate {model} --exits {target} --prompt "…"')


def report_draft(exits: Exits, model: str, out: Path) -> None:
    """Print what training measured of a draft: time first."""
    from dynamax_llm.cli.tables import Terminal

    assert drafts(exits)
    terminal = Terminal()
    choice = next(iter(kept_choices(exits)), None)
    if choice is None:
        terminal.write_line("Draft: held-out text gave no chain, so nothing is estimated.")
    else:
        write_choice(terminal, choice)
        write_matches(terminal, exits)
    terminal.write_line(f"Saved in {out}. Next:")
    if choice is None:
        terminal.write_line(f"  dynamax calibrate {model} --exits {out} --data prompts.jsonl")
    else:
        terminal.write_line(f'  dynamax generate {model} --exits {out} --prompt "…"')
        terminal.write_line(f"  dynamax calibrate {model} --exits {out}   # on another machine, or with more threads")


def write_choice(terminal: Terminal, choice: DraftChoice) -> None:
    """The verdict, in time, and the costs it rests on."""
    if choice.pays:
        terminal.write_line(
            f"Draft: {choice.speed_up:.2f}x of full depth estimated, the text exactly the full model's, at threshold "
            f"{choice.threshold:g} and window {choice.window}: {choice.tokens:.2f} tokens a verification by "
            f"{choice.proposals:.2f} proposals."
        )
    else:
        terminal.write_line(
            f"Draft: no chain pays here (at best {choice.speed_up:.2f}x of full depth); generation runs at full depth."
        )
    threads = f", {choice.threads} thread{'' if choice.threads == 1 else 's'}" if choice.threads else ""
    terminal.write_line(
        f"On {choice.device}{threads}, {choice.engine}, {choice.dtype}, batch size {choice.batch_size}, measured in "
        f"full-depth steps{_milliseconds(choice)}: a draft step {choice.costs.draft:.2f}; passes over 1, 2, … tokens "
        f"{', '.join(f'{cost:.2f}' for cost in choice.costs.passes)}."
    )


def _milliseconds(choice: DraftChoice) -> str:
    seconds = choice.costs.step_seconds
    return "" if seconds is None else f" of {1000 * seconds:.1f} ms"


def write_matches(terminal: Terminal, exits: Exits) -> None:
    """Match rates by step."""
    from dynamax_llm.traces.chain_choice import chain_facts

    facts = chain_facts(exits)
    if facts:
        rows = [(str(step), f"{rate:.2f}") for step, rate in enumerate(facts["match"], start=1)]
        title = f"{facts['windows']} chains of decoded text, {facts['tokens']:.2f} tokens each if none is cut short"
        terminal.write_table(title, ("step", "proposal accepted, after those before it"), rows)
