"""Checks that are one kernel: linear and MLP heads, on h, on a shortlist's statistics, on the leading tokens' rows.

``HeadCheck.obstacle`` says which judges these are; all others are asked through PyTorch (``check.Check``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dynamax_llm.engines.cuda.kernels.estimator import check_kernel
from dynamax_llm.engines.cuda.launch import overlaps, settings
from dynamax_llm.engines.cuda.readout import final_norm, read_out
from dynamax_llm.engines.cuda.tiles import blocks, power_of_two
from dynamax_llm.exits.features import LOG_FLOOR, LOG_SCALE, STATISTICS, TOP, ConfidenceEstimator
from dynamax_llm.exits.heads import ExitHeads, LinearBank, MlpBank, unit_rms
from dynamax_llm.exits.readout import Readout

#: Inputs of h that one program embeds, and how many programs do, at most.
SHARE, EMBEDDERS = 64, 64
#: Candidates whose logits one program makes, and half-precision columns that it multiplies at once.
ROWS, COLUMNS = 2, 4096
#: Groups of tokens that one program looks through, so many of each at once.
GROUPS, DEPTH = 8, 256
#: Places for the statistics.
PLACES = power_of_two(len(STATISTICS))
#: What the last program holds in registers: candidates, inner width, entries of the GELU layer at once.
MOST_CANDIDATES, MOST_WIDTH, HELD = 2048, 128, 8192
#: Tables may take so many bytes, or this share of the backbone's weights.
LEAST_TABLES, TABLES_SHARE = 64 << 20, 0.05
#: Rows of the LM head whose contributions are worked out at once.
SLICE = 4096


@dataclass(frozen=True)
class Rows:
    """What the exits of a batch of B rows read and write: ``thresholds`` (E, B), ``ticket`` (1,) the step's number,
    ``left`` (B,) 1 for rows that have left, ``exit_index`` (B,) where, ``words`` (E,) in the host's memory."""

    thresholds: Tensor
    ticket: Tensor
    left: Tensor
    exit_index: Tensor
    words: Tensor


class HeadCheck:
    """The heads of ``estimator`` at ``n_exits`` exits, for ``batch`` rows; what does not change is worked out
    beforehand.

    What each token's row of the LM head contributes to a head's embedding is a table (exits, 2, V, w), for the leading
    token and its runner-up: a check then reads 2 w numbers in place of 2 d w weights. The first exit's logits (B, V)
    are ``logits``, None if no check makes any. ``confidence`` (E, B) and ``values`` (E, B, F) are the last ones; rows
    that have left keep what they left with.
    """

    @staticmethod
    def obstacle(estimator: ConfidenceEstimator, readout: Readout, n_exits: int) -> str | None:
        """Why an estimator cannot be asked so; None if it can."""
        if not isinstance(estimator, ExitHeads) or not isinstance(estimator.bank, LinearBank | MlpBank):
            return "only linear and MLP heads are"
        config, backbone, width = readout.config, readout.backbone, _width(estimator)
        if width > MOST_WIDTH:
            return f"a width of {width} does not fit one program"
        if not estimator.needs_logits:
            return None
        if not TOP <= config.candidates <= MOST_CANDIDATES or config.shortlist != "pairs" or config.readout != "head":
            return "its exits do not look at a shortlist of pairs"
        tables = 2 * n_exits * backbone.vocab_size * width * 4 if estimator.uses_tokens else 0
        weights = sum(weight.nbytes for weight in backbone.model.parameters())
        if tables > max(LEAST_TABLES, TABLES_SHARE * weights):
            return f"tables of {tables} bytes are too much beside {weights} of weights"
        return None

    @torch.no_grad()
    def __init__(self, estimator: ExitHeads, readout: Readout, n_exits: int, batch: int, rows: Rows) -> None:
        bank, backbone, device = estimator.bank, readout.backbone, rows.left.device
        assert isinstance(bank, LinearBank | MlpBank)
        self.estimator, self.backbone, self.batch, self.rows = estimator, backbone, batch, rows
        self.width, self.inputs, self.linear = _width(estimator), backbone.width, isinstance(bank, LinearBank)
        self.vocabulary, self.looks = backbone.vocab_size, estimator.needs_logits
        self.sees_before = estimator.uses_statistics
        self._split(estimator, n_exits)
        groups = blocks(readout.config.candidates, 2) if self.looks else 1
        self.pairs = self.vocabulary > 2 * groups  # else every token is a candidate
        self.groups = groups if self.pairs else self.vocabulary
        self.candidates = 2 * groups if self.pairs else self.vocabulary
        self.share = max(SHARE, power_of_two(blocks(self.inputs, EMBEDDERS)))
        self.embedders = blocks(self.inputs, self.share)
        self.pickers = blocks(self.groups, GROUPS)

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.logits = buffer(batch, self.vocabulary) if self.looks else None
        self.named = buffer(batch, self.candidates, dtype=torch.int64)
        self.token = buffer(batch, dtype=torch.int64)
        self._few = buffer(batch, self.candidates)
        self._spread = buffer(batch, self.pickers, 4)
        self._parts = buffer(batch, self.embedders, blocks(self.width + 3, 4) * 4)
        self._counter = buffer(batch + 1, dtype=torch.int32)
        self.confidence, self._values = buffer(n_exits, batch), buffer(n_exits, batch, PLACES)

    @property
    def values(self) -> Tensor:
        return self._values[..., : len(STATISTICS)]

    def _split(self, estimator: ExitHeads, n_exits: int) -> None:
        """The head's first matrix, its shift and scale, in the parts that belong to h, statistics and tokens' rows."""
        bank, d, w = estimator.bank, self.inputs, self.width
        embed = bank.embed if isinstance(bank, MlpBank) else bank.weight  # (E, D, w)
        scale, shift = estimator.scale[:n_exits, 0, 0], estimator.shift[:n_exits, 0, 0]
        assert isinstance(embed, Tensor)
        first = d if estimator.uses_hidden else 0
        after = first + (len(STATISTICS) if estimator.uses_statistics else 0)
        none = embed.new_zeros(d, w)
        self.embed = [embed[exit, :d].detach() if estimator.uses_hidden else none for exit in range(n_exits)]
        self.scale = scale[:, :d].contiguous() if estimator.uses_hidden else embed.new_zeros(n_exits, d)
        constant = embed.new_zeros(n_exits, 1, w)
        if estimator.uses_hidden:
            constant = torch.bmm(shift[:, None, :d], embed[:n_exits, :d])
        if isinstance(bank, MlpBank):
            constant = constant + bank.embed_bias[:n_exits]
        self.constant = constant[:, 0].contiguous()
        bias = bank.out_bias if isinstance(bank, MlpBank) else bank.bias
        assert isinstance(bias, Tensor)
        self.offset = (bias[:n_exits, 0, 0] + estimator.prior[:n_exits]).contiguous()
        self.moments, self.observed = embed.new_zeros(n_exits, 2, PLACES), embed.new_zeros(n_exits, PLACES, w)
        if estimator.uses_statistics:
            count = after - first
            self.moments[:, 0, :count], self.moments[:, 1, :count] = scale[:, first:after], shift[:, first:after]
            self.observed[:, :count] = embed[:n_exits, first:after]
        self.tables = (
            self._contributions(embed, scale, shift, after, n_exits) if estimator.uses_tokens else self.observed
        )

    def _contributions(self, embed: Tensor, scale: Tensor, shift: Tensor, first: int, n_exits: int) -> Tensor:
        """(E, 2, V, w): of every token's row, standardised as the inputs that begin at ``first`` are."""
        head, d = self.backbone.model.get_output_embeddings().weight, self.inputs
        tables = embed.new_empty(n_exits, 2, len(head), self.width)
        for start in range(0, len(head), SLICE):
            some = unit_rms(head[start : start + SLICE])
            for exit in range(n_exits):
                for place in range(2):
                    here = slice(first + place * d, first + (place + 1) * d)
                    standard = torch.addcmul(shift[exit, here], some, scale[exit, here])
                    torch.matmul(standard, embed[exit, here], out=tables[exit, place, start : start + SLICE])
        return tables

    def ask(self, index: int, h: Tensor, before: Tensor, live: Tensor | None) -> None:
        """Who leaves by exit ``index``, given h (B, d) and h before the last layer; launches only."""
        read: Literal["all", "few", "none"] = "none" if not self.looks else "few" if index else "all"
        if read == "all":
            assert self.logits is not None
            read_out(self.backbone, h, self.logits)
        rows, bank, norm = self.rows, self.estimator.bank, final_norm(self.backbone)
        at_once = self._at_once(h.device)
        up, up_bias, out = (self.observed[index],) * 3
        if isinstance(bank, MlpBank):
            up, up_bias, out = bank.up[index], bank.up_bias[index], bank.out[index]
        pickers = {"all": self.pickers, "few": blocks(self.candidates, at_once), "none": 0}[read]
        check_kernel[self.batch, pickers + self.embedders](
            h,
            before,
            self.scale[index],
            self.embed[index],
            self.constant[index],
            self.moments[index],
            self.observed[index],
            self.tables[index],
            up,
            up_bias,
            out,
            self.offset,
            self.backbone.model.get_output_embeddings().weight,
            norm.weight,
            self._few if self.logits is None else self.logits,
            self.named,
            self._few,
            self._spread,
            self.token,
            rows.thresholds,
            index,
            rows.ticket,
            rows.left if live is None else live,
            rows.left,
            rows.exit_index,
            rows.words,
            self._parts,
            self._counter,
            self._values,
            self.confidence,
            self.batch,
            *self._sizes(read, pickers, at_once, norm),
            live is None,
            overlaps(h.device),
            **settings(h.device, 4),
        )

    def _at_once(self, device: torch.device) -> int:
        """Candidates of one program; few programs where each is interpreted."""
        return ROWS if device.type == "cuda" else 8 * ROWS

    def _sizes(self, read: str, pickers: int, at_once: int, norm: nn.Module) -> tuple:
        """The kernel's constants, from D to EPS."""
        width, inner = self.width, power_of_two(self.width)
        columns = COLUMNS * 2 // self.backbone.dtype.itemsize
        deep = min(DEPTH, power_of_two(blocks(self.vocabulary, self.groups)))
        return (
            self.inputs,
            self.vocabulary,
            self.candidates,
            self.groups,
            width,
            read,
            self.pairs,
            self.estimator.uses_tokens,
            self.linear,
            pickers,
            self.embedders,
            power_of_two(pickers),
            GROUPS,
            deep if read == "all" else at_once,
            min(columns, power_of_two(self.inputs)),
            self.share,
            inner,
            min(power_of_two(2 * width), max(HELD // inner, 1)),
            power_of_two(self.embedders),
            power_of_two(self.candidates),
            PLACES,
            power_of_two(self.batch),
            TOP,
            LOG_FLOOR,
            LOG_SCALE,
            norm.variance_epsilon,
        )


def _width(estimator: ExitHeads) -> int:
    """Outputs of a head's first matrix."""
    return estimator.bank.width if isinstance(estimator.bank, MlpBank) else 1


def head_check(
    estimator: ConfidenceEstimator, readout: Readout, n_exits: int, batch: int, rows: Rows
) -> HeadCheck | None:
    """The estimator at these exits in one kernel each; None where it is asked through PyTorch."""
    if not n_exits or HeadCheck.obstacle(estimator, readout, n_exits) is not None:
        return None
    assert isinstance(estimator, ExitHeads)
    return HeadCheck(estimator, readout, n_exits, batch, rows)
