"""The harness's model class with exits: stock scores without exits, other scores with them, rows independent."""

from __future__ import annotations

import dataclasses
import functools
import json

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.harness.evaluate import Plan, evaluate
from dynamax_llm.evaluation.harness.model import DynamaxLM, StopAtText
from dynamax_llm.evaluation.harness.records import cell_path
from dynamax_llm.evaluation.harness.settings import by_head, full
from dynamax_llm.evaluation.harness.tasks import LOCAL, EvalTask, _manager, load_tasks
from dynamax_llm.testing import random_ids
from dynamax_llm.traces.teacher_forced import step_by_step, teacher_forced
from tests.evaluation.conftest import ROWS, TASKS, heads, subject, task
from tests.folders import byte_tokenizer

#: One task that generates and one that scores continuations.
FEW = ("triviaqa", "truthfulqa_mc2")
#: (context, continuation) of unequal lengths.
PAIRS = [("The cat sat on", " the mat."), ("Q: Who?\nA:", " Nobody"), ("One two", " three four five"), ("a", "b")]


def stock_scores(family: str, name: str, lm: HFLM) -> dict[str, float]:
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=[task(name).task],
        limit=len(task(name).docs),
        bootstrap_iters=0,
        log_samples=False,
        task_manager=_manager(LOCAL[name].folder),  # its index of all tasks would take many seconds
    )
    return {key: value for key, value in found["results"][name].items() if isinstance(value, float | int)}


@pytest.mark.parametrize(
    ("family", "name"), [*(("llama", name) for name in TASKS), *(("mamba2", name) for name in FEW)]
)
def test_never_leaving_scores_as_the_stock_class_does(family, name, tmp_path):
    """To the last digit: through our evaluation, and, with our class, through the harness's own."""
    who = subject(family)
    expected = stock_scores(family, name, HFLM(pretrained=who.model, tokenizer=who.tokenizer, batch_size=2))
    if name in FEW:
        never = EarlyExit(heads(family), threshold="never")
        assert stock_scores(family, name, DynamaxLM(who.model, who.tokenizer, never, batch_size=2)) == expected
    settings = [full(who, heads(family)), by_head(who, heads(family), "never")]
    cells = evaluate(who, settings, [task(name)], Plan(batch=2, timed=0), tmp_path).cells
    for cell in cells:
        assert {key: metric.value for key, metric in cell.metrics.items()} == {
            key: value for key, value in expected.items() if "," in key and "_stderr" not in key
        }
        assert cell.mean_depth.value == 1.0
        assert cell.counted_reduction.value == 0.0


@functools.cache
def many_choices(length: int = 100) -> EvalTask:
    """More documents than a batch holds, whose continuations fit the tiny models' context."""
    (found,) = load_tasks(["truthfulqa_mc2"], data_dir=ROWS, limit=None)
    docs = [doc for doc in found.docs if max(len(item.args[1].encode()) for item in doc.instances) < length]
    assert len(docs) > 3
    return dataclasses.replace(found, docs=tuple(docs[:5]))


@pytest.mark.parametrize("batch", [1, 8])
def test_likelihoods_are_the_stock_classs_whatever_the_batch(batch, family, tmp_path):
    """Continuations of a whole task are one call, so that the same texts share a batch as in the harness."""
    who, many = subject(family), many_choices()
    stock = HFLM(pretrained=who.model, tokenizer=who.tokenizer, batch_size=batch)
    requests = [instance for doc in many.docs for instance in doc.instances]
    expected = [list(response) for response in stock.loglikelihood(requests, disable_tqdm=True)]
    settings = [full(who, heads(family)), by_head(who, heads(family), "never")]
    cells = evaluate(who, settings, [many], Plan(batch=batch, timed=0), tmp_path).cells
    for variant in settings:
        lines = cell_path(tmp_path, family, many.facts.name, variant.facts.id).read_text().splitlines()[1:]
        assert [score for line in lines for score in json.loads(line)["scores"]] == expected
    assert cells[0].metrics == cells[1].metrics


def test_scores_hardly_depend_on_the_batch(family, tmp_path):
    who, many = subject(family), many_choices()
    settings = [full(who, heads(family)), by_head(who, heads(family), 0.5)]
    found = [evaluate(who, settings, [many], Plan(batch=b, timed=0), tmp_path / str(b)).cells for b in (1, 8)]
    for one, eight in zip(*found, strict=True):
        assert one.histogram == eight.histogram
        for name, metric in one.metrics.items():
            assert metric.value == pytest.approx(eight.metrics[name].value, abs=1e-4)


def score(family: str, **options: object) -> tuple[list[tuple[float, bool]], DynamaxLM]:
    who = subject(family)
    batch = options.pop("batch", 4)
    lm = DynamaxLM(who.model, who.tokenizer, EarlyExit(heads(family), **options), batch_size=batch)
    requests = [(pair, *lm._encode_pair(*pair)) for pair in PAIRS]
    return lm._loglikelihood_tokens(requests, disable_tqdm=True), lm


def test_exits_change_likelihoods_and_are_counted(family):
    never, _ = score(family, threshold="never")
    always, lm = score(family, threshold=0.0)
    changed = [abs(a - b) > 1e-3 for (a, _), (b, _) in zip(never, always, strict=True)]
    assert changed == [True, True, True, False]  # the only token of the last one comes from the prompt's own pass
    answer = lm.answers[PAIRS[0]]
    assert answer.layers == (5, *[2] * 8)
    assert answer.tokens == tuple(subject(family).tokenizer.encode(" the mat."))
    assert answer.passes == pytest.approx(0.6)
    assert 0.05 < answer.reduction < 0.6


@pytest.mark.parametrize(
    ("family", "policy"),
    [("llama", "propagate"), ("mamba2", "propagate"), ("llama", "defer"), ("llama", "copy"), ("mamba2", "stale")],
)
def test_one_pass_scores_as_step_by_step_decoding(family, policy):
    """Where a policy has a parallel pass; ``copy`` and ``stale`` are stepped, one text at a time."""
    found, lm = score(family, threshold=0.5, policy=policy)
    early, who = EarlyExit(heads(family), threshold=0.5, policy=policy), subject(family)
    backbone, plan, _ = early.attach(who.model)
    for pair, (likelihood, greedy) in zip(PAIRS, found, strict=True):
        context, continuation = lm._encode_pair(*pair)
        ids = torch.tensor([(context + continuation)[:-1]])
        twin = step_by_step(backbone, plan, ids, early.thresholds.values, prompt_length=len(context))
        logits = twin.logits[0, len(context) - 1 :]
        expected = logits.log_softmax(-1)[range(len(continuation)), continuation].sum()
        assert likelihood == pytest.approx(float(expected), abs=1e-3)
        assert greedy == (logits.argmax(-1).tolist() == continuation)


def test_verified_likelihoods_are_the_full_models(family):
    assert score(family, threshold=0.0, policy="verify")[0] == score(family, threshold="never")[0]


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_row_scores_in_a_batch_as_alone(threshold, family):
    together, _ = score(family, threshold=threshold)
    alone, _ = score(family, threshold=threshold, batch=1)
    for (a, greedy_a), (b, greedy_b) in zip(together, alone, strict=True):
        assert a == pytest.approx(b, abs=1e-3)
        assert greedy_a == greedy_b


def test_prompts_of_unequal_length_in_one_pass(family):
    early = EarlyExit(heads(family), threshold=0.0)
    backbone, plan, _ = early.attach(subject(family).model)
    ids, prompts = random_ids(3, 9, vocab=200), torch.tensor([1, 4, 8])
    wanted = torch.arange(9) >= prompts.unsqueeze(1) - 1
    options = {"prompt_length": prompts, "keep_logits": True, "wanted": wanted}
    found = teacher_forced(backbone, plan, ids, early.thresholds.values, **options)
    for row, prompt in enumerate(prompts.tolist()):
        one = ids[row : row + 1]
        alone = teacher_forced(backbone, plan, one, early.thresholds.values, prompt_length=prompt, keep_logits=True)
        assert found.exit_index[row].tolist() == [2] * prompt + [0] * (9 - prompt) == alone.exit_index[0].tolist()
        assert torch.allclose(found.logits[row, prompt - 1 :], alone.logits[0, prompt - 1 :], atol=1e-4)
        assert found.tokens[row].tolist() == [-1] * (prompt - 1) + alone.tokens[0, prompt - 1 :].tolist()


def test_rows_end_at_their_own_stop(family):
    who = subject(family)
    lm = DynamaxLM(who.model, who.tokenizer, EarlyExit(heads(family), threshold=0.5), batch_size=4)
    prompts = [context for context, _ in PAIRS]
    # Stops that tiny random models do produce: every other byte.
    stops = [who.tokenizer.decode([token]) for token in range(33, 127, 2)]
    lm.tok_batch_encode(prompts)
    ids, mask = lm.tok_batch_encode(prompts)
    lm._model_generate(ids, ids.shape[1] + 12, stops, attention_mask=mask)
    together = dict(lm.answers)
    for prompt in prompts:
        lm.tok_batch_encode([prompt])
        one, mask = lm.tok_batch_encode([prompt])
        lm._model_generate(one, one.shape[1] + 12, stops, attention_mask=mask)
        assert lm.answers[(prompt,)].tokens == together[(prompt,)].tokens
        assert lm.answers[(prompt,)].layers == together[(prompt,)].layers
        text = who.tokenizer.decode(together[(prompt,)].tokens[:-1])
        assert not any(stop in text for stop in stops)


def test_a_stop_is_looked_for_in_new_text_only():
    tokenizer = byte_tokenizer()
    ids = torch.tensor([tokenizer.encode("a.b"), tokenizer.encode("ab.")])
    assert StopAtText(tokenizer, ["."], 2)(ids, None).tolist() == [False, True]
    assert StopAtText(tokenizer, [".", "b"], 2)(ids, None).tolist() == [True, True]
    assert StopAtText(tokenizer, [""], 0)(ids, None).tolist() == [False, False]


def test_without_exits_it_is_the_stock_class(family):
    who = subject(family)
    lm = DynamaxLM(who.model, who.tokenizer)
    assert lm.early_exit is None
    requests = [(pair, *lm._encode_pair(*pair)) for pair in PAIRS]
    stock = HFLM(pretrained=who.model, tokenizer=who.tokenizer)
    assert lm._loglikelihood_tokens(requests, True) == stock._loglikelihood_tokens(requests, True)
    assert lm.answers == {}


def test_automatic_batches_are_refused():
    who = subject("llama")
    lm = DynamaxLM(who.model, who.tokenizer, EarlyExit(heads("llama"), threshold=0.0), batch_size="auto")
    with pytest.raises(UsageError, match="whole number"):
        lm._loglikelihood_tokens([(PAIRS[0], [1], [2])])


def test_the_full_model_counts_as_itself(family):
    backbone = adapt(subject(family).model)
    lm = score(family, threshold=0.0)[1]
    costs = EarlyExit(heads(family), threshold=0.0).attach(backbone.model)[2]
    answer = lm.answers[PAIRS[0]]
    spent = costs.by_exit[2] + 8 * costs.by_exit[0]
    assert answer.reduction == pytest.approx(1 - spent / (9 * backbone.costs().total))
