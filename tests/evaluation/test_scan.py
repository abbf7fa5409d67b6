"""A scan against brute force: agreement per layer, oracle, margin rule, costs; its verdict, its files, its refusals."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
import torch

import dynamax_llm as dx
from dynamax_llm import cli
from dynamax_llm.backbones import adapt
from dynamax_llm.cli.scan import scan as scan_command
from dynamax_llm.engines.plan import POLICIES
from dynamax_llm.errors import BackboneError, DataError, ExitPlacementError, UsageError
from dynamax_llm.evaluation.scan import collect
from dynamax_llm.evaluation.scan.collect import gather
from dynamax_llm.evaluation.scan.document import LEAST_COUNTED, Drift, Scan, verdict
from dynamax_llm.evaluation.scan.estimator import cross_fitted, logistic
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.readouts.base import build_readout
from dynamax_llm.progress import TokenBar
from dynamax_llm.report.scanned import check_target, write_scan
from dynamax_llm.testing import tiny_model, zero_tail
from dynamax_llm.traces.curves import auroc
from tests.folders import backbone, byte_tokenizer, corpus, model_folder

SETTINGS = dx.ScanSettings(tokens=1200, sequence=64, batch_tokens=512, candidates=0, layer_tokens=5000, quiet=True)


def scanned(model: torch.nn.Module, exits: str = "2,3,4", **changes: object) -> Scan:
    settings = dx.ScanSettings(**{**vars(SETTINGS), **changes})
    return dx.scan(adapt(model), byte_tokenizer(), dx.find_source(corpus()), exits, settings)


@pytest.fixture(scope="module", params=["llama", "mamba2"])
def pair(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, Scan]:
    model = backbone(request.param)
    return model, scanned(model)


@torch.no_grad()
def stock(model: torch.nn.Module) -> torch.Tensor:
    """Logits (L, N, V) after every layer, from the stock model's own hidden states, chunk by chunk."""
    found = []
    for chunk in gather(dx.find_source(corpus()), byte_tokenizer(), SETTINGS, SETTINGS.sequence):
        out = model(torch.tensor([chunk.ids]), output_hidden_states=True, use_cache=False)
        # Stock models list h before the first layer (Transformers) or do not, and end with h normalised.
        first = len(out.hidden_states) - 5 if model.config.model_type == "llama" else 0
        inner = [adapt(model).readout(h)[0] for h in out.hidden_states[first : first + 4]]
        found.append(torch.stack([*inner, out.logits[0].float()]))
    return torch.cat(found, dim=1)


def test_layers_oracle_and_margin_are_those_of_the_stock_model(pair):
    model, found = pair
    logits = stock(model)
    agrees = logits.argmax(-1)[:-1] == logits.argmax(-1)[-1]
    assert found.data.tokens == agrees.shape[1] >= 1200
    for layer, truth in zip(found.layers, agrees, strict=True):
        assert layer.agreement.value == pytest.approx(float(truth.float().mean()), abs=2e-3)
        assert layer.agreement.low <= layer.agreement.value <= layer.agreement.high
    depths = torch.arange(1, 6).double() / 5
    every = torch.cat((agrees, torch.ones(1, agrees.shape[1], dtype=torch.bool))).int().argmax(0)
    assert found.oracle.every_layer.value == pytest.approx(float(depths[every].mean()), abs=2e-3)
    top = logits[1:4].softmax(-1).topk(2).values
    margin, labels = top[..., 0] - top[..., 1], agrees[1:4]
    for point in found.points[:3]:
        assert point.rule == "softmax_margin"
        assert point.agreement.value >= point.target - 1e-9
        assert sum(point.left) == found.data.tokens
        if point.threshold is None:
            assert point.left[-1] == found.data.tokens
            continue
        left = torch.cat((margin >= point.threshold - 1e-6, torch.ones_like(labels[:1]))).int().argmax(0)
        assert point.depth.value == pytest.approx(float(depths[1:][left].mean()), abs=3e-3)
        assert point.checks == pytest.approx(float((left + 1).clamp(max=3).double().mean()), abs=1e-2)


def test_savings_are_counted_with_every_cost(pair):
    model, found = pair
    costs = adapt(model).costs()
    kinds = {"llama": "copy", "mamba2": "stale"}
    policies = ["propagate", kinds[model.config.model_type], "defer"]
    assert list(dict.fromkeys(reach.policy for reach in found.reaches)) == policies
    margin = found.points[1]
    for name in policies:
        reach = next(r for r in found.reaches if (r.policy, r.rule, r.target) == (name, "softmax_margin", 0.98))
        spent = 0.0
        for index, (count, depth) in enumerate(zip(margin.left, (2, 3, 4, 5), strict=True)):
            looks = min(index + 1, 3) * costs.readout
            layers = costs.depth(5) if name == "defer" else costs.depth(depth)
            layers += costs.skipped(depth, 5) if POLICIES.lookup(name).updates_state else 0
            spent += count * (layers + looks + (costs.readout if depth == 5 else 0))
        assert reach.counted_reduction == pytest.approx(1 - spent / (costs.total * found.data.tokens))
        assert reach.pass_reduction == pytest.approx(1 - margin.depth.value)


def test_layers_that_add_nothing_are_found():
    model = tiny_model("llama", layers=8, vocab=257, hidden_size=96, intermediate_size=256)
    found = scanned(zero_tail(model, 2), "2,4,6", candidates=64)
    assert [layer.agreement.value for layer in found.layers[1:]] == [1.0] * 6
    assert found.oracle.every_layer.value <= found.oracle.exits.value == pytest.approx(2 / 8)
    assert found.predicted[1].depth.value == pytest.approx(2 / 8)
    assert found.disturbed.kept == pytest.approx(1.0, abs=0.05)
    assert found.disturbed.counted_reduction > LEAST_COUNTED
    even = next(item for item in found.break_even if item.policy == "propagate")
    costs = adapt(model).costs()
    assert even.macs == pytest.approx(costs.depth(8) - costs.depth(2) - costs.skipped(2, 8))
    assert found.verdict.answer == "worth it"


def left_under_propagate(counted: float) -> Drift:
    return Drift(tokens=9, margin_intact=0.7, margin=0.8, kept=0.7, predicted=0.75, counted_reduction=counted)


@pytest.mark.parametrize(
    ("depth", "oracle", "counted", "answer", "says"),
    [
        (0.70, 0.50, 0.10, "worth it", "0.75 under propagate"),
        (0.70, 0.50, 0.019, "only for layer passes", "counted reduction of 1.9%"),
        (0.91, 0.50, 0.10, "not worth it", "hardly be told"),
        (0.95, 0.91, 0.10, "not worth it", "0.91 of the depth"),
    ],
)
def test_the_verdict_follows_its_rule(depth, oracle, counted, answer, says):
    found = verdict(depth, oracle, left_under_propagate(counted))
    assert found.answer == answer
    assert says in found.reason


def test_the_fitted_estimator_is_evaluated_on_other_text():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 600, 3, generator=generator)
    group = torch.arange(600) // 30
    noise = torch.rand(600, generator=generator)
    labels = torch.stack((torch.sigmoid(2 * features[0, :, 0] - 1) > noise, torch.ones(600, dtype=torch.bool)))
    found = cross_fitted(features, labels, group)
    assert auroc(found[0], labels[0]) == pytest.approx(auroc(features[0, :, 0], labels[0]), abs=0.02)
    assert float(found[0].mean()) == pytest.approx(float(labels[0].double().mean()), abs=0.01)
    assert float(found[1].min()) > 0.99  # an exit that is always right is trusted, and stays finite
    by_chance = cross_fitted(features, torch.rand(2, 600, generator=generator) < 0.5, group)
    assert float((by_chance - 0.5).abs().mean()) < 0.1
    x = torch.cat((torch.ones(600, 1), features[0]), dim=1).double()
    weight, y = logistic(x, labels[0].double()), labels[0].double()
    slope = x.T @ (torch.sigmoid(x @ weight) - y) + torch.tensor([0.0, 1, 1, 1]) * weight
    assert float(slope[1:].abs().max()) < 1e-4


def test_checks_are_priced_as_training_builds_them():
    """The default number of candidates is ExitConfig's, in the library and on the command line."""
    model = tiny_model("llama", vocab=2000)
    assert dx.ScanSettings().candidates == ExitConfig.candidates
    assert inspect.signature(scan_command).parameters["candidates"].default in (None, ExitConfig.candidates)
    default = dx.ScanSettings().candidates
    tokenizer, source = byte_tokenizer(), dx.find_source(corpus())
    settings = dataclasses.replace(SETTINGS, candidates=default, tokens=400)
    found = dx.scan(adapt(model), tokenizer, source, "2,3,4", settings)
    config = ExitConfig((2, 3, 4), 5)
    head, readout = ExitHeads(config, adapt(model).width), build_readout(adapt(model), config)
    expected = [readout.read_macs(index) + head.macs(index) for index in range(3)]
    assert [check.macs for check in found.checks] == expected
    assert expected[0] > expected[1] == expected[2]
    other = dx.scan(adapt(model), tokenizer, source, "2,3,4", dataclasses.replace(settings, candidates=64))
    assert other.checks[1].macs < found.checks[1].macs


def test_the_bar_names_what_it_does(monkeypatch):
    titles = []

    class Bar(TokenBar):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            titles.append(self._progress.tasks[0].description)

        def show(self, tokens, note):
            titles.append(note()[0])

    monkeypatch.setattr(collect, "TokenBar", Bar)
    scanned(backbone("llama"), tokens=200)
    assert len(titles) > 1 and set(titles) == {"scanning"}


def test_documents_and_files(pair, tmp_path):
    model, found = pair
    written = write_scan(found, tmp_path / {"llama": "folder", "mamba2": "scan-a.json"}[model.config.model_type])
    assert Scan.read(written[0]) == found
    assert [path.suffix for path in written] == [".json", ".svg", ".png"]
    assert b"agreement" in written[1].read_bytes()
    later = json.loads(written[0].read_text()) | {"version": 99}
    written[0].write_text(json.dumps(later))
    with pytest.raises(DataError, match="version 99"):
        Scan.read(written[0])
    written[0].write_text("{}")
    with pytest.raises(DataError, match=r"run: Field required.*dynamax scan again"):
        Scan.read(written[0])
    with pytest.raises(UsageError, match="is a file"):
        check_target(written[0] / "below")


def test_long_documents_give_their_share_first(tmp_path):
    path = tmp_path / "long.jsonl"
    texts = ["x" * 3000, *("y" * 50 for _ in range(20))]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    few = gather(dx.find_source(path), byte_tokenizer(), SETTINGS, 64)
    taken = [sum(len(c.ids) for c in few if c.document == d) for d in range(1 + max(c.document for c in few))]
    assert sum(taken) >= 1200
    assert sorted(taken)[:20] == [50] * 20
    path.write_text(json.dumps({"text": "short"}) + "\n")
    with pytest.raises(DataError, match="at least two documents"):
        dx.scan(adapt(backbone("llama")), byte_tokenizer(), dx.find_source(path), "2", SETTINGS)


def test_numbers_that_are_none_are_refused():
    model = backbone("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(BackboneError, match="not numbers in float32"):
        scanned(model)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": 0}, "tokens = 0: give at least 1"),
        ({"sequence": 1}, "sequence = 1: give at least 2"),
        ({"batch_tokens": 5}, "at least one chunk of 512"),
        ({"held_out": 0.0}, "held_out = 0.0: give above 0"),
    ],
)
def test_settings_out_of_bounds_are_named(changes, says):
    with pytest.raises(UsageError, match=says):
        dx.ScanSettings(**changes)


def test_the_command_prints_tables_or_the_document(capsys, tmp_path):
    arguments = ["scan", str(model_folder()), "--data", str(corpus()), "--tokens", "600", "--exit-layers", "2,3"]
    assert cli.run([*arguments, "--seq-length", "64", "--out", str(tmp_path / "found")]) == 0
    printed = capsys.readouterr().out
    for text in ("oracle, these exits", "predicted for a trained head", "propagate", "Break-even", "worth it"):
        assert text.lower() in printed.lower()
    assert cli.run([*arguments, "--seq-length", "64", "--json"]) == 0
    shown = Scan.model_validate_json(capsys.readouterr().out)
    assert shown.layers == Scan.read(tmp_path / "found" / "scan.json").layers
    assert shown.exits == (2, 3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--exit-layers", "9"), "layers 1 to 4"),
        (("--tokens", "none"), "--tokens 'none'"),
        (("--data", "nowhere.jsonl"), "no file or folder 'nowhere.jsonl'"),
        (("--candidates", "2"), "candidates 2"),
        (("--out", str(corpus() / "below")), "is a file"),
    ],
)
def test_wrong_inputs_are_one_clear_error(options, says, capsys):
    assert cli.run(["scan", str(model_folder()), "--data", str(corpus()), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error


def test_exits_are_placed_before_anything_runs():
    with pytest.raises(ExitPlacementError, match="lies at depth 5"):
        scanned(backbone("llama"), exits="5")
