"""Rows of a StackedCache enter, leave and move, and each goes on as if it had always been alone."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone, StackedCache
from dynamax_llm.testing import random_ids
from tests.laws.conftest import Case
from tests.laws.test_families import run, same


def filled(backbone: Backbone, ids: Tensor) -> StackedCache:
    """A cache that holds the tokens ids (B, T)."""
    cache = backbone.new_cache()
    run(backbone, ids, cache)
    return cache


def alone(backbone: Backbone, ids: Tensor, last: int) -> Tensor:
    """Logits of the last ``last`` tokens of one sequence ids (T,) in a batch of its own."""
    return backbone.readout(run(backbone, ids[None], None))[0, -last:]


def go_on(backbone: Backbone, more: Tensor, cache: StackedCache, padding: Tensor) -> Tensor:
    """Logits (B, T, V) of tokens more (B, T), one at a time; padding (B, past + T)."""
    past = padding.shape[1] - more.shape[1]
    return torch.cat(
        [
            backbone.readout(
                run(backbone, more[:, [i]], cache, past=past + i, padding=padding[:, : past + i + 1].contiguous())
            )
            for i in range(more.shape[1])
        ],
        dim=1,
    )


@torch.no_grad()
def test_rows_put_from_other_caches_go_on_as_alone(case: Case) -> None:
    """Three prompts of other lengths, each prefilled in a batch of one, share a cache that had no rows."""
    backbone, prompts = case.backbone, [random_ids(1, length, seed=length)[0] for length in (4, 9, 6)]
    cache, more = backbone.new_cache(rows=3), random_ids(3, 5, seed=7)
    padding = torch.zeros(3, 9 + 5, dtype=torch.long)
    padding[:, 9:] = 1
    for row, prompt in enumerate(prompts):
        start = 9 - len(prompt) if row == 0 else 0  # at the end of the slots, or with a hole after the prompt
        cache.put_row(row, filled(backbone, prompt[None]), start=start)
        padding[row, start : start + len(prompt)] = 1
    cache.set_length(0, backbone.n_layers, 9)
    found = go_on(backbone, more, cache, padding)
    for row, prompt in enumerate(prompts):
        assert same(found[row], alone(backbone, torch.cat((prompt, more[row])), 5))


@torch.no_grad()
def test_a_released_row_serves_a_longer_prompt(case: Case) -> None:
    """A row of a running batch is cleared and filled with a prompt longer than the K/V buffer; the others go on."""
    backbone, first, more = case.backbone, random_ids(2, 5), random_ids(2, 3, seed=4)
    cache, late = filled(backbone, first), random_ids(1, 300, seed=5)[0]
    cache.clear_row(1)
    assert all(bool((part[:, 1] == 0).all()) for part in cache.recurrent_parts(0, backbone.n_layers))
    batch = torch.stack((late.flip(0), late))
    cache.put_row(1, filled(backbone, batch), other_row=1)
    padding = torch.zeros(2, 303, dtype=torch.long)
    padding[0, :5] = padding[1, :300] = padding[:, 300:] = 1
    found = go_on(backbone, more, cache, padding)
    assert same(found[0], alone(backbone, torch.cat((first[0], more[0])), 3))
    assert same(found[1], alone(backbone, torch.cat((late, more[1])), 3))


@torch.no_grad()
def test_selected_rows_go_on_as_alone(case: Case) -> None:
    backbone, ids, more, rows = case.backbone, random_ids(3, 6), random_ids(3, 3, seed=1), torch.tensor([2, 0, 2])
    cache = filled(backbone, ids)
    cache.select_rows(rows)
    found = go_on(backbone, more, cache, torch.ones(3, 9, dtype=torch.long))
    for place, row in enumerate(rows.tolist()):
        assert same(found[place], alone(backbone, torch.cat((ids[row], more[place])), 3))


@torch.no_grad()
def test_a_compacted_cache_goes_on(case: Case) -> None:
    """Slots that no row needs are dropped; what follows is the same."""
    backbone, more = case.backbone, random_ids(2, 3, seed=2)
    short, long = (random_ids(1, length, seed=length)[0] for length in (3, 5))
    cache, padding = backbone.new_cache(rows=2), torch.zeros(2, 20, dtype=torch.long)
    for row, (prompt, start) in enumerate(((short, 12), (long, 2))):
        cache.put_row(row, filled(backbone, prompt[None]), start=start)
        padding[row, start : start + len(prompt)] = 1
    cache.set_length(0, backbone.n_layers, 20)
    padding = cache.compact(padding)
    assert padding.tolist() == [[0, 0, 1, 1, 1], [1] * 5]
    assert all(cache.length(i) == 5 for i, kind in enumerate(backbone.kinds) if kind in ("attention", "hybrid"))
    found = go_on(backbone, more, cache, torch.cat((padding, torch.ones(2, 3, dtype=torch.long)), 1))
    for row, prompt in enumerate((short, long)):
        assert same(found[row], alone(backbone, torch.cat((prompt, more[row])), 3))
