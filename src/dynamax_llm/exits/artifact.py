"""The exits of one backbone as a folder of two files: ``exits.json`` (what they are) and ``exits.safetensors``.

No pickle. Nothing is half-written: both files are made beside their targets and renamed, and the JSON names the
tensors' hash, so that files of two different saves are never taken for a pair. What is read back is checked before it
is used: format, version, shapes, finite values, hash; and, by ``check_backbone``, that the backbone is the right one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import AliasChoices, BaseModel, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.backbones.fingerprint import explain_mismatch, fingerprint
from dynamax_llm.backbones.loading import shipped_exits
from dynamax_llm.errors import (
    ArtifactCorruptError,
    ArtifactMismatchError,
    ArtifactVersionError,
    PromiseError,
    UsageError,
)
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.confidence.measures import measure
from dynamax_llm.exits.config import PAPER_EXITS, ExitConfig, place_exits
from dynamax_llm.exits.files import fetch, prepare_folder, write_atomically
from dynamax_llm.exits.promise import Promise, digest, explain, find_promise, seal
from dynamax_llm.exits.readouts.base import Readout, build_readout
from dynamax_llm.exits.registries import MEASURES, READOUTS
from dynamax_llm.version import installed_version

FORMAT = "dynamax-exits"
#: Raised when older DYNAMAX could misread what this one writes. 1: flat options, promises without a digest.
VERSION = 2
MANIFEST, TENSORS = "exits.json", "exits.safetensors"


class _Manifest(BaseModel):
    """What ``exits.json`` must hold beside its format and version."""

    config: dict[str, Any]
    width: int
    vocab_size: int
    fingerprint: dict[str, Any]
    provenance: dict[str, Any]
    tensors_sha256: str
    promises: list[Any] = []
    drift_penalty: dict[str, list[Annotated[float, Field(ge=0.0, allow_inf_nan=False)]]] = Field(
        {}, validation_alias=AliasChoices("drift_penalty", "disturbance")
    )


@dataclass
class Exits:
    """Everything DYNAMAX adds to one backbone: where the exits are, their learned weights, and the backbone's identity.

    ``heads`` is None where there is a fixed measure alone, ``readout_weights`` where the readout has none.
    ``fingerprint`` identifies the backbone, ``width`` and ``vocab_size`` are its own. ``provenance`` tells how the
    heads were trained, ``promises`` what calibration proved of them. ``drift_penalty``: by policy, what a token that
    leaves costs later ones, per exit, as training measured it for the heads.
    """

    config: ExitConfig
    heads: ExitHeads | None
    readout_weights: nn.Module | None
    fingerprint: dict[str, Any]
    width: int
    vocab_size: int
    provenance: dict[str, Any] = field(default_factory=dict)
    promises: tuple[Promise, ...] = ()
    drift_penalty: dict[str, tuple[float, ...]] = field(default_factory=dict)
    _backbone: Backbone | None = field(default=None, repr=False, compare=False)
    _readout: tuple[tuple[int, ...], Readout] | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def untrained(
        cls,
        backbone: Backbone,
        layers: str | tuple[str | int | float, ...] = PAPER_EXITS,
        *,
        readout: str = "head",
        **options: Any,
    ) -> Exits:
        """Exits without heads, for a confidence measure; ``options`` are the readout's (``tail_layers=2``).

        Raises ExitPlacementError, UsageError.
        """
        if READOUTS.lookup(readout).learner is not None:
            untrained = [repr(name) for name, kind in READOUTS.items() if kind.learner is None]
            raise UsageError(
                f"readout {readout!r} is learned: train exits with it. Untrained exits use {' or '.join(untrained)}."
            )
        depths, own = place_exits(layers, backbone.n_layers), {"head": None, "candidates": 0, "readout": readout}
        config = ExitConfig.from_options(depths, backbone.n_layers, **own, **options)
        return cls.of(backbone, config, readout_weights=READOUTS[readout].new_weights(config, backbone.width))

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        config: ExitConfig,
        heads: ExitHeads | None = None,
        readout_weights: nn.Module | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> Exits:
        """Exits of this backbone; its fingerprint is taken here."""
        identity = fingerprint(backbone.model)
        return cls(config, heads, readout_weights, identity, backbone.width, backbone.vocab_size, provenance or {})

    def estimator(self, name: str | None = None) -> ConfidenceEstimator:
        """The trained heads, or the measure called ``name``. Raises UsageError if there are no heads to use."""
        if name is not None:
            return measure(name)
        if self.heads is None:
            raise UsageError(f"these exits have no trained head. Name a confidence measure: {', '.join(MEASURES)}.")
        return self.heads

    def readout(self, backbone: Backbone) -> Readout:
        """Their readout on ``backbone``; its weights move to that device. Kept for the next call, with the LM head's
        rows that it gathered, until the backbone or its LM head is another."""
        head = backbone.model.get_output_embeddings().weight
        counted = isinstance(head, Tensor) and not head.is_inference()  # others have no version
        key = (id(backbone), id(self.readout_weights), id(head), head._version if counted else 0)
        if self._readout is None or self._readout[0] != key:
            self._readout = (key, build_readout(backbone, self.config, self.readout_weights))
        return self._readout[1]

    def drive(self, model: nn.Module) -> Backbone:
        """The Backbone that drives ``model``, checked once and remembered, with its stacked weights.

        Raises UnsupportedModelError, ArtifactMismatchError.
        """
        if self._backbone is None or self._backbone.model is not model:
            backbone = adapt(model)
            self.check_backbone(backbone)
            return backbone
        return self._backbone

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise ArtifactMismatchError unless these exits were made for this backbone, whatever dtype it is loaded in.

        A model that passed is remembered and not hashed again.
        """
        if self._backbone is not None and self._backbone.model is backbone.model:
            return
        difference = explain_mismatch(self.fingerprint, fingerprint(backbone.model))
        if difference is not None:
            raise ArtifactMismatchError(
                f"these exits were made for another backbone: {difference}. Load the backbone they were trained on"
                f"{_origin(self.provenance)}, or train exits for this one: dynamax train MODEL --data … --out DIR."
            )
        self._backbone = backbone

    def promise(self, text: str, policy: str | None = None, measure: str | None = None) -> Promise:
        """The recorded promise ``text``. Raises UsageError if it cannot be read, PromiseError if it is not recorded,
        PolicyMismatchError if it is under another policy or estimator, ArtifactMismatchError if it is another
        backbone's."""
        found = find_promise(self.promises, text, policy, measure)
        if found.fingerprint != digest(self.fingerprint) or found.readout != self.config.readout:
            raise ArtifactMismatchError(
                f"promise {found.text!r} was calibrated on another backbone or readout than these exits are for. "
                "Calibrate it here: dynamax calibrate."
            )
        return found

    def keep(self, promise: Promise) -> Exits:
        """These exits with one more promise; it replaces one with the same text, policy and estimator."""
        others = tuple(item for item in self.promises if item.key != promise.key)
        tensors = _tensors(self.config, self.heads, self.readout_weights)
        basis = _basis(self.config.to_json(), self.fingerprint, tensors)
        return replace(self, promises=(*others, _sealed(promise, basis)))

    def save(self, folder: str | Path) -> None:
        """Write the folder. Raises ArtifactError if it holds something else or cannot be written, PromiseError if
        these exits changed since one of their promises was kept."""
        target = prepare_folder(folder, (MANIFEST, TENSORS))
        tensors = _tensors(self.config, self.heads, self.readout_weights)
        basis = _basis(self.config.to_json(), self.fingerprint, tensors)
        for promise in self.promises:
            if promise.digest != seal(promise.to_json(), basis):
                raise PromiseError(
                    f"{promise.label} was not made for these exits as they are now. Calibrate again and keep the "
                    "promise with Exits.keep, or save without it: dataclasses.replace(exits, promises=())."
                )
        blob = safetensors.torch.save(tensors, metadata={"format": "pt"})
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "dynamax": installed_version(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": self.config.to_json(),
            "width": self.width,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
            "provenance": self.provenance,
            "tensors_sha256": hashlib.sha256(blob).hexdigest(),
            "promises": [promise.to_json() for promise in self.promises],
            "drift_penalty": {policy: list(values) for policy, values in self.drift_penalty.items()},
        }
        # The manifest comes last: a save that dies in between leaves a hash that does not match, not a mixture.
        write_atomically(target / TENSORS, blob)
        write_atomically(target / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False).encode())

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path) -> Exits:
        """Read a folder or hub repository that ``save`` wrote, or what ships with a reference backbone, by its name.

        Raises ArtifactError if there is none, ArtifactVersionError if it is newer than this DYNAMAX,
        ArtifactCorruptError, naming the field, tensor or promise, if it is damaged or edited.
        """
        name = str(shipped_exits(folder_or_hub_id) or folder_or_hub_id)
        path, tensors_path = fetch(name, (MANIFEST, TENSORS))
        version, manifest = _read_manifest(path)
        config = _read_config(path, manifest.config)
        heads, weights = _empty_modules(path, config, manifest.width)
        blob = tensors_path.read_bytes()
        tensors = _read_tensors(tensors_path, blob)
        _check_tensors(tensors_path, tensors, _tensors(config, heads, weights))
        if hashlib.sha256(blob).hexdigest() != manifest.tensors_sha256:
            raise _corrupt(tensors_path, f"its hash is not the one {MANIFEST} names; the two belong to different saves")
        exits = cls(
            config,
            _filled(heads, "heads.", tensors),
            _filled(weights, f"{config.readout}.", tensors),
            manifest.fingerprint,
            manifest.width,
            manifest.vocab_size,
            manifest.provenance,
            _read_promises(path, version, manifest, tensors, config),
            {policy: tuple(values) for policy, values in manifest.drift_penalty.items()},
        )
        fault = None if weights is None else READOUTS[config.readout].fault(weights, manifest.vocab_size)
        if fault is not None:
            raise _corrupt(tensors_path, fault)
        for policy, values in exits.drift_penalty.items():
            if len(values) != len(config.layers):
                raise _corrupt(path, f"its drift penalty under {policy!r} is not {len(config.layers)} numbers")
        return exits


def _read_manifest(path: Path) -> tuple[int, _Manifest]:
    """The format version and the checked fields."""
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise _corrupt(path, f"it is not valid JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _corrupt(path, f'it does not say "format": "{FORMAT}", so it does not describe exits')
    version = manifest.get("version")
    if not isinstance(version, int) or version < 1:
        raise _corrupt(path, f"its version is {version!r}, not a positive whole number")
    if version > VERSION:
        raise ArtifactVersionError(
            f"{path} has format version {version}, written by DYNAMAX {manifest.get('dynamax', '?')}; this one reads "
            f"up to {VERSION}. Upgrade: pip install --upgrade dynamax-llm."
        )
    try:
        return version, _Manifest.model_validate(manifest, strict=True)
    except ValidationError as error:
        raise _corrupt(path, explain(error)) from error


def _read_config(path: Path, data: Mapping[str, Any]) -> ExitConfig:
    try:
        config = ExitConfig.from_json(data)
        drafts = READOUTS[config.readout].drafts
        placed = config.layers if drafts else place_exits(config.layers, config.n_layers)
    except (TypeError, KeyError, ValueError) as error:  # UsageError is a ValueError
        raise _corrupt(
            path, f"its config cannot be used ({error}); kinds of your own must be registered before loading"
        ) from error
    if placed != config.layers:
        raise _corrupt(path, f"its exits {config.layers} are not in order")
    return config


def _read_promises(
    path: Path, version: int, manifest: _Manifest, tensors: Mapping[str, Tensor], config: ExitConfig
) -> tuple[Promise, ...]:
    """The promises, each with a digest of this version, once it is known that they were not edited."""
    promises = []
    written = _basis(manifest.config, manifest.fingerprint, tensors)
    basis = {**written, "config": config.to_json()}
    for number, record in enumerate(manifest.promises, start=1):
        try:
            promise = Promise.from_json(record)
        except ValueError as error:
            raise _corrupt(path, f"its promise {number} cannot be used: {error}") from error
        if len(promise.thresholds) != len(config.layers):
            raise _corrupt(path, f"its promise {number} cannot be used: its field 'thresholds' is not one per exit")
        intact = promise.agrees_with_evidence() if version == 1 else promise.digest == seal(record, written)
        if not intact:
            raise ArtifactCorruptError(
                f"{path} was edited: {promise.label}, or the exits that it was calibrated for, are not what "
                "calibration wrote, so it guarantees nothing. Copy the exits again, or calibrate again: dynamax "
                "calibrate MODEL --exits DIR, after deleting the promise there."
            )
        promises.append(_sealed(promise, basis))
    return tuple(promises)


def _basis(config: Mapping[str, Any], identity: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What promises rest on, as JSON: configuration, backbone, and the bytes of every learned tensor."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().float().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} ".encode() + value.numpy().tobytes())
    return {"config": dict(config), "fingerprint": dict(identity), "tensors": digest.hexdigest()}


def _sealed(promise: Promise, basis: Mapping[str, Any]) -> Promise:
    return promise.model_copy(update={"digest": seal(promise.to_json(), basis)})


def _empty_modules(path: Path, config: ExitConfig, width: int) -> tuple[ExitHeads | None, nn.Module | None]:
    """The modules the config describes, without memory: a damaged size must not take gigabytes."""
    try:
        with torch.device("meta"):
            heads = None if config.head is None else ExitHeads(config, width)
            return heads, READOUTS[config.readout].new_weights(config, width)
    except (RuntimeError, ValueError, TypeError) as error:
        raise _corrupt(path, f"its config describes weights that cannot be built ({error})") from error


def _read_tensors(path: Path, blob: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(blob)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _corrupt(path, f"it cannot be read ({error})") from error


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Exactly the wanted tensors, in their shapes, all finite."""
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors:
            raise _corrupt(path, f"the tensor {name!r} is missing")
        if name not in wanted:
            raise _corrupt(path, f"it holds a tensor {name!r} that {MANIFEST} has no use for")
        have, want = tuple(tensors[name].shape), tuple(wanted[name].shape)
        if have != want:
            raise _corrupt(path, f"the tensor {name!r} has shape {have}, and {MANIFEST} describes {want}")
        if tensors[name].is_floating_point() != wanted[name].is_floating_point():
            raise _corrupt(path, f"the tensor {name!r} is {tensors[name].dtype}")
        if not bool(torch.isfinite(tensors[name]).all()):
            raise _corrupt(path, f"the tensor {name!r} holds NaN or infinite values")


def _filled(module: Any, prefix: str, tensors: Mapping[str, Tensor]) -> Any:
    """The module with its tensors in place of the empty ones, in eval mode; None stays None."""
    if module is None:
        return None
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    module.load_state_dict(own, assign=True)
    return module.requires_grad_(False).eval()


def _tensors(config: ExitConfig, heads: nn.Module | None, weights: nn.Module | None) -> dict[str, Tensor]:
    """Every tensor of the artifact under its name in the file, in the dtype it was trained to."""
    named: dict[str, Tensor] = {}
    for prefix, module in (("heads.", heads), (f"{config.readout}.", weights)):
        if module is not None:
            named |= {prefix + name: value.detach() for name, value in module.state_dict().items()}
    # Views of one tensor would be refused by safetensors; the file holds each by itself.
    return {name: value if value.is_meta else value.cpu().clone().contiguous() for name, value in named.items()}


def _corrupt(path: Path, problem: str) -> ArtifactCorruptError:
    return ArtifactCorruptError(f"{path} is damaged: {problem}. Copy the exits again, or train them anew.")


def _origin(provenance: Mapping[str, Any]) -> str:
    """Where the right backbone came from, if training recorded it."""
    model = provenance.get("model")
    return f" ({model})" if model else ""
