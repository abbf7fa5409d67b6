"""Law 10 for the GPU engine: the tokens, depths and counts of the eager one, in float32.

Without a GPU its kernels are interpreted, which is slow: the models are as small as they come.
"""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.decoding.generate import EarlyExitOutput
from dynamax_llm.engines.cuda.engine import CudaEngine
from dynamax_llm.engines.eager import EagerEngine
from dynamax_llm.engines.plan import POLICIES, ExitPlan
from dynamax_llm.errors import UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.readouts.base import build_readout
from dynamax_llm.testing import ScriptedConfidence, random_ids, tiny_model
from tests.stepping import Stepper

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {
    "mistral": {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1},
    "mamba2": {"hidden_size": 8, "num_heads": 2, "head_dim": 8, "n_groups": 1, "state_size": 6},
}
SIZES["qwen2"] = SIZES["llama"] = SIZES["mistral"]


def small(family: str, layers: int = 3) -> PreTrainedModel:
    extra = {} if family == "mamba2" else {"head_dim": 8}
    return tiny_model(family, layers=layers, vocab=19, **SIZES[family], **extra).to(DEVICE)


def generate(model: PreTrainedModel, batch: int, engine: str | None, **settings) -> EarlyExitOutput:
    exits = Exits.untrained(adapt(model), (1, 2))
    ids = random_ids(batch, 5, vocab=19).to(DEVICE)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :2] = 0
    early = EarlyExit(exits, measure="softmax_max", engine=engine, **settings)
    return model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, custom_generate=early)


@pytest.mark.parametrize(
    ("family", "batch", "policy", "threshold"),
    [
        ("mistral", 1, "propagate", "never"),
        ("qwen2", 2, "propagate", 0.3),
        ("mamba2", 2, "propagate", 0.3),
        ("mistral", 2, "defer", 0.3),
        ("mamba2", 1, "defer", 0.3),
        ("llama", 1, "verify", 0.2),
        ("mamba2", 2, "verify", 0.2),
    ],
)
def test_same_tokens_depths_and_counts_as_eager(family: str, batch: int, policy: str, threshold: float | str) -> None:
    model = small(family)
    eager, cuda = (generate(model, batch, e, policy=policy, threshold=threshold, window=3) for e in ("eager", "cuda"))
    assert (eager.engine, cuda.engine) == ("eager", "cuda")
    assert torch.equal(eager.sequences, cuda.sequences)
    assert torch.equal(eager.exit_layers, cuda.exit_layers)
    assert eager.trace.stats.passes == cuda.trace.stats.passes
    assert eager.verification == cuda.verification


# A scripted estimator counts steps on the host, which recorded programs do not: in the interpreter alone.
@pytest.mark.parametrize("family", ["mistral", "mamba2"] if DEVICE == "cpu" else [])
def test_tokens_are_taken_back_row_by_row(family: str) -> None:
    """Law 4 here: after a rejection every row's state is that of the tokens it kept."""
    model = small(family)
    backbone, pattern = adapt(model), torch.tensor([[0, 1, 2, 0, 0, 2], [0, 2, 0, 0, 1, 2]])
    readout = build_readout(backbone, ExitConfig((1, 2), 3))
    plans = [ExitPlan((1, 2), ScriptedConfidence(pattern.to(DEVICE)), readout, POLICIES["verify"], 4) for _ in range(2)]
    both = zip((EagerEngine(), CudaEngine()), plans, strict=True)
    steppers = [Stepper(backbone, plan, batch=2, engine=engine) for engine, plan in both]
    ids, kept = random_ids(2, 4, vocab=19).to(DEVICE), [1, 2]
    with torch.no_grad():
        first, _ = (stepper.prefill(ids) for stepper in steppers)
        token = first.argmax(-1, keepdim=True)
        for _ in range(6):
            found = [stepper.step(token, (0.5, 0.5)) for stepper in steppers]
            assert torch.equal(found[0].exit_index, found[1].exit_index)
            assert torch.allclose(found[0].logits, found[1].logits, atol=1e-4)
            token = found[0].logits.argmax(-1, keepdim=True)
            assert found[0].deep == found[1].deep
            if found[0].deep:
                windows = [stepper.engine.window_logits() for stepper in steppers]
                assert torch.allclose(*windows, atol=1e-4)
                for stepper in steppers:
                    stepper.decoder.keep([min(count, windows[0].shape[1]) for count in kept])


def test_a_head_on_h_alone_decides_as_in_eager() -> None:
    """It is one kernel here; rows leave by themselves."""
    torch.manual_seed(3)
    model = small("mistral")
    config = ExitConfig((1, 2), 3, "mlp", ("hidden",), width=8)
    heads = ExitHeads(config, 16).to(DEVICE)
    with torch.no_grad():
        heads.bank.out.normal_(std=2.0)
        heads.shift.normal_()
        heads.prior.normal_()
    exits = Exits.of(adapt(model), config, heads)
    ids = random_ids(2, 5, vocab=19).to(DEVICE)
    outs = [
        model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, custom_generate=early)
        for early in (EarlyExit(exits, threshold=[0.55, 0.45], engine=engine) for engine in ("eager", "cuda"))
    ]
    assert outs[1].engine == "cuda" and len(outs[0].exit_layers.unique()) > 1
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert torch.equal(outs[0].exit_layers, outs[1].exit_layers)


@pytest.mark.parametrize(("kind", "policy"), [("mamba", "defer"), ("transformer", "propagate")])
def test_heads_that_remember_decide_as_in_eager(kind: str, policy: str) -> None:
    """Their states live on the device, and hear of tokens that left before their exit."""
    model = small("mistral")
    config = ExitConfig((1, 2), 3, kind, width=16, candidates=8)
    heads = ExitHeads(config, 16).to(DEVICE)
    with torch.no_grad():
        heads.bank.out.normal_(std=2.0)
        heads.prior.normal_()
    exits, ids = Exits.of(adapt(model), config, heads), random_ids(2, 5, vocab=19).to(DEVICE)
    outs = [
        model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, custom_generate=early)
        for early in (EarlyExit(exits, threshold=[0.6, 0.5], policy=policy, engine=e) for e in ("eager", "cuda"))
    ]
    assert outs[1].engine == "cuda" and len(outs[0].exit_layers.unique()) > 1
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert torch.equal(outs[0].exit_layers, outs[1].exit_layers)


def test_programs_serve_prompts_of_any_length_and_are_made_once() -> None:
    model = small("mistral", layers=2)
    exits = Exits.untrained(adapt(model), (1,))
    early = EarlyExit(exits, measure="softmax_max", threshold=0.5, engine="cuda")
    for length in (3, 9):
        ids = random_ids(1, length, vocab=19).to(DEVICE)
        out = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, custom_generate=early)
        eager = EarlyExit(exits, measure="softmax_max", threshold=0.5, engine="eager")
        assert torch.equal(
            out.sequences,
            model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, custom_generate=eager).sequences,
        )
    assert sum(map(len, exits.drive(model).machines.values())) == 1


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("gemma", {}, "family 'gemma'"),
        ("mistral", {"policy": "copy"}, "policy 'copy'"),
        ("mistral", {"policy": "defer", "window": 512}, "512 waiting tokens"),
    ],
)
def test_what_it_cannot_do_is_said_or_left_to_eager(family: str, settings: dict, said: str) -> None:
    model = tiny_model(family, layers=3, vocab=19).to(DEVICE)
    with pytest.raises(UsageError, match=said):
        generate(model, 1, "cuda", threshold=0.5, **settings)
    assert generate(model, 1, None, threshold=0.5, **settings).engine == "eager"


def test_programs_that_cannot_be_made_are_an_error_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(CudaEngine, "open", full)
    with pytest.raises(UsageError, match=r"could not be made \(CUDA out of memory. Tried to allocate 9 GiB\)"):
        generate(small("mistral"), 1, "cuda", threshold=0.5)
    monkeypatch.setattr(CudaEngine, "prefers", lambda self, backbone: True)
    with pytest.warns(RuntimeWarning, match="engine 'cuda' is not used"):
        assert generate(small("mistral"), 1, None, threshold=0.5).engine == "eager"


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown engine 'cdua'"):
        EarlyExit(Exits.untrained(adapt(small("mistral")), (1, 2)), measure="entropy", engine="cdua")
