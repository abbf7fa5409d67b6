"""``dynamax demo``: both shipped backbones with all their exits, on real prompts and real text, in about a minute.

Every figure is measured in this run: depth and agreement on held-out text, teacher-forced with exits on; counted
reduction from the same pass; wall-clock speed-up of generation against the same loop at full depth, in pairs.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.backbones.loading import DEFAULT_HEAD, REFERENCE_BACKBONES, load, shipped_exits
from dynamax_llm.decoding import EarlyExit, EarlyExitOutput
from dynamax_llm.evaluation.compare.heads import HeadComparison, HeadSetting
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.registries import HEADS
from dynamax_llm.render import legend, marked, percent, pieces, summary, tinted
from dynamax_llm.text.batches import Batch, pad

PROMPTS = (
    "The city lies on the banks of a river, and",
    "User: Hi, I want to find a restaurant in San Francisco.\nAssistant:",
    '"I do not understand you," said the old man, and he',
)
#: Of the table.
THRESHOLDS = (0.8, 0.9, 0.95)
SHOWN_THRESHOLD = 0.9
NEW_TOKENS, TIMED_TOKENS = 40, 20
#: Held-out documents of the table, and tokens of each.
DOCUMENTS, DOCUMENT_TOKENS = 4, 160


def held_out_texts() -> list[str]:
    """The paragraphs that ship with the package; neither backbones nor heads were trained on them."""
    lines = resources.files("dynamax_llm").joinpath("data/held_out.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@dataclass(frozen=True)
class _Stage:
    """One backbone with its tokenizer and held-out text."""

    name: str
    backbone: Backbone
    tokenizer: Any
    batch: Batch
    comparison: HeadComparison  # on ``batch``

    @classmethod
    def open(cls, name: str) -> _Stage:
        model, tokenizer = load(name, device_map="cpu")
        texts = held_out_texts()
        chosen = texts[:: max(1, len(texts) // DOCUMENTS)][:DOCUMENTS]
        batch = pad([tokenizer(text)["input_ids"][:DOCUMENT_TOKENS] for text in chosen])
        backbone = adapt(model)
        return cls(name, backbone, tokenizer, batch, HeadComparison(backbone, [batch], prompt_length=1))

    def generate(self, prompt: str, early: EarlyExit, tokens: int) -> tuple[EarlyExitOutput, float]:
        """Greedy continuation, and seconds."""
        inputs = self.tokenizer(prompt, return_tensors="pt")
        start = time.perf_counter()
        out = self.backbone.model.generate(
            **inputs, custom_generate=early, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        return out, time.perf_counter() - start


def main() -> None:
    """Run both backbones and print what their exits save."""
    console = Console(highlight=False, markup=False)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    threads, started = torch.get_num_threads(), time.perf_counter()
    # Models this small lose more by synchronising a second thread than they gain, the more so on a busy machine.
    torch.set_num_threads(1)
    try:
        console.print(f"float32, 1 thread, torch {torch.__version__}, {platform.machine()}\n")
        for name in REFERENCE_BACKBONES:
            stage = _Stage.open(name)
            exits = {head: Exits.from_pretrained(folder) for head in HEADS if (folder := shipped_exits(name, head))}
            _continue_prompts(console, stage, exits[DEFAULT_HEAD])
            _table(console, stage, exits)
            _lossless(console, stage, exits[DEFAULT_HEAD])
        console.print(f"demo: {time.perf_counter() - started:.0f} s")
    finally:
        torch.set_num_threads(threads)


def _continue_prompts(console: Console, stage: _Stage, exits: Exits) -> None:
    model, n_layers = stage.backbone.model, stage.backbone.n_layers
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    console.rule(f"{stage.name}: {type(model).__name__}, {n_layers} layers, {size:.1f} M parameters")
    console.print(f"{exits.config.head} head, threshold {SHOWN_THRESHOLD}, exits after layers {exits.config.layers}")
    console.print(legend((*exits.config.layers, n_layers), n_layers), end="\n\n")
    for prompt in PROMPTS:
        out, seconds = stage.generate(prompt, EarlyExit(exits, threshold=SHOWN_THRESHOLD), NEW_TOKENS)
        ids, depths = out.sequences[0, -out.exit_layers.shape[1] :].tolist(), out.exit_layers[0].tolist()
        items = pieces(stage.tokenizer, ids, depths, stage.tokenizer(prompt)["input_ids"])
        console.print(prompt, style="dim", end="")
        console.print(
            tinted(items, n_layers, exits.config.layers[0]) if console.color_system else marked(items), soft_wrap=True
        )
        trace = out.trace
        saved = {"mean_depth": trace.mean_depth, "counted_reduction": trace.counted_reduction}
        line = summary(tokens=trace.n_tokens, n_layers=n_layers, seconds=seconds, **saved)
        console.print(line, style="italic", end="\n\n", soft_wrap=True)


def _table(console: Console, stage: _Stage, exits: dict[str, Exits]) -> None:
    table = Table(title="held-out text, teacher-forced with exits on, and generation", title_justify="left")
    for column in ("head", "threshold", "mean depth", "agreement", "counted\nreduction", "speed-up"):
        table.add_column(column, justify="left" if column == "head" else "right")
    for head, trained in exits.items():
        found = stage.comparison.decode(HeadSetting(head, trained), THRESHOLDS)
        columns = (THRESHOLDS, found.mean_depth, found.agreement, found.saved, _speed_ups(stage, trained))
        for threshold, depth, agreement, saved, speed_up in zip(*columns, strict=True):
            cells = (percent(depth), f"{100 * agreement:.1f} %", percent(saved), f"{speed_up:.2f}x")
            table.add_row(head, f"{threshold:.2f}", *cells)
    console.print(table)
    console.print(
        f"Agreement with the full model over {stage.batch.tokens:,} tokens. Counted reduction: multiply-accumulates "
        "not spent, every check, readout and state update included. Speed-up: wall clock of "
        f"{TIMED_TOKENS} tokens against the same loop at full depth just before, median of {len(PROMPTS)} prompts.\n",
        style="dim",
    )


def _lossless(console: Console, stage: _Stage, exits: Exits) -> None:
    """The same prompts under ``verify``: the text is the full model's."""
    full, verified = EarlyExit(exits, threshold="never"), EarlyExit(exits, threshold=SHOWN_THRESHOLD, policy="verify")
    same, ratios, checked, accepted, saved = 0, [], 0, 0, []
    for prompt in PROMPTS:
        expected, baseline = stage.generate(prompt, full, TIMED_TOKENS)
        out, seconds = stage.generate(prompt, verified, TIMED_TOKENS)
        assert out.verification is not None
        same += int(torch.equal(out.sequences, expected.sequences))
        ratios.append(baseline / seconds)
        checked += out.verification.accepted + out.verification.corrected
        accepted += out.verification.accepted
        saved.append(out.trace.pass_reduction)
    console.print(
        f"Exact output (verify, {exits.config.head} head, threshold {SHOWN_THRESHOLD}): {same} of {len(PROMPTS)} texts "
        f"equal the full model's token for token, {accepted} of {checked} checked drafts accepted, layer passes saved "
        f"{percent(statistics.mean(saved))}, speed-up {statistics.median(ratios):.2f}x.\n",
        style="dim",
        soft_wrap=True,
    )


def _speed_ups(stage: _Stage, exits: Exits) -> list[float]:
    """Per threshold, full-depth over early-exit seconds: the median over prompts, each with its own baseline."""
    full, early = EarlyExit(exits, threshold="never"), [EarlyExit(exits, threshold=value) for value in THRESHOLDS]
    stage.generate(PROMPTS[0], early[0], 2)  # stacks the skipped layers' weights, once
    ratios = []
    for prompt in PROMPTS:
        baseline = stage.generate(prompt, full, TIMED_TOKENS)[1]
        ratios.append([baseline / stage.generate(prompt, one, TIMED_TOKENS)[1] for one in early])
    return [statistics.median(values) for values in zip(*ratios, strict=True)]
