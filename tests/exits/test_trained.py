"""Exits with blocks and drafts as artifacts: they come back as they were, and what is wrong with them is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest
import safetensors.torch
import torch

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.errors import (
    ArtifactCorruptError,
    ArtifactMismatchError,
    ExitPlacementError,
    PolicyMismatchError,
    UsageError,
)
from dynamax_llm.exits.artifact import MANIFEST, TENSORS, Exits
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.readouts.block import BlockReadout
from dynamax_llm.exits.readouts.draft import DraftOptions, DraftReadout
from dynamax_llm.exits.registries import READOUTS
from dynamax_llm.testing import TINY, random_ids, tiny_model
from tests.drafting import SIZES, draft_config, draft_exits, draft_weights

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
KINDS = pytest.mark.parametrize("block", ["transformer", "mamba"])


def exits_of(backbone, readout: str, block: str) -> Exits:
    """Exits with random weights in the backbone's dtype, as training leaves them, and random heads."""
    config = ExitConfig.from_options((1, 3), backbone.n_layers, head="mlp", readout=readout, **_options(block))
    config = READOUTS[readout].fitted(config, backbone)
    weights = draft_weights(config, backbone) if readout == "draft" else _blocks(config, backbone)
    torch.manual_seed(5)
    heads = ExitHeads(config, backbone.width)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter))
    return Exits.of(backbone, config, heads.requires_grad_(False).eval(), weights.to(backbone.dtype))


def _options(block: str) -> dict:
    return {"block": block, "vocabulary": 40, "candidates": 8, **SIZES}


def _blocks(config: ExitConfig, backbone) -> torch.nn.Module:
    torch.manual_seed(4)
    weights = BlockReadout.new_weights(config, backbone.width)
    for parameter in weights.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    weights.tokens = torch.randperm(backbone.vocab_size)[:40].sort().values
    return weights.requires_grad_(False)


def decided(exits: Exits, model, policy: str, threshold: float):
    out = model.generate(
        random_ids(2, 6, seed=1),
        custom_generate=EarlyExit(exits, threshold=threshold, policy=policy, window=6, adaptive=False),
        max_new_tokens=14,
        do_sample=False,
        eos_token_id=None,
    )
    return out.sequences.tolist(), out.trace.exit_index.tolist(), out.verification


@DTYPES
@KINDS
@pytest.mark.parametrize("readout", ["block", "draft"])
def test_saved_exits_decide_the_same(tmp_path, readout: str, block: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    exits = exits_of(adapt(model), readout, block)
    exits.save(tmp_path)
    loaded = Exits.from_pretrained(tmp_path)
    assert loaded.config == exits.config
    assert loaded.readout_weights.tokens.dtype == torch.int64
    for name, value in exits.readout_weights.state_dict().items():
        found = loaded.readout_weights.state_dict()[name]
        assert found.dtype == value.dtype and torch.equal(found, value), name
    policies = [("verify", 0.05)] if readout == "draft" else [("propagate", 0.5), ("defer", 0.5), ("verify", 0.5)]
    for policy, threshold in policies:
        expected = decided(exits, model, policy, threshold)
        assert decided(loaded, model, policy, threshold) == expected
        if readout == "draft":  # chains of several lengths, mostly wrong: the weights are random
            assert expected[2].drafted > expected[2].windows > 5
        else:  # tokens leave, and others do not
            assert len({index for row in expected[1] for index in row}) > 1
    assert loaded.readout(adapt(model)).vocabulary.dtype == torch.int64


def test_float32_weights_run_on_a_half_precision_backbone(tmp_path) -> None:
    exits = draft_exits(adapt(tiny_model("llama")), "mamba", 40)
    half = tiny_model("llama").to(torch.bfloat16)
    readout = exits.readout(adapt(half))
    assert {parameter.dtype for parameter in readout.weights.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in exits.readout_weights.parameters()} == {torch.float32}
    assert readout.vocabulary.dtype == torch.int64


@pytest.mark.parametrize("family", sorted(TINY))
def test_a_part_of_the_vocabulary_scores_as_the_whole_does(family: str) -> None:
    """Gathered rows of the LM head, with each family's own scaling, give the same logits."""
    backbone = adapt(tiny_model(family, layers=3))
    readout = draft_exits(backbone, "transformer", 25).readout(backbone)
    h = torch.randn(2, 3, backbone.width)
    scores = readout.scores(0, h)
    whole = backbone.readout(h)
    torch.testing.assert_close(scores, whole[..., readout.vocabulary], atol=1e-4, rtol=1e-4)
    spread = readout.logits(0, h)
    assert torch.equal(spread[..., readout.vocabulary], scores)
    assert int(spread.isinf().sum()) == 2 * 3 * (61 - 25)
    assert readout.head_macs() == 25 * backbone.width


@pytest.fixture
def saved(tmp_path):
    exits_of(adapt(tiny_model("llama")), "draft", "transformer").save(tmp_path)
    return tmp_path


def rewrite(folder, change) -> None:
    """Tensors changed by hand, and a manifest that names their hash."""
    tensors = safetensors.torch.load_file(folder / TENSORS)
    change(tensors)
    blob = safetensors.torch.save(tensors)
    (folder / TENSORS).write_bytes(blob)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["tensors_sha256"] = hashlib.sha256(blob).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_draft_of_another_backbone_is_refused(saved) -> None:
    other = tiny_model("llama", hidden_size=48)
    with pytest.raises(ArtifactMismatchError, match=r"made for another backbone: .*train exits for this one"):
        decided(Exits.from_pretrained(saved), other, "verify", 0.5)
    manifest = json.loads((saved / MANIFEST).read_text())
    (saved / MANIFEST).write_text(json.dumps({**manifest, "width": 48}))
    with pytest.raises(ArtifactCorruptError, match=r"the tensor 'draft\.\S+' has shape .*36.* describes .*48"):
        Exits.from_pretrained(saved)


def test_damaged_tensors_are_named(saved) -> None:
    def corrupt(change, match: str) -> None:
        blob, manifest = (saved / TENSORS).read_bytes(), (saved / MANIFEST).read_bytes()
        rewrite(saved, change)
        with pytest.raises(ArtifactCorruptError, match=match):
            Exits.from_pretrained(saved)
        (saved / TENSORS).write_bytes(blob)
        (saved / MANIFEST).write_bytes(manifest)

    corrupt(lambda tensors: tensors.pop("draft.block.query"), r"the tensor 'draft\.block\.query' is missing")
    corrupt(lambda tensors: tensors.pop("draft.tokens"), r"the tensor 'draft\.tokens' is missing")
    corrupt(lambda tensors: tensors["draft.tokens"][-1:].fill_(61), r"vocabulary of 40 tokens is not part of .* 61")
    corrupt(lambda tensors: tensors["draft.tokens"][:1].fill_(-1), r"vocabulary of 40 tokens is not part of .* 61")
    corrupt(lambda tensors: tensors["draft.tokens"][3:5].fill_(7), r"vocabulary is not in ascending order")
    corrupt(
        lambda tensors: tensors.update({"draft.tokens": tensors["draft.tokens"].int()}),
        r"vocabulary is of torch\.int32, not torch\.int64",
    )
    corrupt(lambda tensors: tensors["draft.mix"][0, :1].fill_(torch.nan), r"'draft\.mix' holds NaN")
    Exits.from_pretrained(saved)  # as it was
    path = saved / TENSORS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactCorruptError, match=r"exits\.safetensors is damaged"):
        Exits.from_pretrained(saved)


def test_options_that_do_not_fit_are_refused() -> None:
    backbone = adapt(tiny_model("llama"))

    def refused(match: str, error: type[Exception] = UsageError, **options) -> None:
        with pytest.raises(error, match=match):
            draft_config(backbone, **options)

    refused(r"vocabulary 62: this model has 61 tokens\. Give at most that many, or 0", vocabulary=62)
    refused(r"vocabulary 4: give at least 5 tokens, or 0 for all", vocabulary=4)
    refused(r"vocabulary -1: give at least 5 tokens", vocabulary=-1)
    refused(r"taps \(0, 3\): give depths from 1 to 5, ascending, each once", taps=(0, 3))
    refused(r"taps \(2, 6\): give depths from 1 to 5", taps=(2, 6))
    refused(r"taps \(3, 2\): give depths", taps=(3, 2))
    refused(r"taps \(2, 2\): give depths", taps=(2, 2))
    refused(r"block_window 1: give the tokens a block reaches back, at least 2", block_window=1)
    refused(r"block_heads -1: give 0 for its default, or a positive number", block_heads=-1)
    refused(r"block_kv_heads 3: give a divisor of the 4 heads", block_kv_heads=3)
    refused(r"block_head_width 7: .* even", block_head_width=7)
    refused(r"unknown block 'gru'\. Available: transformer, mamba", block="gru", error=UsageError)
    mamba = adapt(tiny_model("mamba2"))
    with pytest.raises(UsageError, match=r"block_kv_heads 5: give a divisor of the 2 heads"):  # heads from the width
        draft_config(mamba, block_heads=0, block_head_width=18, block_kv_heads=5)
    with pytest.raises(ExitPlacementError, match=r"exits after layers \(2,\): a draft is one exit, of depth 0"):
        ExitConfig((2,), 5, head=None, readout="draft", readout_options=DraftOptions(vocabulary=0))


def test_what_follows_from_the_backbone_is_filled_in() -> None:
    config = draft_config(adapt(tiny_model("llama", layers=7)), block_heads=0, block_kv_heads=0, block_head_width=0)
    options = config.readout_options
    assert (options.block_heads, options.block_kv_heads, options.block_head_width) == (6, 2, 10)
    assert options.taps == (2, 5, 7) and config.layers == (0,) and config.candidates == 0
    again = DraftReadout.fitted(config, adapt(tiny_model("llama", layers=7)))
    assert again == config and ExitConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("policy", ["propagate", "copy", "defer"])
def test_a_draft_must_be_verified(policy: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(PolicyMismatchError, match=rf"'{policy}' cannot be used with the readout 'draft'.*'verify'"):
        decided(exits_of(adapt(model), "draft", "mamba"), model, policy, 0.5)


def test_a_head_with_a_memory_cannot_read_drafts() -> None:
    backbone = adapt(tiny_model("llama"))
    with pytest.raises(UsageError, match=r"head 'mamba' with the readout 'draft'.*Use 'linear' or 'mlp'"):
        draft_config(backbone, head="mamba")
    exits = exits_of(backbone, "draft", "mamba")
    exits.config = dataclasses.replace(exits.config, head="linear")  # one without is fine
    with pytest.raises(UsageError, match=r"readout 'draft' is learned: train exits with it.*'head' or 'tail'"):
        Exits.untrained(backbone, readout="draft")
