"""``generate`` kept to the letter: streamers, output classes, per-call options, and what is refused."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import TextIteratorStreamer, pipeline
from transformers.generation import GenerateDecoderOnlyOutput

import dynamax_llm as dx
from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.errors import UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.testing import random_ids, tiny_model

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Recorder:
    """A streamer that notes what it gets."""

    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.flatten().tolist())

    def end(self) -> None:
        self.ends += 1


def early(model, **options) -> EarlyExit:
    return EarlyExit(Exits.untrained(adapt(model), (1, 3)), measure="softmax_max", **options)


@pytest.mark.parametrize("policy", ["propagate", "verify"])
def test_a_streamer_gets_what_stock_gives_it(policy: str) -> None:
    model, ids = tiny_model("llama"), random_ids(1, 5)
    stock, ours = Recorder(), Recorder()
    model.generate(ids, max_new_tokens=6, streamer=stock, **GREEDY)
    threshold = "never" if policy == "propagate" else 0.0
    exits = early(model, policy=policy, threshold=threshold)
    model.generate(ids, max_new_tokens=6, streamer=ours, custom_generate=exits, **GREEDY)
    assert ours.values == stock.values and len(ours.values) == 7
    assert (ours.ends, stock.ends) == (1, 1)


def test_a_streamer_ends_when_generation_fails() -> None:
    model, streamer = tiny_model("llama"), Recorder()

    def fail(tokens: torch.Tensor, layers: torch.Tensor) -> None:
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        model.generate(
            random_ids(1, 5), max_new_tokens=6, streamer=streamer, custom_generate=early(model, on_token=fail), **GREEDY
        )
    assert streamer.ends == 1


def test_a_text_iterator_in_a_thread_and_a_pipeline() -> None:
    model, tokenizer = dx.load("transformer-ee")
    exits = EarlyExit(dx.Exits.from_pretrained("transformer-ee"), threshold="never")
    inputs = tokenizer("The river", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    want = {**inputs, "max_new_tokens": 6, "do_sample": False, "streamer": streamer, "custom_generate": exits}
    thread = threading.Thread(target=model.generate, kwargs=want)
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    stock = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert streamed == tokenizer.decode(stock[0, inputs.input_ids.shape[1] :])
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)
    ours = made("The river", max_new_tokens=6, do_sample=False, custom_generate=exits)
    expected = made("The river", max_new_tokens=6, do_sample=False)
    assert [item["generated_text"] for item in ours] == [item["generated_text"] for item in expected]


def test_the_output_is_hugging_faces_and_may_be_a_tensor() -> None:
    model, ids = tiny_model("mamba2"), random_ids(2, 5)
    out = model.generate(ids, max_new_tokens=4, custom_generate=early(model), **GREEDY)
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert torch.equal(out[0], out.sequences) and out.past_key_values is None
    plain = model.generate(ids, max_new_tokens=4, custom_generate=early(model), return_dict_in_generate=False, **GREEDY)
    assert isinstance(plain, torch.Tensor) and torch.equal(plain, out.sequences)


def test_options_of_one_call() -> None:
    model, ids, layers = tiny_model("llama"), random_ids(1, 5), []
    exits = early(model, threshold="never")
    out = model.generate(
        ids,
        max_new_tokens=4,
        custom_generate=exits,
        threshold=0.0,
        on_token=lambda t, d: layers.append(int(d)),
        **GREEDY,
    )
    assert out.exit_layers.tolist() == [[5, 1, 1, 1]] and layers == [5, 1, 1, 1]
    assert model.generate(ids, max_new_tokens=4, custom_generate=exits, **GREEDY).exit_layers.tolist() == [[5] * 4]


@pytest.mark.parametrize(
    "option",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
        {"position_ids": torch.arange(5)[None] * 3},
        {"assistant_model": None},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_is_not_honoured_is_refused(option: dict) -> None:
    model = tiny_model("llama")
    name = next(iter(option))
    if name == "assistant_model":
        option = {"assistant_model": tiny_model("llama")}
    with pytest.raises(UsageError, match=name):
        model.generate(random_ids(1, 5), max_new_tokens=2, custom_generate=early(model), **option, **GREEDY)


def test_processors_with_a_state_are_refused_under_verify() -> None:
    model, ids = tiny_model("llama"), random_ids(1, 5)
    with pytest.raises(UsageError, match="keeps a state between calls"):
        model.generate(
            ids, max_new_tokens=2, guidance_scale=1.7, custom_generate=early(model, policy="verify"), **GREEDY
        )


def test_an_estimator_of_ones_own() -> None:
    from dynamax_llm.testing import ScriptedConfidence

    model, ids = tiny_model("llama"), random_ids(1, 5)
    exits = Exits.untrained(adapt(model), (1, 3))
    mine = EarlyExit(exits, threshold=0.5, confidence=ScriptedConfidence(torch.tensor([[0, 1, 9]])))
    out = model.generate(ids, max_new_tokens=4, custom_generate=mine, **GREEDY)
    assert out.trace.exit_index.tolist() == [[2, 0, 1, 2]]
    with pytest.raises(UsageError, match="give only one"):
        EarlyExit(exits, measure="entropy", confidence=ScriptedConfidence(torch.zeros(1, 1)))
