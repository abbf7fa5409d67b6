"""The contract of blocks, on every kind: causal, cut anywhere, pads unseen, rows apart, forks faithful."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.block_kinds.base import Block, BlockShape
from dynamax_llm.exits.registries import BLOCKS
from dynamax_llm.exits.state import State
from dynamax_llm.testing import random_ids, tiny_model
from tests.drafting import draft_exits
from tests.exits.pages import page, registered

#: Grouped heads, and a window that is much shorter than the text.
SHAPE = BlockShape.of(24, heads=4, kv_heads=2, head_width=6, inner=20, window=7)
#: No grouping, and a window longer than the text.
WIDE = dataclasses.replace(SHAPE, kv_heads=4, window=64)
KINDS = pytest.mark.parametrize("kind", ["transformer", "mamba", "mean"])
SHAPES = pytest.mark.parametrize("shape", [SHAPE, WIDE], ids=["short-window", "long-window"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
COUNT = 41


@pytest.fixture(autouse=True)
def pages():
    with registered("add-a-block.md"):
        yield


def block_of(kind: str, shape: BlockShape = SHAPE, dtype: torch.dtype = torch.float32) -> Block:
    """A block whose parts all matter: its outputs are far from its inputs."""
    torch.manual_seed(3)
    block = BLOCKS[kind](shape)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.endswith(("out", "down")):
                parameter.mul_(10.0)
            elif "norm" in name or "bias" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return block.to(dtype).requires_grad_(False)


def text(batch: int = 3, count: int = COUNT, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, SHAPE.width, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> None:
    """Equal up to rounding: half precision rounds at every product."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    tolerance = 2e-5 if found.dtype == torch.float32 else 0.05
    scale = max(1.0, float(expected.float().abs().max()))
    assert float((found.float() - expected.float()).abs().max()) < tolerance * scale


def same_state(found: State, expected: State, dtype: torch.dtype = torch.float32) -> bool:
    """States that later tokens cannot tell apart: of attention, slots without a token may hold anything. Fails at the
    first tensor that differs."""
    assert len(found) == len(expected)
    masks = [part for part in expected if part.dtype == torch.bool]
    for part, other in zip(found, expected, strict=True):
        if not part.is_floating_point():
            assert torch.equal(part, other)
        elif masks:
            seen = masks[0].unflatten(-1, (-1, 1, 1))
            close((part * seen).to(dtype), (other * seen).to(dtype))
        else:
            close(part.to(dtype), other.to(dtype))
    return True


@KINDS
@SHAPES
@DTYPES
def test_a_text_may_be_cut_anywhere(kind: str, shape: BlockShape, dtype: torch.dtype) -> None:
    block, x = block_of(kind, shape, dtype), text().to(dtype)
    whole, end = block(x, block.initial_state(3, "cpu"))
    assert float((whole - x).float().abs().mean()) > 0.2
    for cuts in ([1] * COUNT, [1, 2, 5, 30, 3], [40, 1], [17, 24]):
        state, parts, start = block.initial_state(3, "cpu"), [], 0
        for length in cuts:
            out, state = block(x[:, start : start + length], state)
            parts.append(out)
            start += length
        assert start == COUNT
        close(torch.cat(parts, dim=1), whole)
        assert same_state(state, end, dtype)


@KINDS
def test_a_block_is_causal_and_remembers(kind: str) -> None:
    block, x = block_of(kind), text()
    whole, _ = block(x, block.initial_state(3, "cpu"))
    other = x.clone()
    other[:, 20] += 1.0
    changed, _ = block(other, block.initial_state(3, "cpu"))
    reach = (changed - whole).abs().amax((0, 2))
    assert float(reach[:20].max()) == 0.0
    assert float(reach[21:25].min()) > 1e-3
    if kind == "transformer":  # a window of 7: token 26 is the last that sees token 20
        assert float(reach[26]) > 1e-4 and float(reach[27:].max()) < 1e-5


@KINDS
@DTYPES
def test_left_pads_change_nothing(kind: str, dtype: torch.dtype) -> None:
    block, x = block_of(kind, SHAPE, dtype), text().to(dtype)
    pads = (0, 1, 9)  # the last more than a window
    mask = (torch.arange(COUNT) >= torch.tensor(pads).unsqueeze(1)).long()
    out, state = block(x, block.initial_state(3, "cpu"), mask)
    updated = block.update(x, block.initial_state(3, "cpu"), mask)
    assert same_state(updated, state, dtype)
    more = text(3, 5, seed=1).to(dtype)
    after, _ = block(more, state)
    for row, count in enumerate(pads):
        alone, end = block(x[[row], count:], block.initial_state(1, "cpu"))
        close(out[[row], count:], alone)
        assert same_state(tuple(part[[row]] for part in state), end, dtype)
        close(after[[row]], block(more[[row]], end)[0])


@KINDS
@SHAPES
@DTYPES
def test_an_update_leaves_the_state_of_a_pass(kind: str, shape: BlockShape, dtype: torch.dtype) -> None:
    block, x = block_of(kind, shape, dtype), text().to(dtype)
    _, before = block(x[:, :11], block.initial_state(3, "cpu"))
    for length in (1, 2, 6, 30):
        _, expected = block(x[:, 11 : 11 + length], before)
        assert same_state(block.update(x[:, 11 : 11 + length], before), expected, dtype)


@KINDS
@SHAPES
@DTYPES
def test_rows_keep_unequal_counts(kind: str, shape: BlockShape, dtype: torch.dtype) -> None:
    block, x = block_of(kind, shape, dtype), text().to(dtype)
    _, before = block(x[:, :4], block.initial_state(3, "cpu"))
    for counts in ([1, 9, 4], [12, 12, 1], [2, 1, 3]):
        found = block.update(x[:, 4:16], before, counts=torch.tensor(counts))
        for row, count in enumerate(counts):
            alone = block.update(x[[row], 4 : 4 + count], tuple(part[[row]] for part in before))
            assert same_state(tuple(part[[row]] for part in found), alone, dtype)


@KINDS
@SHAPES
@DTYPES
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_forks_are_passes_that_went_another_way(kind: str, shape: BlockShape, dtype: torch.dtype, seed: int) -> None:
    """Outputs at forks, and over further tokens of each fork's own: more of them than the short window holds."""
    block, x = block_of(kind, shape, dtype), text(2).to(dtype)
    forks = block.forks(COUNT, 5, torch.Generator().manual_seed(seed))
    assert int(forks.min()) >= 0 and int(forks.max()) < COUNT and len(forks) > 1
    steps, own = 9, text(2 * len(forks), 9, seed=5).to(dtype).unflatten(0, (2, -1))  # (B, F, steps, d)
    first, fork = block.fork(x, forks)
    found = [fork.step(own[:, :, step]) for step in range(steps)]
    for number, place in enumerate(forks.tolist()):
        out, state = block(x[:, : place + 1], block.initial_state(2, "cpu"))
        close(first[:, number], out[:, -1])
        expected, _ = block(own[:, number], state)
        close(torch.stack([step[:, number] for step in found], dim=1), expected)


@KINDS
def test_forks_lie_apart_as_asked_and_begin_anywhere(kind: str) -> None:
    block = block_of(kind)
    step = {"transformer": 5, "mamba": 16, "mean": 5}[kind]  # of a state-space block: ends of chunks
    starts = set()
    for seed in range(40):
        forks = block.forks(100, 5, torch.Generator().manual_seed(seed))
        assert forks.diff().unique().tolist() == [step]
        assert int(forks[-1]) + step >= 100 > int(forks[-1])
        starts.add(int(forks[0]))
    assert starts <= set(range(step)) and len(starts) > step // 2
    assert block.forks(1, 5, torch.Generator().manual_seed(0)).tolist() == [0]


@KINDS
def test_rows_do_not_see_each_other(kind: str) -> None:
    block, x = block_of(kind), text()
    out, state = block(x, block.initial_state(3, "cpu"))
    for row in range(3):
        alone, end = block(x[[row]], block.initial_state(1, "cpu"))
        close(out[[row]], alone)
        assert same_state(tuple(part[[row]] for part in state), end)


@KINDS
def test_gradients_reach_every_weight(kind: str) -> None:
    block = block_of(kind).requires_grad_(True)
    forks = block.forks(COUNT, 8, torch.Generator().manual_seed(0))
    outputs, fork = block.fork(text(), forks)
    fork.step(outputs).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


def test_blocks_have_about_as_many_weights_and_count_their_products() -> None:
    shape = BlockShape.of(192)
    assert (shape.heads, shape.kv_heads, shape.head_width, shape.inner) == (3, 1, 64, 512)
    sizes = {}
    for kind in ("transformer", "mamba"):
        block = BLOCKS[kind](shape)
        matrices = sum(parameter.numel() for parameter in block.parameters() if parameter.dim() == 2)
        sizes[kind] = matrices
        extra = {"transformer": 0, "mamba": 3 * 2 * 192 * 64 - block.skip.numel() if kind == "mamba" else 0}[kind]
        assert block.macs() == matrices + extra
        assert 0 < block.update_macs() < block.macs()
    assert sizes["transformer"] == shape.size
    assert sizes["mamba"] == pytest.approx(sizes["transformer"], rel=0.02)


def test_a_block_from_outside_drafts(tmp_path) -> None:
    """Registered by the page, it is saved, loaded and verified like any other."""
    assert BLOCKS["mean"] is page("add-a-block.md").MeanBlock
    model = tiny_model("llama")
    draft_exits(adapt(model), "mean", 40).save(tmp_path)
    exits = Exits.from_pretrained(tmp_path)
    assert type(exits.readout_weights.block).__name__ == "MeanBlock"
    early = EarlyExit(exits, measure="softmax_max", threshold=0.0, policy="verify", adaptive=False, window=5)
    ids, request = random_ids(2, 6), {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    out = model.generate(ids, custom_generate=early, **request)
    assert out.sequences.tolist() == model.generate(ids, **request).tolist()
    assert out.verification.drafted > 20
