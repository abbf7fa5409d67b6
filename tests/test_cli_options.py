"""Options have one source: every default is a settings field's, names are the same in every verb, checks are light."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest

from dynamax_llm import cli
from dynamax_llm.backbones import loading
from dynamax_llm.calibration.settings import CalibrationSettings, PromiseSettings
from dynamax_llm.cli.options import DEFAULT_LAYERS, in_flags
from dynamax_llm.cli.train import CONFIG
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.decoding.thresholds import SCHEDULES
from dynamax_llm.engines.plan import POLICIES
from dynamax_llm.evaluation.bench import BenchSettings
from dynamax_llm.evaluation.bench.exits.settings import ExitBenchSettings
from dynamax_llm.evaluation.harness.plan import EvalSettings, Plan
from dynamax_llm.evaluation.scan.settings import ScanSettings
from dynamax_llm.exits import registries
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import DEFAULT_EXITS, ExitConfig
from dynamax_llm.paper import PaperPlan
from dynamax_llm.settings import (
    DTYPES,
    MEASURES,
    STATE_POLICIES,
    THRESHOLD_SCHEDULES,
    DecodeSettings,
    GenerateSettings,
    PlaceSettings,
    check_settings,
    option_of,
    setting,
)
from dynamax_llm.text.settings import AnswerSettings, LearnSettings
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.tuning import TuneSettings
from tests.folders import exits_folder

#: Parameters of verbs that no settings class has.
OWN = {
    *("context", "model", "models", "evaluations", "data", "out", "figures", "exits", "exit_layers", "prompt"),
    *("prompt_file", "preset", "text_field", "as_json", "no_color", "shape", "promise", "tail_layers"),
    *("train_data", "help", "readout", "block", "vocabulary", "file_format", "verifier", "proposals"),
}
SETTINGS = {
    "generate": (DecodeSettings, GenerateSettings, PlaceSettings),
    "train": (TrainSettings, LearnSettings, AnswerSettings),
    "tune": (TuneSettings,),
    "scan": (ScanSettings,),
    "calibrate": (CalibrationSettings, PromiseSettings),
    "eval": (EvalSettings, Plan),
    "bench": (BenchSettings, ExitBenchSettings),
    "paper": (PaperPlan, Plan),
}


def parameters(verb):
    return {item.name: item for item in cli._parser().commands[verb].params}


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_default_is_its_fields(verb):
    derived = cli.VERBS[verb].derived
    shown = parameters(verb)
    assert len({item.flag for item in derived}) == len(derived)
    for item in derived:
        default = shown[item.name].default
        value = item.field.default if default is None else item.value(default)
        value = float(value) if item.field.name == "threshold" else value  # given as text: one, or one per exit
        assert value == item.field.default, (verb, item.flag)
        assert type(value) is type(item.field.default), (verb, item.flag)
        assert item.option.problem(item.field.default) is None
        assert shown[item.name].help
    assert set(shown) - {item.name for item in derived} <= OWN
    if "exit_layers" in shown and verb not in ("generate", "eval", "bench"):
        assert shown["exit_layers"].default == DEFAULT_LAYERS


@pytest.mark.parametrize("verb", SETTINGS)
def test_every_field_with_an_option_has_one(verb):
    fields = {(item.field.name, item.flag) for item in cli.VERBS[verb].derived}
    for settings in SETTINGS[verb]:
        for field in dataclasses.fields(settings):
            option = option_of(field)
            if option is not None and option.flag != "":
                assert (field.name, option.flag or f"--{field.name.replace('_', '-')}") in fields, field.name


def test_exit_options_of_train_are_fields_of_the_config():
    fields = {item.name: item for item in dataclasses.fields(ExitConfig)}
    assert set(CONFIG) <= set(fields)
    assert all(option.problem(fields[name].default) is None for name, option in CONFIG.items())
    assert ScanSettings.candidates == ExitConfig.candidates


def test_decoding_has_the_arguments_and_defaults_of_early_exit():
    arguments = set(inspect.signature(EarlyExit).parameters) - {"exits", "on_token", "confidence"}
    assert {field.name for field in dataclasses.fields(DecodeSettings)} <= arguments
    early = EarlyExit(Exits.from_pretrained(str(exits_folder())), measure="softmax_max")
    assert set(early.thresholds.values) == {DecodeSettings.threshold}
    assert (early.policy.name, early.window) == (DecodeSettings.policy, DecodeSettings.window)
    assert early.thresholds.schedule == DecodeSettings.schedule
    assert early.engine == DecodeSettings.engine


def test_names_are_those_of_the_registries():
    assert set(STATE_POLICIES) == set(POLICIES)
    assert set(MEASURES) == set(registries.MEASURES)
    assert set(DTYPES) == set(loading.DTYPES)
    assert set(THRESHOLD_SCHEDULES) == set(SCHEDULES)
    assert ",".join(DEFAULT_EXITS) == DEFAULT_LAYERS


def test_one_name_for_one_thing():
    flags = {verb: {option for item in parameters(verb).values() for option in item.opts} for verb in cli.VERBS}
    every = set().union(*flags.values())
    assert not every & {"--batch", "--new-tokens", "--new", "--exit-at", "--schedule", "--baseline-new"}
    assert {verb for verb in flags if "--exits" in flags[verb]} == {"generate", "eval", "calibrate", "bench", "export"}
    assert {verb for verb in flags if "--engine" in flags[verb]} == {"generate", "eval", "bench", "paper"}
    assert {verb for verb in flags if "--tokens-per-step" in flags[verb]} == {"train", "tune", "scan"}
    assert {verb for verb in flags if "--batch-size" in flags[verb]} == {"eval", "calibrate", "bench", "paper"}


OLD = [
    ("train", "--batch", "--tokens-per-step (tokens)"),
    ("scan", "--batch", "--tokens-per-step (tokens)"),
    ("eval", "--batch", "--batch-size (rows)"),
    ("bench", "--batch", "--batch-size (rows)"),
    ("train", "--exits", "--exit-layers"),
    ("tune", "--schedule", "--exit-schedule"),
    ("generate", "--schedule", "--threshold-schedule"),
    ("calibrate", "--new-tokens", "--max-new-tokens"),
    ("bench", "--new", "--max-new-tokens"),
    ("bench", "--exit-at", "--exit-layers"),
]


@pytest.mark.parametrize(("verb", "old", "new"), OLD)
def test_an_old_name_is_refused_with_the_new_one(verb, old, new, capsys):
    for words in ((old, "3"), (f"{old}=3",)):
        assert cli.run([verb, "x", *words]) == 2
        assert capsys.readouterr().err == f"error: {old} is now {new} in dynamax {verb}.\n"


def test_arguments_become_options():
    flags = {"batch_tokens": "--tokens-per-step", "new": "--max-new-tokens", "out": "--out", "x": "--x"}
    for message, expected in [
        ("training setting batch_tokens = 3: give more.", "--tokens-per-step 3: give more."),
        ("Lower `new` or `prompt_tokens`.", "Lower --max-new-tokens or `prompt_tokens`."),
        ("`out` 'a' is a file", "--out 'a' is a file"),
        ("new and out are words; y = 3, x=4", "new and out are words; y = 3, x=4"),
    ]:
        assert in_flags(message, flags) == expected


def test_library_errors_name_no_option():
    for settings, wrong in [
        (BenchSettings, {"spread": (2.0,)}),
        (BenchSettings, {"spread": (1.0,), "batches": (1,)}),
        (TrainSettings, {"batch_tokens": 8}),
        (CalibrationSettings, {"new_tokens": 0}),
        (Plan, {"batch": 0}),
        (TuneSettings, {"schedule": "every"}),
    ]:
        with pytest.raises(ValueError, match=next(iter(wrong))) as caught:
            settings(**wrong)
        assert "--" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "good", "bad", "words"),
    [
        ({"least": 1}, 1, 0, "give at least 1."),
        ({"least": 0, "most": 1}, 1.0, 1.1, "give between 0 and 1."),
        ({"above": 0, "below": 1}, 0.5, 1.0, "give between 0 and 1, both excluded."),
        ({"above": 0, "most": 1}, 1.0, float("nan"), "give above 0 and at most 1."),
        ({"choices": ("alpha", "beta")}, "beta", "bta", "give one of alpha, beta. Did you mean 'beta'?"),
        ({"least": 1}, (1, 2), (3, 0), "0 is not allowed: give at least 1."),
    ],
)
def test_bounds(how, good, bad, words):
    @dataclasses.dataclass
    class Bounded:
        value: object = setting(good, "A value.", **how)

    check_settings(Bounded(), "some setting")
    with pytest.raises(ValueError, match="some setting value = ") as caught:
        check_settings(Bounded(bad), "some setting")
    assert str(caught.value).endswith(words)


LIGHT = [
    ["--version"],
    ["generate", "transformer-ee", "--prompt", "a", "--threshold", "high"],
    ["generate", "transformer-ee", "--prompt", "a", "--policy", "foo"],
    ["generate", "transformer-ee", "--prompt", "a", "--window", "0"],
    ["generate", "transformer-ee", "--prompt", "a", "--wat"],
    ["generate", "transformer-ee", "--prompt", "a", "--exits", "8,12"],
    ["eval", "transformer-ee", "--out", "x", "--threshold", "0.9,high"],
    ["train", "transformer-ee", "--data", "x", "--out", "x", "--head", "mambo"],
    ["tune", "transformer-ee", "--data", "x", "--out", "x", "--method", "qlora"],
    ["scan", "transformer-ee", "--data", "x", "--seq-length", "1"],
    ["calibrate", "transformer-ee", "--data", "x", "--promise", "agreement>=0.9", "--confidence", "2"],
    ["bench", "--shape", "tiny-mamba", "--engine", "gpu"],
    ["bench", "transformer-ee", "--data", "x", "--repeats", "0"],
    ["paper", "--out", "x", "--heads", "lstm"],
]


def test_version_and_refusals_load_no_model_library():
    code = (
        "import sys, time; from dynamax_llm import cli\n"
        f"for words in {LIGHT!r}:\n"
        "    code = cli.run(words)\n"
        "    heavy = [name for name in ('torch', 'transformers') if name in sys.modules]\n"
        "    assert code == (0 if words == ['--version'] else 2) and not heavy, (words, code, heavy)\n"
        "print(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    version, seconds = done.stdout.splitlines()
    assert version.startswith("dynamax ")
    assert float(seconds) < 2.0
    assert done.stderr.count("error: ") == len(LIGHT) - 1


def test_the_package_and_its_version_come_at_once():
    for code, limit in [
        ("import dynamax_llm", 0.1),
        ("from dynamax_llm import cli; cli.run(['--version'])", 0.5),
        ("from dynamax_llm import cli; cli.run(['--help'])", 1.0),
    ]:
        timed = f"import sys, time\nstart = time.process_time()\n{code}\nprint(time.process_time() - start)"
        timed += "\nassert not {'torch', 'transformers'} & set(sys.modules)"
        done = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout.splitlines()[-1]) < limit, code
