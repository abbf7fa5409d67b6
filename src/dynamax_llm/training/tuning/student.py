"""What a tuning trains, and its teacher. The model that was given is never changed.

``lora`` puts low-rank adapters (arXiv 2106.09685, through peft) on the linear maps of the decoder layers and removes
them afterwards: the model's own weights are frozen throughout, and with the adapters disabled it is the teacher.
``full`` trains a float32 copy of the whole model; the model that was given is the teacher.

In a Mamba mixer only the maps into it are adapted: transformers' fused kernels read the weights of ``out_proj`` and
``dt_proj`` without calling the adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.errors import UsageError
from dynamax_llm.training.tuning.settings import TuneSettings

#: Maps of a Mamba mixer that kernels may read without calling the module.
UNADAPTED = ("out_proj", "dt_proj")
ADAPTER = "default"


@dataclass(frozen=True)
class Student:
    """A backbone in training."""

    backbone: Backbone
    parameters: dict[str, nn.Parameter]  # those that are trained, by name
    teacher: Callable[[], Any]  # context manager: the untouched model as a Backbone
    weights: Callable[[], dict[str, Tensor]]  # the whole tuned model's state dict, adapters merged


@contextmanager
def student(backbone: Backbone, settings: TuneSettings) -> Iterator[Student]:
    """The backbone made ready for tuning; when this ends, the model and its flags are as they were.

    Raises UsageError if peft is needed and not installed, or no layer has a map that adapters fit on.
    """
    model = backbone.model
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        if settings.method == "full":
            yield _full(backbone)
        else:
            yield from _adapted(backbone, settings)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _full(backbone: Backbone) -> Student:
    model = copy.deepcopy(backbone.model).float().requires_grad_(True)
    return Student(adapt(model), dict(model.named_parameters()), lambda: nullcontext(backbone), model.state_dict)


def _adapted(backbone: Backbone, settings: TuneSettings) -> Iterator[Student]:
    peft = check_peft()
    model, names = backbone.model, adaptable(backbone)
    if not names:
        raise UsageError(f"no layer of this {backbone.model_type} has a linear map for LoRA: use `method` full.")
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=names, bias="none")
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        tuner = peft.LoraModel(model, config, ADAPTER)
    try:
        model.eval()
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for parameter in parameters.values():
            parameter.data = parameter.data.float()

        @contextmanager
        def teacher() -> Iterator[Backbone]:
            tuner.disable_adapter_layers()
            try:
                yield backbone
            finally:
                tuner.enable_adapter_layers()

        yield Student(backbone, parameters, teacher, lambda: _merged(model))
    finally:
        tuner.unload()


def adaptable(backbone: Backbone) -> list[str]:
    """Full names of the linear maps inside the decoder layers that adapters may sit on."""
    modules = dict(backbone.model.named_modules())
    layers = {id(module) for layer in backbone.layers for module in layer.modules()}

    def fits(name: str, module: nn.Module) -> bool:
        parent, _, last = name.rpartition(".")
        in_mixer = last in UNADAPTED and hasattr(modules[parent], "conv1d")
        return type(module) is nn.Linear and id(module) in layers and not in_mixer

    return [name for name, module in modules.items() if fits(name, module)]


def _merged(model: nn.Module) -> dict[str, Tensor]:
    """The state dict the model would have with its adapters folded in, which is done in float32."""
    weights = {
        name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if ".lora_" not in name
    }
    merged: dict[int, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):  # shared layers have several names
        if hasattr(module, "lora_A"):
            if id(module) not in merged:
                weight = module.base_layer.weight
                merged[id(module)] = (weight.float() + module.get_delta_weight(ADAPTER).float()).to(weight.dtype)
            weights[f"{name}.weight"] = merged[id(module)]
    return weights


def check_peft() -> Any:
    """The peft library. Raises UsageError if it is not installed."""
    try:
        import peft  # heavy, and only needed here
    except ImportError as error:
        raise UsageError(
            f"tuning with LoRA needs peft, which is not installed ({error}). "
            "Install it: pip install 'dynamax-llm[tune]', or use `method` full."
        ) from error
    return peft
