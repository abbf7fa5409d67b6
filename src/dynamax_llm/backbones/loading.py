"""Loading a backbone: the ordinary ``from_pretrained``, and errors that say what to do."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dynamax_llm.backbones import check_supported
from dynamax_llm.errors import BackboneError, UnsupportedModelError, UsageError
from dynamax_llm.registry import Registry

#: The trained backbones shipped inside the package, each a folder under ``reference``.
REFERENCE_BACKBONES = ("transformer-ee", "mamba-ee")
REFERENCE_FOLDER = Path(__file__).parent / "reference"
#: The head of the shipped exits that are used when none is named; all four kinds are shipped.
DEFAULT_HEAD = "mlp"

#: "auto" is the stored dtype on an accelerator and float32 on a CPU, where half precision is emulated and slower.
DTYPES: Registry[torch.dtype | None] = Registry(
    "dtype",
    {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16},
)

#: device_map words that spread layers over devices; transformers hands those to ``accelerate``.
SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: str | torch.device | dict | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A stock causal LM in eval mode and its tokenizer, from a folder, a hub id or a reference backbone's name.

    ``dtype`` "auto" keeps the stored dtype on an accelerator and computes in float32 on a CPU. ``device_map`` None
    means the CPU, a device ("cuda:0") puts the whole model there, "auto" or a dict spreads it (needs accelerate).
    The tokenizer pads on the left, with the end-of-text token where it has no padding token of its own.

    Raises UnsupportedModelError before any weight is read, UsageError for a wrong dtype or device, BackboneError for
    everything that is missing, unreachable or damaged. Pickled weights are refused, remote code is never run.
    """
    wanted: Any = dtype if isinstance(dtype, torch.dtype) else DTYPES.lookup(dtype)
    device = _single_device(device_map)
    source = _resolve(name_or_path)
    config = _load_config(source)
    on_cpu = device.type == "cpu" if device is not None else not torch.accelerator.is_available()
    if wanted is None:
        wanted = torch.float32 if on_cpu else config.dtype or torch.float32
    tokenizer = _load_tokenizer(source)
    placement = {"device_map": device_map} if device is None else {}
    model = _load_weights(source, config, wanted, placement)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise BackboneError(
            f"{source}: the tokenizer has {len(tokenizer)} entries and the model embeds {rows}; they do not match. "
            "Use the tokenizer the model was saved with."
        )
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return (model if device is None else model.to(device)).eval(), tokenizer


def peek(name_or_path: str | Path) -> PreTrainedConfig:
    """The configuration of a model that ``load`` would take as far as can be told without its weights.

    Raises UnsupportedModelError and BackboneError, as ``load`` does, without reading the weights.
    """
    return _load_config(_resolve(name_or_path))


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer alone, as ``load`` gives it. Raises BackboneError."""
    return _load_tokenizer(_resolve(name_or_path))


def shipped_exits(name_or_path: str | Path, head: str | None = None) -> Path | None:
    """The folder of exits shipped with a reference backbone, with this head or the default; None for other models.

    "four/HEAD" are the ones at the paper's four depths, trained earlier, on h and statistics: the grid's.
    """
    if str(name_or_path) not in REFERENCE_BACKBONES:
        return None
    folder = REFERENCE_FOLDER / str(name_or_path) / "exits" / (head or DEFAULT_HEAD)
    return folder if folder.is_dir() else None


def _single_device(device_map: str | torch.device | dict | None) -> torch.device | None:
    """The one device asked for, or None where layers are spread. Raises UsageError for a device that is not there."""
    if isinstance(device_map, dict) or device_map in SPREADING:
        return None
    try:
        device = torch.device("cpu" if device_map is None else device_map)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(
            f"device {str(device_map)!r} cannot be used here ({_first_line(error)}). "
            f"Use cpu, cuda, cuda:0 …, or one of {', '.join(SPREADING)}."
        ) from error
    return device


def _resolve(name_or_path: str | Path) -> str:
    """The folder or hub id meant; refuses paths that are not model folders before the network is used."""
    name = str(name_or_path)
    if name in REFERENCE_BACKBONES:
        return str(REFERENCE_FOLDER / name)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            names = ", ".join(sorted(item.name for item in path.iterdir())[:5]) or "nothing"
            raise BackboneError(
                f"{name} is not a model folder: it has no config.json (it holds {names}). "
                "Give the folder that save_pretrained wrote, or a hub id."
            )
        return str(path)
    if path.exists():
        raise BackboneError(f"{name} is a file. Give the model's folder, or a hub id.")
    if not _HUB_ID.fullmatch(name):
        raise BackboneError(
            f"no such folder: {name!r}. Give an existing model folder, a hub id such as "
            f"mistralai/Mistral-7B-v0.3, or a shipped backbone: {', '.join(REFERENCE_BACKBONES)}."
        )
    return name


def _load_config(source: str) -> PreTrainedConfig:
    """The checked configuration: an adapter exists for its type and it describes a causal LM."""
    try:
        raw, _ = PreTrainedConfig.get_config_dict(source)
    except OSError as error:
        raise BackboneError(_unreachable(source, error)) from error
    if not isinstance(raw, dict) or not raw.get("model_type"):
        raise BackboneError(
            f"{source}: config.json is not a model configuration (it names no model_type). "
            "Save the model again with save_pretrained."
        )
    check_supported(raw["model_type"])
    built = [str(name) for name in raw.get("architectures") or ()]
    if built and not any(name.endswith("ForCausalLM") for name in built):
        raise UnsupportedModelError(
            f"{source} holds {', '.join(built)}, which is not a causal language model. "
            "DYNAMAX needs weights saved from a …ForCausalLM class."
        )
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the configuration classes raise whatever their validators raise
        raise BackboneError(
            f"{source}: config.json cannot be used ({_lines(error)}). "
            "Save the model again with save_pretrained, or fetch it anew."
        ) from error


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the left."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, padding_side="left")
        usable = len(tokenizer("Hello, world").input_ids) > 0
    except Exception as error:  # tokenizer files are parsed by several libraries, each with its own exceptions
        raise BackboneError(
            f"{source}: no usable tokenizer ({_first_line(error)}). The folder needs an intact tokenizer.json "
            "and tokenizer_config.json, as tokenizer.save_pretrained writes them."
        ) from error
    if not usable:
        raise BackboneError(f"{source}: the tokenizer turns text into nothing. Save it again with save_pretrained.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_weights(source: str, config: PreTrainedConfig, dtype: torch.dtype, placement: dict[str, Any]) -> Any:
    """The weights, every one of them: transformers would fill a missing one with noise and only warn."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **placement,
        )
    except OSError as error:
        raise BackboneError(
            f"{source}: no weights in safetensors form ({_first_line(error)}). "
            "Pickled weights are not loaded; save the model again with save_pretrained."
        ) from error
    except Exception as error:  # safetensors, accelerate and the model classes each raise their own
        raise BackboneError(
            f"{source}: the weights cannot be loaded ({_first_line(error)}). Fetch or save the model again."
        ) from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    wrong = sorted(item[0] if isinstance(item, tuple) else item for item in report["mismatched_keys"])
    for problem, names in (("lack", missing), ("have another shape than config.json says for", wrong)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise BackboneError(f"{source}: the weights {problem} {names[0]}{more}. Fetch or save the model again.")
    return model


def _unreachable(source: str, error: Exception) -> str:
    """Why a configuration could not be read, for a folder or a hub id."""
    if Path(source).is_dir():
        return f"{source}: config.json is not valid JSON. Save the model again with save_pretrained."
    near = difflib.get_close_matches(source, REFERENCE_BACKBONES, n=1)
    hint = f" Did you mean the shipped backbone {near[0]!r}?" if near else ""
    return (
        f"cannot load {source!r}: there is no such folder, and no model of this name could be fetched "
        f"({_first_line(error)}).{hint} Check the name and the connection, or give a model folder."
    )


def _first_line(error: BaseException) -> str:
    """The first line of a message, short enough to quote."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".: ")


def _lines(error: BaseException) -> str:
    """A message of several short lines on one."""
    return " ".join(str(error).split())[:300].rstrip(".: ")
