"""The GPU engine's kernels against plain PyTorch, float32: in Triton's interpreter, or on a GPU if there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax_llm.engines.cuda.kernels.attention import attend_kernel
from dynamax_llm.engines.cuda.kernels.rows import choose_kernel
from dynamax_llm.engines.cuda.launch import add_linear, linear
from dynamax_llm.engines.cuda.passes import Pass
from dynamax_llm.engines.cuda.tiles import power_of_two, tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape).to(DEVICE)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("inputs", [64, 40])
def test_linear_norms_and_gates(vectors: int, inputs: int) -> None:
    x, w, w2, norm = randn(vectors, inputs), randn(24, inputs), randn(24, inputs), torch.rand(inputs).to(DEVICE) + 0.5
    plain, gated = torch.full((2, vectors, 24), 7.0, device=DEVICE)
    linear(x, w, plain, bias=w[:, 0].contiguous())
    linear(x, w, gated, second=w2, norm=norm, eps=EPS)
    assert torch.allclose(plain, x @ w.t() + w[:, 0], atol=1e-4)
    y = normed(x, norm)
    assert torch.allclose(gated, F.silu(y @ w.t()) * (y @ w2.t()), atol=2e-3)


@pytest.mark.parametrize("vectors", [1, 3])
def test_a_kernel_leaves_its_output_ready_for_the_next_norm(vectors: int) -> None:
    """Rows that are not live keep their h, and are made ready all the same."""
    x, w, following, norm = randn(vectors, 32), randn(24, 32), randn(16, 24), torch.rand(24).to(DEVICE) + 0.5
    h = randn(vectors, 24)
    p = Pass(1, vectors, h.clone(), torch.zeros(1, dtype=torch.int32, device=DEVICE))
    p.live[-1] = vectors == 1
    kept = torch.zeros_like(h)
    add_linear(x, w, p, norm, keep=kept)
    expected = torch.where(p.live.bool().unsqueeze(1), h + x @ w.t(), h)
    assert torch.allclose(p.h, expected, atol=1e-4) and torch.equal(kept, h)
    out = torch.zeros(vectors, 16, device=DEVICE)
    assert p.ready is not None
    linear(p.ready, following, out, eps=EPS, sums=p.sums)
    assert torch.allclose(out, normed(expected, norm) @ following.t(), atol=1e-3)


def test_linear_norms_groups() -> None:
    x, w, norm, squares = randn(1, 64), randn(16, 64), torch.rand(64).to(DEVICE), torch.rand(1, 4).to(DEVICE)
    out = torch.zeros(1, 16, device=DEVICE)
    linear(x, w, out, norm=norm, eps=EPS, sums=squares, size=32)
    factors = torch.rsqrt(squares.view(2, 2).sum(1) / 32 + EPS).repeat_interleave(32)
    assert torch.allclose(out, (x * norm * factors) @ w.t(), atol=1e-3)


@pytest.mark.parametrize(("past", "tokens", "window"), [(40, 1, 0), (21, 3, 9)])
def test_attention_over_a_cache(past: int, tokens: int, window: int) -> None:
    """Split over programs and joined; a row without a token, left padding, and a sliding window."""
    batch, queries, groups, dim, capacity, splits = 2, 4, 2, 8, 64, 3
    kv = randn(1, 2, batch, groups, capacity, dim)
    rows = batch * tokens
    q, out = randn(rows, queries, dim), torch.zeros(rows, queries, dim, device=DEVICE)
    slot = torch.tensor([[past + b + t for t in range(tokens)] for b in range(batch)], dtype=torch.int32).flatten()
    slot[0 if tokens == 1 else tokens - 1] += 0 if tokens == 1 else -slot[tokens - 1] - 1
    pad = torch.tensor([2, 0], dtype=torch.int32)
    where = torch.tensor([kv.data_ptr(), capacity, 0, 0])
    vectors = max(16, power_of_two(tokens * queries // groups))
    scratch = torch.zeros(batch * groups * splits * vectors * (dim + 2), device=DEVICE)
    counter = torch.zeros(batch * groups, dtype=torch.int32, device=DEVICE)
    sizes = (tokens, batch, dim**-0.5, window, queries, groups, dim, 16, vectors, 16, splits, False)
    slot_, pad_, where_ = (part.to(DEVICE) for part in (slot, pad, where))
    attend_kernel[batch * groups, splits](q, where_, slot_, pad_, out, scratch, counter, 0, *sizes)
    for row, place in enumerate(slot.tolist()):
        if place < 0:
            continue
        b = row // tokens
        first = max(int(pad[b]), place - window + 1 if window else 0)
        keys, values = kv[0, :, b, :, first : place + 1].repeat_interleave(queries // groups, 1)
        weights = torch.softmax((keys @ q[row].unsqueeze(-1)).squeeze(-1) * dim**-0.5, dim=-1)
        assert torch.allclose(out[row], (weights.unsqueeze(1) @ values).squeeze(1), atol=1e-5)
    assert int(counter.sum()) == 0  # the last program leaves the counters as it found them


def test_the_first_of_equal_tokens_is_chosen_and_reported() -> None:
    logits, bias = torch.zeros(2, 40, device=DEVICE), torch.zeros(40, device=DEVICE)
    logits[0, [7, 30]], logits[1, 3], bias[3] = 2.0, 9.0, -torch.inf
    ids, words = (torch.zeros(count, dtype=torch.int64, device=DEVICE) for count in (2, 4))
    ticket, exits, counter = (torch.tensor(value, dtype=torch.int32, device=DEVICE) for value in ([5], [1, 2], [0, 0]))
    found = torch.zeros(2, 4, 2, device=DEVICE)
    choose_kernel[2, 4](logits, bias, ticket, exits, ids, words, found, counter, 40, 16, 4, True, False)
    assert ids.tolist() == [7, 0]
    assert [(word >> 40, word >> 32 & 0xFF, word & 0xFFFFFFFF) for word in words[2:].tolist()] == [(5, 1, 7), (5, 2, 0)]


def test_tiles_divide_groups_and_fit_small_matrices() -> None:
    for vectors in (1, 2, 16, 100):
        for outputs, inputs in ((16, 24), (4096, 14336), (18560, 4096)):
            t = tile(outputs, inputs, vectors, torch.bfloat16, group=8 if inputs == 24 else 1024)
            assert t.rows & (t.rows - 1) == t.columns & (t.columns - 1) == 0
            assert vectors > 1 or (8 if inputs == 24 else 1024) % t.columns == 0
            assert t.vectors == 1 if vectors == 1 else 16 <= t.vectors <= 64
