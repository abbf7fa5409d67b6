"""The benchmark: rows leave where they are told, bytes are the weights', turns are paired, refusals are clear."""

from __future__ import annotations

import json

import pytest
import torch

from dynamax_llm import cli
from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.errors import DataError, PolicyMismatchError, UsageError
from dynamax_llm.evaluation.bench import Bench, BenchSettings, bench, parity
from dynamax_llm.evaluation.bench import run as running
from dynamax_llm.evaluation.bench.counted import Counted
from dynamax_llm.evaluation.bench.document import Spread
from dynamax_llm.evaluation.bench.estimators import DrawnConfidence, draw
from dynamax_llm.evaluation.common.random_models import random_model, zero_tail
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.report.benched import write_bench

SHAPES = ("tiny-transformer", "tiny-mamba")
SETTINGS = BenchSettings(
    prompt=5, new=7, baseline_new=4, repeats=1, batches=(1, 2), windows=(3,), checks=2, spread=(1.0,)
)


@pytest.fixture(scope="module", params=SHAPES)
def benched(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, Bench, list[Bench]]:
    model, parts = zero_tail(random_model(request.param, "cpu", torch.float32), 2), []
    return model, bench(model, SETTINGS, name=request.param, zero_tail_from=2, on_part=parts.append), parts


def test_every_setting_is_measured_and_did_what_it_says(benched):
    _, found, parts = benched
    assert found.complete and not any(part.complete for part in parts)
    assert [len(part.rows) for part in parts] == sorted(len(part.rows) for part in parts)
    assert parts[0].rows[0].kind == "full" and len(parts[-1].rows) == len(found.rows)
    for batch, count in ((1, 6), (2, 9)):
        rows = [row for row in found.rows if row.batch == batch]
        assert len(rows) == count
        kinds = {(row.kind, row.policy): row for row in rows}
        propagate, defer, verify = (kinds["exit", name] for name in ("propagate", "defer", "verify"))
        assert (propagate.mean_depth, propagate.left, propagate.pass_reduction) == (0.5, 1.0, 0.5)
        # Six steps at depth 2 of 4; every third fills the window, and the other 2 layers catch up.
        assert defer.pass_reduction == pytest.approx(1 - (6 * 2 + 2 * 2) / (6 * 4))
        assert verify.acceptance == 1.0 and verify.window == 3
        assert kinds["checks", "propagate"].left == 0.0 and kinds["checks", "propagate"].exits == (1, 3)
        for row in rows:
            assert row.ms_per_token.low <= row.ms_per_token.median <= row.ms_per_token.high
            assert row.ms_per_token.low > 0.0
            assert row.tokens_per_second.high == pytest.approx(1e3 * batch / row.ms_per_token.low)
            assert row.bandwidth_share == pytest.approx(row.bandwidth / found.place.copy_bandwidth)
            assert (row.speed_up is None) == (row.kind in ("full", "stock"))
    (missing,) = {item.reason for item in found.missing}
    assert missing == "transformers compiles on a GPU only" and len(found.missing) == 2


def test_engines_say_the_same_in_float32(benched):
    _, found, _ = benched
    assert {item.of for item in found.parity} >= {"transformers", "one pass of the stock model"}
    assert any("verify" in item.of for item in found.parity)
    assert all(item.equal in (None, 1.0) and item.differing in (None, 0.0) for item in found.parity)


def test_bytes_are_those_of_the_weights(benched):
    model, found, _ = benched
    tensors = dict(model.named_parameters())
    embedding = model.get_input_embeddings().weight
    everything = sum(tensor.nbytes for tensor in tensors.values())
    final_norm = embedding.shape[1] * 4
    rows = {(row.kind, row.policy, row.batch): row for row in found.rows}
    for batch in (1, 2):
        full = rows["full", None, batch].weight_bytes
        assert full == everything - embedding.nbytes - final_norm + batch * embedding[0].nbytes
        assert rows["stock", None, batch].weight_bytes == full
    layer = sum(tensor.nbytes for tensor in adapt(model).layers[0].parameters())
    full, half = rows["full", None, 1].weight_bytes, rows["exit", "propagate", 1].weight_bytes
    if model.config.model_type == "mistral":
        updated = 2 * 2 * 16 * 64 * 4  # keys and values: heads, width of one, hidden size
        kv = 4 * 2 * 2 * 16 * 4  # of all layers
        assert rows["full", None, 1].state_bytes == pytest.approx(kv * (5 + 7 / 2 + 1))
    else:
        channels = 128 + 2 * 2 * 16  # of the convolution: x, B, C
        updated = 4 * ((channels + 8) * 64 + channels * 4)
        state = 4 * 4 * (8 * 16 * 16 + channels * 4)
        assert rows["full", None, 1].state_bytes == pytest.approx(2 * state)
    assert half == pytest.approx(full - 2 * layer + 2 * updated)


def test_the_document_and_its_files(benched, tmp_path):
    _, found, _ = benched
    written = write_bench(found, tmp_path / "deep" / "tiny.json")
    assert [path.name for path in written] == ["tiny.json", "tiny.svg", "tiny.png"]
    assert Bench.read(written[0]) == found
    drawn = written[1].read_text(encoding="utf-8")
    assert "full depth · eager" in drawn and "tokens/s, batch size 2" in drawn
    (tmp_path / "other.json").write_text(found.model_dump_json().replace('"version":1,', '"version":9,', 1))
    with pytest.raises(DataError, match="version 9"):
        Bench.read(tmp_path / "other.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match="is not a usable benchmark: complete"):
        Bench.read(tmp_path / "broken.json")
    with pytest.raises(DataError, match=r"cannot read .*nowhere\.json"):
        Bench.read(tmp_path / "nowhere.json")


def test_documents_of_before_are_read(benched, tmp_path):
    """Fields that had another name in 0.1.0: parity, and the estimator of a row."""
    _, found, _ = benched
    old = json.loads(found.model_dump_json())
    old["sameness"] = old.pop("parity")
    for row in old["rows"]:
        row["judge"] = row.pop("estimator")
    (tmp_path / "bench.json").write_text(json.dumps(old))
    assert Bench.read(tmp_path) == found
    assert found.parity and any(row.estimator for row in found.rows)


def test_a_draw_has_the_shares_asked_for():
    found = draw(8, 3, 0.6, 0.5, period=20_000)
    left = found < 3
    assert float(left.float().mean()) == pytest.approx(0.6, abs=0.02)
    assert float(left.all(1).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert bool((found[left.all(1)].float().std(1) == 0).float().mean() > 0.99)
    together = draw(4, 2, 0.5, 1.0, period=2_000)
    assert bool((together == together[:, :1]).all())
    assert bool((draw(2, 1, 1.0, 0.0) == 0).all()) and bool((draw(2, 1, 0.0, 1.0) == 1).all())


@pytest.mark.parametrize("policy", ["propagate", "defer"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_leave_where_they_were_drawn(shape, policy):
    model = random_model(shape, "cpu", torch.float32)
    exits = Exits.untrained(adapt(model), "1,3")
    early = EarlyExit(exits, threshold=0.5, measure="state_similarity", policy=policy, window=4)
    pattern = draw(3, 2, 0.7, 0.3, seed=4, period=8)
    early.estimator = DrawnConfidence(pattern, 2)
    ids = torch.randint(1, 500, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False, custom_generate=early)
    # The estimator has counted the prompt's six tokens when the first is decoded.
    expected = torch.tensor([1, 3, 4])[pattern[torch.arange(6, 6 + 13) % 8]].t()
    assert out.exit_layers[:, 1:].tolist() == expected.tolist()


def test_texts_are_compared():
    one, other = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]), torch.tensor([[1, 2, 9, 4, 5], [1, 2, 3, 9, 5]])
    assert parity.compared(one, other) == (0.75, 2)
    assert parity.compared(one, one) == (1.0, None)
    facts = dict.fromkeys(("of", "reference", "model", "dtype"), "-")
    forced = parity.given_text(one, other[:, :4], facts)
    assert (forced.differing, forced.positions, forced.equal) == (0.25, 8, None)
    free = parity.free(one, other, facts)
    assert (free.equal, free.first_difference, free.positions, free.differing) == (0.75, 2, 8, None)
    spread = Spread.of([3.0, 1.0, 2.0])
    assert (spread.median, spread.low, spread.high, spread.repeats) == (2.0, 1.0, 3.0, 3)


def test_a_token_is_what_many_take_longer_than_one_and_turns_are_paired(monkeypatch):
    """With a clock that is told: 10 ms for the prompt, a token 4 ms at full depth and 1 ms where it leaves."""
    model = random_model("tiny-transformer", "cpu", torch.float32)
    ends = model.generation_config.eos_token_id = 3
    real = running._Run.call

    def told(self, setting, new):
        _, out = real(self, setting, new)
        return 0.010 + (new - 1) * (0.004 if setting.kind == "full" else 0.001), out

    monkeypatch.setattr(running._Run, "call", told)
    settings = BenchSettings(
        prompt=3, new=5, repeats=2, batches=(1,), policies=("propagate",), baselines=False, parity=False
    )
    found = bench(model, settings)
    assert model.generation_config.eos_token_id == ends
    full, own = found.rows
    assert full.ms_per_token.median == pytest.approx(4.0) and own.ms_per_token.median == pytest.approx(1.0)
    assert own.tokens_per_second.median == pytest.approx(1000.0)
    assert own.speed_up.median == pytest.approx(4.0) and own.speed_up.repeats == 2
    assert own.first_token.median == pytest.approx(0.010) and own.building == pytest.approx(0.0)
    assert found.parity == () and found.missing == ()


def test_a_moment_of_noise_makes_no_time_negative():
    found = running.Measured("eager", (), None, cold=1.0, long=[0.5, 0.2], first=[0.1, 0.3])
    assert found.per_token(5) == pytest.approx([0.1, 0.04])  # the second: of all five tokens, prompt included


def test_what_runs_out_of_memory_is_said_and_the_rest_goes_on(monkeypatch):
    model = random_model("tiny-transformer", "cpu", torch.float32)
    real = running._Run.call

    def small(self, setting, new):
        if setting.kind == "exit":
            raise torch.OutOfMemoryError("too much")
        return real(self, setting, new)

    monkeypatch.setattr(running._Run, "call", small)
    settings = BenchSettings(prompt=3, new=3, repeats=1, batches=(1,), policies=("propagate",), baselines=False)
    found = bench(model, settings)
    assert [row.kind for row in found.rows] == ["full"]
    assert [(item.label, item.reason) for item in found.missing] == [("propagate, all leave at 2", "out of memory")]


def test_counted_layers_of_a_mixed_depth():
    backbone = adapt(random_model("tiny-mamba", "cpu", torch.float32))
    counted = Counted.of(backbone, torch.tensor([[1, 2]]))
    assert counted.recurrent > 0 and counted.kv == 0
    weights, state = counted.stock(4, 100)
    assert weights == sum(counted.layers) + counted.head + 4 * counted.embedded
    assert state == 4 * 4 * 2 * counted.recurrent


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ("copy",)}, "'copy' is not defined for the mamba layers of 'mamba2'"),
        ({"checks": 4}, "checks = 4: this backbone has 4 layers, so at most 3 exits"),
        ({"exit_at": "4"}, "exits may sit after layers 1 to 3"),
    ],
)
def test_what_the_model_does_not_allow(changes, message):
    with pytest.raises((UsageError, PolicyMismatchError), match=message):
        bench(random_model("tiny-mamba", "cpu", torch.float32), BenchSettings(**changes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either a MODEL or --shape"),
        (("transformer-ee", "--shape", "tiny-mamba"), "give either a MODEL or --shape"),
        (("--shape", "tiny-mambo"), "unknown model shape 'tiny-mambo'. Did you mean 'tiny-mamba'?"),
        (("--shape", "tiny-mamba", "--batch-size", "1,x"), "--batch-size '1,x': give numbers separated by commas"),
        (("--shape", "tiny-mamba", "--batch-size", "0"), "--batch-size '0': give at least 1"),
        (("--shape", "tiny-mamba", "--max-new-tokens", "1"), "--max-new-tokens 1: give at least 2"),
        (
            ("--shape", "tiny-mamba", "--policy", "verfy"),
            "stale, defer, verify. Did you mean 'verify'?",
        ),
        (("--shape", "tiny-mamba", "--spread", "2"), "--spread '2': give between 0 and 1"),
        (("--shape", "tiny-mamba", "--spread", "1", "--batch-size", "1"), "give --batch-size above 1 too"),
        (("--shape", "tiny-mamba", "--engine", "gpu"), "--engine 'gpu': give one of eager, cuda"),
        (("--shape", "tiny-mamba", "--checks", "2", "--head", "state_similarity"), "--head 'state_similarity': give"),
        (("--shape", "tiny-mamba", "--device", "cuda:9"), "device 'cuda:9' cannot be used here"),
        (("--shape", "tiny-mamba", "--engine", "cuda"), "engine 'cuda' cannot run this: the weights lie on 'cpu'"),
        (("--shape", "tiny-transformer", "--max-new-tokens", "9000"), "Lower --prompt-tokens or --max-new-tokens"),
    ],
)
def test_refusals(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # without it a CPU has one engine
    if arguments[2:3] == ("--engine",):
        arguments += ("--device", "cpu")
    assert cli.run(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command(capsys, tmp_path):
    arguments = "bench --shape tiny-transformer --batch-size 1 --prompt-tokens 4 --max-new-tokens 4 --repeats 1"
    assert cli.run([*arguments.split(), "--policy", "propagate,copy", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "propagate, all leave at 2 · eager" in printed.out and "Same tokens?" in printed.out
    assert "batch 1, eager, full depth:" in printed.err
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["complete"] and found["load"]["zero_tail_from"] == 2
    assert [row["policy"] for row in found["rows"]] == [None, "propagate", "copy", None]
    assert found["place"]["dtype"] == "float32" and found["backbone"]["n_layers"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.png", "bench.svg"]
