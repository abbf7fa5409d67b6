"""Law 3, with a backbone that does nothing but remember: each layer's state holds every kept token once, in order,
under every policy that accounts for skipped layers, whatever was drafted, taken back and replayed in between."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from dynamax_llm.backbones.base import Backbone, Context, Costs, LayerCost
from dynamax_llm.decoding.request import Request
from dynamax_llm.decoding.sampler import RequestSampler
from dynamax_llm.decoding.session import Session
from dynamax_llm.decoding.thresholds import Thresholds
from dynamax_llm.engines.eager import EagerEngine
from dynamax_llm.engines.eager.session import EagerSession
from dynamax_llm.engines.plan import POLICIES, ExitPlan
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.readout import Readout
from dynamax_llm.testing import ScriptedConfidence
from tests.laws.conftest import left_padding, pattern
from tests.stepping import Stepper

LAYERS, EXITS, VOCAB, PROMPT = 6, (1, 3, 5), 53, 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=1, vocab_size=VOCAB, model_type="memory")
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(LAYERS))
        self.embedding = nn.Embedding(VOCAB, 1)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


class Memory(Backbone):
    """h is the token's id. A layer appends it to its K/V and folds it into its SSM state: count, and a hash of the
    sequence. Pads fold into nothing."""

    def _find_layers(self) -> nn.ModuleList:
        return self.model.layers

    def _find_kinds(self) -> tuple[str, ...]:
        return ("hybrid", "mamba", "attention", "none", "hybrid", "mamba")

    def embed(self, ids):
        return ids.unsqueeze(-1).float()

    def context(self, h, *, past=0, padding=None, embedded=None) -> Context:
        return Context(padding=None if padding is None else padding[:, past:])

    def layer(self, index, h, cache, ctx):
        if self.kinds[index] in ("attention", "hybrid"):
            cache.update(h.unsqueeze(1), h.unsqueeze(1), index)
        if self.kinds[index] in ("mamba", "hybrid"):
            state = cache.get_recurrent_state(index)
            cache.update_conv_state(h.transpose(1, 2), index, conv_kernel_size=2)
            state = h.new_zeros(len(h), 2) if state is None else state
            for place in range(h.shape[1]):
                real = torch.ones(len(h), 1) if ctx.padding is None else ctx.padding[:, [place]]
                after = torch.cat((state[:, :1] + 1, (state[:, 1:] * 31 + h[:, place] + 1) % 10007), dim=1)
                state = torch.where(real.bool(), after, state)
            cache.update_recurrent_state(state, index)
        return h

    def update_state(self, index, h, cache, ctx) -> None:
        self.layer(index, h, cache, ctx)

    def final_norm(self, h):
        return h

    def readout(self, h):
        return nn.functional.one_hot((h.squeeze(-1).long() * 7 + 3) % VOCAB, VOCAB).float()

    def costs(self) -> Costs:
        return Costs(tuple(LayerCost(1, 1) for _ in range(LAYERS)), 1)


class Erring(Readout):
    """Every third proposal is another token."""

    calls = 0

    def logits(self, exit, h):
        self.calls += 1
        return super().logits(exit, h).roll(int(self.calls % 3 == 0), dims=-1)


def plan(policy: str, moves: torch.Tensor, backbone: Memory, window: int) -> ExitPlan:
    readout = Erring(backbone, ExitConfig(EXITS, LAYERS, head=None, candidates=0))
    return ExitPlan(EXITS, ScriptedConfidence(moves), readout, POLICIES[policy], window)


def check(engine: EagerSession, texts: list[list[int]]) -> None:
    """Every layer remembers exactly the rows' texts."""
    cache, padding = engine.cache, engine.padding
    for index, kind in enumerate(engine.backbone.kinds):
        for row, text in enumerate(texts):
            if kind in ("attention", "hybrid"):
                layer = cache.layers[index]
                held = layer.kv.buffer[layer.kv_slot, 0, row, 0, : layer.length, 0]
                real = held if padding is None else held[padding[row].bool()]
                assert real.int().tolist() == text
            if kind in ("mamba", "hybrid"):
                digest = 0.0
                for token in text:
                    digest = (digest * 31 + token + 1) % 10007
                assert cache.get_recurrent_state(index)[row].tolist() == [len(text), digest]
                assert int(cache.get_conv_state(index)[row, 0, -1]) == text[-1]


def prompts(batch: int) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    ids = torch.randint(1, VOCAB, (batch, PROMPT), generator=torch.Generator().manual_seed(2))
    padding = left_padding(batch, PROMPT)
    return ids, padding, [row[mask.bool()].tolist() for row, mask in zip(ids, padding, strict=True)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("policy", ["propagate", "defer"])
def test_every_token_once(policy: str, batch: int) -> None:
    ids, padding, texts = prompts(batch)
    backbone, more = Memory(Model()), torch.arange(1, 31).expand(batch, -1)
    decoder = Stepper(backbone, plan(policy, pattern(batch, 30, 3, seed=batch), backbone, 7), padding)
    decoder.prefill(ids)
    for place in range(30):
        decoder.step(more[:, [place]], [0.5] * 3)
    if policy == "defer" and decoder.engine.pending():
        decoder.engine.catch_up()
    check(decoder.engine, [text + more[0].tolist() for text in texts])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("window", [2, 5, 16])
@pytest.mark.parametrize("copies", [True, False])
def test_every_kept_token_once_under_verify(
    copies: bool, window: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every window, in every row: its accepted text up to the newest token, which has not been read yet; with
    a copy of the state before every drafted token, and with one per window."""
    if not copies:
        monkeypatch.setattr("dynamax_llm.engines.eager.journal.COPY_LIMIT", 0)
    ids, padding, texts = prompts(batch)
    backbone = Memory(Model())
    moves = torch.where(pattern(batch, 200, 9, seed=3) < 8, pattern(batch, 200, 2, seed=4), 3)  # mostly drafts
    engine = EagerEngine().open(backbone, plan("verify", moves, backbone, window), batch)
    criteria = StoppingCriteriaList([MaxLengthCriteria(PROMPT + 40)])
    request = Request(ids, LogitsProcessorList(), criteria, GenerationConfig(do_sample=False))
    run = Session(engine, Thresholds.parse(0.5, 3), RequestSampler(request))
    windows, keep = [], engine.keep

    def keep_and_check(counts: list[int]) -> None:
        keep(counts)
        if not any(row.ended for row in run.rows):
            check(engine, [text + row.tokens[:-1] for text, row in zip(texts, run.rows, strict=True)])
            windows.append(list(counts))

    monkeypatch.setattr(engine, "keep", keep_and_check)
    run.fill(ids, padding, engine.prefill(ids, padding), 40)
    while run.live:
        run.step()
    assert len(windows) >= 3 and run.verification.corrected >= 3
    assert window == 2 or engine.stats().replayed > 0
    assert batch == 1 or window == 2 or any(len(set(counts)) > 1 for counts in windows)  # rows out of step
    for row in run.rows:
        new = row.ids[0, PROMPT - 1 :].tolist()
        assert [(token * 7 + 3) % VOCAB for token in new[:-1]] == new[1:]
