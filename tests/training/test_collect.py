"""What one frozen forward shows of every exit: labels describe the action, memory does not depend on the data."""

from __future__ import annotations

import pytest
import torch

from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.features import exit_features
from dynamax_llm.exits.readouts.base import build_readout
from dynamax_llm.exits.readouts.lens import Lens
from dynamax_llm.testing import random_ids
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.collect import Packing, collect_exits, forward
from dynamax_llm.traces.labels import Label

LAYERS, L = (2, 3), 5
FAMILIES = pytest.mark.parametrize("family", ["mistral", "mamba2"])


def batch() -> Batch:
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 7:], mask[2, 2:] = False, False
    return Batch(random_ids(3, 12) * mask, mask)


def config(**changes) -> ExitConfig:
    return ExitConfig.from_options(**{"layers": LAYERS, "n_layers": L, "head": None, **changes})


def lens_for(backbone) -> Lens:
    lens = Lens(len(LAYERS), backbone.width, 3)
    with torch.no_grad():
        for up in lens.up:
            up.normal_(std=0.5)
    return lens


def states(backbone, ids: torch.Tensor) -> list[torch.Tensor]:
    """h before any layer and after each, one row without padding at a time."""
    h = backbone.embed(ids)
    ctx, found = backbone.context(h), [h]
    for index in range(backbone.n_layers):
        found.append(backbone.layer(index, found[-1], None, ctx))
    return found


@FAMILIES
def test_the_target_is_the_stock_models_argmax(backbone, family: str) -> None:
    adapter, one = backbone(family), batch()
    found = collect_exits(adapter, build_readout(adapter, config()), one)
    for row, length in enumerate(one.mask.sum(1).tolist()):
        with torch.no_grad():
            stock = adapter.model(one.ids[row : row + 1, :length]).logits[0].argmax(-1)
        assert torch.equal(found.target[row, :length], stock)


@FAMILIES
def test_rows_see_neither_their_pads_nor_each_other(backbone, family: str) -> None:
    adapter, one = backbone(family), batch()
    readout = build_readout(adapter, config())
    found = collect_exits(adapter, readout, one)
    for row, length in enumerate(one.mask.sum(1).tolist()):
        alone = collect_exits(adapter, readout, Batch(one.ids[[row], :length], one.mask[[row], :length]))
        assert torch.equal(found.labels[:, row, :length], alone.labels[:, 0])
        for exit in range(len(LAYERS)):
            torch.testing.assert_close(found.hidden[exit][row, :length], alone.hidden[exit][0], atol=1e-4, rtol=1e-4)
            mine, own = found.features[exit].values[row, :length], alone.features[exit].values[0]
            torch.testing.assert_close(mine, own, atol=1e-3, rtol=1e-3)


@FAMILIES
def test_exits_see_what_the_layers_made(backbone, family: str) -> None:
    adapter, one = backbone(family), batch()
    readout = build_readout(adapter, config())
    found = collect_exits(adapter, readout, one)
    with torch.no_grad():
        h = states(adapter, one.ids)
        previous = None
        for exit, layer in enumerate(LAYERS):
            torch.testing.assert_close(found.hidden[exit][one.mask], h[layer][one.mask])
            previous = exit_features(
                h[layer], h[layer - 1], readout.logits(exit, readout.transform(exit, h[layer])[0]), previous
            )
            seen = found.features[exit]
            torch.testing.assert_close(seen.values[one.mask], previous.values[one.mask], atol=1e-4, rtol=1e-4)
            assert torch.equal(seen.token[one.mask], previous.token[one.mask])


@FAMILIES
@pytest.mark.parametrize("kind", ["head", "tail", "lens"])
def test_the_label_describes_the_action(backbone, family: str, kind: str) -> None:
    adapter, one = backbone(family), batch()
    readout = build_readout(adapter, config(readout=kind, tail_layers=2), lens_for(adapter) if kind == "lens" else None)
    found = collect_exits(adapter, readout, one)
    with torch.no_grad():
        h = states(adapter, one.ids)
        full = adapter.readout(h[-1]).argmax(-1)
        ctx = adapter.context(h[0])
        for exit, layer in enumerate(LAYERS):
            taken = h[layer]
            for index in range(L - 2, L) if kind == "tail" else ():
                taken = adapter.layer(index, taken, None, ctx)
            expected = readout.logits(exit, readout.transform(exit, taken)[0]).argmax(-1) == full
            assert torch.equal(found.labels[exit][one.mask], expected[one.mask])
    assert 0 < int(found.labels[:, one.mask].sum()) < found.labels[:, one.mask].numel()


def test_the_papers_label_is_the_logit_lens_top_k(backbone) -> None:
    adapter, one = backbone("mistral"), batch()
    found = collect_exits(adapter, build_readout(adapter, config()), one, Label("topk", 4))
    with torch.no_grad():
        h = states(adapter, one.ids)
        full = adapter.readout(h[-1]).argmax(-1, keepdim=True)
        for exit, layer in enumerate(LAYERS):
            expected = (adapter.readout(h[layer]).topk(4, -1).indices == full).any(-1)
            assert torch.equal(found.labels[exit][one.mask], expected[one.mask])
    plain = collect_exits(adapter, build_readout(adapter, config()), one)
    assert bool((found.labels[:, one.mask] >= plain.labels[:, one.mask]).all())


@pytest.mark.parametrize("kind", ["action", "topk"])
def test_logits_exist_one_slice_at_a_time(backbone, monkeypatch, kind: str) -> None:
    adapter, one = backbone("mistral"), batch()
    readout = build_readout(adapter, config())
    whole = collect_exits(adapter, readout, one, Label(kind))
    sizes = []
    stock = adapter.readout
    monkeypatch.setattr(adapter, "readout", lambda h: sizes.append(h.shape[0] * h.shape[1]) or stock(h))
    monkeypatch.setattr("dynamax_llm.exits.readouts.base.LOGITS_AT_ONCE", 4 * adapter.vocab_size)
    sliced = collect_exits(adapter, readout, one, Label(kind))
    assert max(sizes) == 4
    assert torch.equal(sliced.labels, whole.labels)
    assert torch.equal(sliced.target, whole.target)


def test_an_exit_batch_holds_no_graph_and_touches_no_weight(backbone) -> None:
    adapter, one = backbone("mamba2"), batch()
    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    found = collect_exits(adapter, build_readout(adapter, config()), one)
    tensors = [*found.hidden, *(item.values for item in found.features), found.labels, found.target]
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in tensors)
    assert all(torch.equal(value, before[name]) for name, value in adapter.model.state_dict().items())


def test_forward_keeps_h_and_what_came_before_it(backbone) -> None:
    adapter, one = backbone("mistral"), batch()
    run = forward(adapter, LAYERS, one.ids)
    with torch.no_grad():
        h = states(adapter, one.ids)
    for exit, layer in enumerate(LAYERS):
        torch.testing.assert_close(run.hidden[exit], h[layer])
        torch.testing.assert_close(run.before[exit], h[layer - 1])
    torch.testing.assert_close(run.final, h[L])


def test_unpack_puts_tokens_back(backbone) -> None:
    one = batch()
    values = torch.randn(int(one.mask.sum()), 3)
    full = Packing.of(one.mask, torch.device("cpu")).unpack(values)
    assert torch.equal(full[one.mask], values)
    assert full[~one.mask].count_nonzero() == 0
