"""Drafts that read embedding and features side by side, and their export: the format's layer, written out from the file
alone, gives the draft's own logits; what the format cannot hold is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from dynamax_llm import cli
from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.errors import ArtifactError, ArtifactMismatchError, UnsupportedModelError, UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.block_kinds.transformer import TransformerBlock
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.readouts.draft import DraftReadout, DraftWeights
from dynamax_llm.exits.registries import READOUTS
from dynamax_llm.exits.speculators import export_speculators
from dynamax_llm.testing import random_ids, tiny_model
from dynamax_llm.text.sources import find_source
from dynamax_llm.traces.chains import chain
from dynamax_llm.traces.collect import hidden_at
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.trainer import train_many
from dynamax_llm.training.warm_start import start_from_last_layer
from tests.folders import backbone as byte_backbone
from tests.folders import byte_tokenizer, model_folder
from tests.training.conftest import sentences, write_jsonl

STEPS = 3


def drafted(model: torch.nn.Module, readout: str = "draft", **options: object) -> Exits:
    """Untrained exits with random norms, so that none of them is one."""
    backbone = adapt(model)
    plain = {"head": None, "vocabulary": 40, "readout": readout, **options}
    config = ExitConfig.from_options((2,), backbone.n_layers, **plain)
    kind = READOUTS.lookup(readout)
    config = kind.fitted(config, backbone)
    torch.manual_seed(3)
    weights = kind.new_weights(config, backbone.width)
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.mul_(1.0 + 0.3 * torch.rand_like(parameter))
        weights.tokens.copy_(torch.randperm(backbone.vocab_size)[:40].sort().values)
    return Exits.of(backbone, config, None, weights.requires_grad_(False).eval())


@pytest.fixture
def paired() -> tuple[torch.nn.Module, Exits]:
    model = tiny_model("llama")
    return model, drafted(model, join="concatenate", block_window=8)


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary positions of x (heads, P), as complex numbers."""
    half = x.shape[-1] // 2
    angles = position * theta ** (-torch.arange(half).double() / half)
    wide = torch.complex(x[:, :half].double(), x[:, half:].double()) * torch.exp(1j * angles)
    return torch.cat((wide.real, wide.imag), dim=-1).float()


class Layer:
    """EAGLE-3's drafting from the exported file, one token at a time."""

    def __init__(self, folder: Path) -> None:
        self.file = load_file(folder / "model.safetensors")
        self.config = json.loads((folder / "config.json").read_text())
        self.layer = self.config["transformer_layer_config"]
        self.past: list[tuple[int, Tensor, Tensor]] = []

    def get(self, name: str) -> Tensor:
        return self.file[f"layers.0.{name}.weight"]

    def features(self, tapped: list[Tensor]) -> Tensor:
        epsilon = self.layer["rms_norm_eps"]
        normed = [norm(h, self.file[f"fc_norm.{tap}.weight"], epsilon) for tap, h in enumerate(tapped)]
        return F.linear(torch.cat(normed, dim=-1), self.file["fc.weight"])

    def step(self, token: int, features: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Logits (K,) and the features of the next token, from a token and the features (d,) before it."""
        layer, epsilon, heads = self.layer, self.layer["rms_norm_eps"], self.layer["num_attention_heads"]
        groups = layer["num_key_value_heads"]
        stream = norm(features, self.get("hidden_norm"), epsilon)
        assert self.config["norm_before_residual"] and not self.config["norm_output"]
        embedded = norm(self.file["embed_tokens.weight"][token], self.get("input_layernorm"), epsilon)
        both = torch.cat((embedded, stream))
        theta = layer["rope_parameters"]["rope_theta"]
        q = turned(F.linear(both, self.get("self_attn.q_proj")).view(heads, -1), position, theta)
        k = turned(F.linear(both, self.get("self_attn.k_proj")).view(groups, -1), position, theta)
        v = F.linear(both, self.get("self_attn.v_proj")).view(groups, -1)
        self.past.append((position, k, v))
        seen = [entry for entry in self.past if entry[0] > position - layer["sliding_window"]]
        keys, values = (torch.stack([e[i] for e in seen]).repeat_interleave(heads // groups, 1) for i in (1, 2))
        weights = torch.softmax((keys * q).sum(-1) * q.shape[-1] ** -0.5, dim=0)  # (slots, heads)
        stream = stream + F.linear((weights.unsqueeze(-1) * values).sum(0).flatten(), self.get("self_attn.o_proj"))
        n = norm(stream, self.get("post_attention_layernorm"), epsilon)
        gated = F.silu(F.linear(n, self.get("mlp.gate_proj"))) * F.linear(n, self.get("mlp.up_proj"))
        stream = stream + F.linear(gated, self.get("mlp.down_proj"))
        return F.linear(norm(stream, self.file["norm.weight"], epsilon), self.file["lm_head.weight"]), stream


@torch.no_grad()
def test_the_exported_layer_gives_the_drafts_logits(paired, tmp_path: Path) -> None:
    model, exits = paired
    backbone, readout = adapt(model), exits.readout(adapt(model))
    folder = export_speculators(exits, model, tmp_path / "out", verifier="owner/name", proposals=5)
    ids = random_ids(1, 24, backbone.vocab_size)
    hidden = hidden_at(backbone, (0, *readout.taps), ids)
    tapped = [hidden[tap] for tap in readout.taps]
    checked = 0
    for fork in (1, 6, 20):  # the last beyond the window
        layer = Layer(folder)
        layer.layer["rms_norm_eps"] = 1e-5
        for position in range(1, fork + 1):  # the format has no entry for the first token
            features = layer.features([h[0, position - 1] for h in tapped])
            logits, output = layer.step(int(ids[0, position]), features, position)
        weights = readout.weights
        assert isinstance(weights, DraftWeights)
        ours = list(chain(weights, readout.taps, hidden, torch.tensor([fork]), STEPS))
        states = readout.observe(hidden[0][:, :fork], [h[:, :fork] for h in tapped], readout.initial_state(1))
        for step, (outputs, _) in enumerate(ours):
            if step:
                logits, output = layer.step(int(ids[0, fork + step]), output, fork + step)
            stepped, state = readout.transform(0, hidden[0][:, fork + step : fork + step + 1], states[0])
            states = [state]
            for mine in (outputs, stepped):
                assert float(readout.scores(0, mine).std()) > 0.1
                torch.testing.assert_close(readout.scores(0, mine)[0, 0], logits, atol=1e-4, rtol=1e-4)
                checked += 1
    assert checked == 3 * STEPS * 2


def test_names_shapes_and_maps(paired, tmp_path: Path) -> None:
    model, exits = paired
    folder = export_speculators(exits, model, tmp_path, verifier="owner/name", proposals=5, dtype=torch.bfloat16)
    file, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    attention = {"q_proj": (60, 72), "k_proj": (20, 72), "v_proj": (20, 72), "o_proj": (36, 60)}
    for name, shape in attention.items():
        assert file[f"layers.0.self_attn.{name}.weight"].shape == shape
    assert file["fc.weight"].shape == (36, 3 * 36) and file["fc.weight"].dtype == torch.bfloat16
    tokens = exits.readout_weights.tokens
    assert torch.equal(torch.arange(40) + file["d2t"], tokens) and torch.equal(file["t2d"].nonzero()[:, 0], tokens)
    assert len(file["t2d"]) == model.config.vocab_size and file["t2d"].dtype == torch.bool
    assert torch.equal(file["lm_head.weight"].float(), model.lm_head.weight[tokens].bfloat16().float())
    assert config["speculators_model_type"] == "eagle3" and config["draft_vocab_size"] == 40
    assert config["eagle_aux_hidden_state_layer_ids"] == list(exits.config.readout_options.taps)
    assert config["fc_norm"] and config["target_hidden_size"] == 36
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": "owner/name",
        "architectures": ["LlamaForCausalLM"],
    }
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5
    layer = config["transformer_layer_config"]
    assert (layer["layer_types"], layer["sliding_window"], layer["head_dim"]) == (["sliding_attention"], 8, 10)
    whole = drafted(model, join="concatenate", block_window=512)
    whole = dataclasses.replace(whole, readout_weights=whole.readout_weights)
    whole.readout_weights.tokens = None
    other = export_speculators(whole, model, tmp_path / "whole", verifier="x")
    config, file = json.loads((other / "config.json").read_text()), load_file(other / "model.safetensors")
    assert config["draft_vocab_size"] == model.config.vocab_size and not {"d2t", "t2d"} & set(file)
    assert config["transformer_layer_config"]["sliding_window"] is None


def test_what_the_format_cannot_hold_is_refused(paired, tmp_path: Path) -> None:
    model, exits = paired
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"join='matrix' has no exact form in EAGLE-3.*join='concatenate'"):
        export_speculators(drafted(model), model, out, verifier="x")
    with pytest.raises(UsageError, match="block 'mamba': the format has transformer layers only"):
        export_speculators(drafted(model, block="mamba"), model, out, verifier="x")
    with pytest.raises(UsageError, match="readout 'block': only a draft"):
        export_speculators(drafted(model, "block"), model, out, verifier="x")
    with pytest.raises(ArtifactMismatchError, match="another backbone"):
        export_speculators(exits, tiny_model("llama", seed=1), out, verifier="x")
    mamba = tiny_model("mamba2")
    with pytest.raises(UnsupportedModelError, match="'mamba2': EAGLE-3 folders are for llama, mistral"):
        export_speculators(drafted(mamba, join="concatenate"), mamba, out, verifier="x")
    with pytest.raises(UsageError, match="proposals 0"):
        export_speculators(exits, model, out, verifier="x", proposals=0)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(ArtifactError, match=r"holds something else \(mine\.txt\)"):
        export_speculators(exits, model, out, verifier="x")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    with pytest.raises(UsageError, match="join 'sideways': give one of matrix, concatenate"):
        drafted(model, join="sideways")
    with pytest.raises(UsageError, match="join 'concatenate' with the block 'mamba'"):
        drafted(model, join="concatenate", block="mamba")


@pytest.mark.parametrize("batch", [1, 3])
def test_a_paired_draft_is_exact_and_its_rows_are_their_own(paired, batch: int) -> None:
    model, exits = paired
    ids = random_ids(batch, 9, model.config.vocab_size)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **options)
    early = EarlyExit(exits, policy="verify", measure="softmax_max", threshold=0.0, window=4)
    out = model.generate(ids, custom_generate=early, **options)
    assert torch.equal(out.sequences, plain) and out.verification.windows > 2
    readout, backbone = exits.readout(adapt(model)), adapt(model)
    hidden = hidden_at(backbone, (0, *readout.taps), ids[:1, 4:])
    alone = readout.observe(hidden[0], [hidden[tap] for tap in readout.taps], readout.initial_state(1))
    pads = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    padded = {depth: F.pad(h, (0, 0, 2, 0), value=0.7) for depth, h in hidden.items()}
    beside = readout.observe(padded[0], [padded[tap] for tap in readout.taps], readout.initial_state(1), pads)
    new = hidden[0][:, :1]
    outputs = [readout.transform(0, new, states[0])[0] for states in (alone, beside)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["matrix transformer", "concatenate transformer", "matrix mamba"])
def test_chains_over_texts_are_the_steps_of_decoding(kind: str) -> None:
    model, (join, block) = tiny_model("mistral"), kind.split()
    exits, backbone = drafted(model, join=join, block=block, block_window=7), adapt(model)
    readout = exits.readout(backbone)
    assert isinstance(readout.weights, DraftWeights)
    ids = random_ids(2, 40, backbone.vocab_size)
    hidden = hidden_at(backbone, (0, *readout.taps), ids)
    forks = torch.tensor([4, 20])  # a Mamba block's lie 16 apart
    chains = [outputs for outputs, _ in chain(readout.weights, readout.taps, hidden, forks, STEPS)]
    for place, fork in enumerate(forks.tolist()):
        tapped = [hidden[tap][:, :fork] for tap in readout.taps]
        state = readout.observe(hidden[0][:, :fork], tapped, readout.initial_state(2))[0]
        for step, outputs in enumerate(chains):
            output, state = readout.transform(0, hidden[0][:, fork + step : fork + step + 1], state)
            torch.testing.assert_close(output[:, 0], outputs[:, place], atol=1e-4, rtol=1e-4)


def test_a_paired_draft_learns(tmp_path: Path) -> None:
    backbone, layers = adapt(byte_backbone("llama")), (0,)
    config = ExitConfig.from_options(layers, 5, readout="draft", join="concatenate", vocabulary=0, inputs=("hidden",))
    sizes = {"max_tokens": 9000, "sequence": 64, "batch_tokens": 512, "draft_steps": 2, "block_lr": 3e-3}
    settings = TrainSettings(**sizes, eval_tokens=500, quiet=True)
    source = find_source(write_jsonl(tmp_path / "text.jsonl", sentences(200)))
    losses = train_many(backbone, byte_tokenizer(), source, {"a": config}, settings, tmp_path / "out")["a"]
    before, after = (losses.provenance["readout_losses"][when] for when in ("before", "after"))
    assert len(before) == 2 and all(new < 0.8 * old for new, old in zip(after, before, strict=True))
    loaded = Exits.from_pretrained(tmp_path / "out" / "a")
    assert loaded.config.readout_options.join == "concatenate"


def test_a_paired_block_starts_from_the_last_layer() -> None:
    backbone = adapt(tiny_model("llama"))
    config = ExitConfig.from_options(
        (0,), backbone.n_layers, readout="draft", join="concatenate", vocabulary=0, head=None
    )
    block = DraftReadout.new_weights(DraftReadout.fitted(config, backbone), backbone.width).block
    assert isinstance(block, TransformerBlock) and start_from_last_layer(block, backbone)
    layer = backbone.layers[-1]
    x = torch.randn(1, 4, backbone.width)
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    wanted = layer.self_attn.q_proj(layer.input_layernorm.weight * unit) * 1.4
    torch.testing.assert_close(F.linear(block._read(torch.cat((x, x), dim=-1))[0], block.query), wanted)
    assert torch.equal(block.feed_forward.down, layer.mlp.down_proj.weight)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = byte_backbone("llama")
    drafted(model, join="concatenate", block_window=8).save(tmp_path / "draft")
    drafted(model).save(tmp_path / "matrix")
    words = ["export", str(model_folder()), "--exits", str(tmp_path / "draft"), "--out", str(tmp_path / "out")]
    assert cli.run([*words, "--proposals", "2"]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "an EAGLE-3 draft in the format of speculators" in shown and "not run in any engine" in shown
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == str(model_folder())
    words[3], words[5] = str(tmp_path / "matrix"), str(tmp_path / "new")
    assert cli.run(words) == 2 and "Train one with join='concatenate'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert cli.run([*words, "--format", "gguf"]) == 2 and "give one of speculators" in capsys.readouterr().err
