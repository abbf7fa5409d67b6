"""Checks that are one kernel: MLP heads that read nothing but the hidden state."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamax_llm.engines.cuda.kernels.judge import mlp_head_kernel
from dynamax_llm.engines.cuda.launch import overlaps, settings
from dynamax_llm.engines.cuda.tiles import blocks, power_of_two
from dynamax_llm.exits.confidence import Judge
from dynamax_llm.exits.heads import ExitHeads, MlpBank

#: Inputs that one program reads.
SHARE = 64


class MlpCheck:
    """The heads of ``judge`` for ``batch`` rows, their constant part worked out beforehand."""

    @staticmethod
    def fits(judge: Judge) -> bool:
        """Whether a judge is such heads."""
        if not isinstance(judge, ExitHeads) or judge.needs_logits:
            return False
        return isinstance(judge.bank, MlpBank)

    @torch.no_grad()
    def __init__(self, judge: ExitHeads, batch: int, device: torch.device) -> None:
        bank = judge.bank
        assert isinstance(bank, MlpBank)
        self.bank, self.batch, self.inputs = bank, batch, bank.inputs
        self.scale = judge.scale[:, 0, 0].contiguous()
        shifted = torch.bmm(judge.shift[:, 0], bank.embed)  # (E, 1, w)
        self.constant = (shifted + bank.embed_bias)[:, 0].contiguous()
        self.offset = (bank.out_bias[:, 0, 0] + judge.prior).contiguous()
        self.programs = blocks(self.inputs, SHARE)
        self.parts = torch.zeros(batch, self.programs, bank.width + 1, device=device)
        self.counter = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        self.confidence = torch.zeros(batch, device=device)

    def ask(
        self,
        index: int,
        h: Tensor,
        thresholds: Tensor,
        ticket: Tensor,
        live: Tensor | None,
        left: Tensor,
        exit_index: Tensor,
        word: Tensor,
    ) -> None:
        """Who leaves by exit ``index``, given h (B, d); launches only."""
        bank, width = self.bank, self.bank.width
        mlp_head_kernel[self.batch, self.programs](
            h,
            self.scale[index],
            bank.embed[index],
            self.constant[index],
            bank.up[index],
            bank.up_bias[index],
            bank.out[index],
            self.offset[index:],
            thresholds,
            index,
            ticket,
            left if live is None else live,
            left,
            exit_index,
            word,
            self.parts,
            self.counter,
            self.confidence,
            self.batch,
            self.inputs,
            width,
            power_of_two(width),
            power_of_two(2 * width),
            SHARE,
            self.programs,
            power_of_two(self.programs),
            power_of_two(self.batch),
            live is None,
            overlaps(h.device),
            **settings(h.device, 4),
        )
