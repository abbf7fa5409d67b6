"""The exits of one backbone as a folder of two files: ``exits.json`` (what they are) and ``exits.safetensors``.

No pickle. Nothing is half-written: both files are made beside their targets and renamed, and the JSON names the
tensors' hash, so that files of two different saves are never taken for a pair. What is read back is checked before it
is used: format, version, shapes, finite values, hash; and, by ``check_backbone``, that the backbone is the right one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.backbones.fingerprint import explain_mismatch, fingerprint
from dynamax_llm.backbones.loading import shipped_exits
from dynamax_llm.errors import ArtifactCorruptError, ArtifactMismatchError, ArtifactVersionError, UsageError
from dynamax_llm.exits.config import PAPER_EXITS, ExitConfig, place_exits
from dynamax_llm.exits.features import MEASURES, ConfidenceEstimator, measure
from dynamax_llm.exits.files import fetch, prepare_folder, write_atomically
from dynamax_llm.exits.heads import ExitHeads
from dynamax_llm.exits.promise import Promise, digest, find_promise
from dynamax_llm.exits.readout import Lens, Readout
from dynamax_llm.version import installed_version

FORMAT = "dynamax-exits"
#: Raised when older DYNAMAX could misread what this one writes.
VERSION = 1
MANIFEST, TENSORS = "exits.json", "exits.safetensors"
#: What the manifest must hold, and the JSON type of each.
FIELDS: dict[str, type] = {
    "config": dict,
    "width": int,
    "vocab_size": int,
    "fingerprint": dict,
    "provenance": dict,
    "tensors_sha256": str,
}


@dataclass
class Exits:
    """Everything DYNAMAX adds to one backbone: where the exits are, their heads and lens, and whose they are.

    ``heads`` is None where a fixed measure decides, ``lens`` unless the readout is "lens". ``fingerprint`` identifies
    the backbone, ``width`` and ``vocab_size`` are its own. ``provenance`` says how the heads came about, ``promises``
    what calibration proved of them. ``drift_penalty``: by policy, what a token that leaves costs later ones, per exit,
    as training measured it for the heads.
    """

    config: ExitConfig
    heads: ExitHeads | None
    lens: Lens | None
    fingerprint: dict[str, Any]
    width: int
    vocab_size: int
    provenance: dict[str, Any] = field(default_factory=dict)
    promises: tuple[Promise, ...] = ()
    drift_penalty: dict[str, tuple[float, ...]] = field(default_factory=dict)
    _backbone: Backbone | None = field(default=None, repr=False, compare=False)

    @classmethod
    def untrained(
        cls,
        backbone: Backbone,
        layers: str | tuple[str | int | float, ...] = PAPER_EXITS,
        *,
        readout: str = "head",
        tail_layers: int = 1,
    ) -> Exits:
        """Exits without heads, to be judged by a confidence measure. Raises ExitPlacementError, UsageError."""
        if readout == "lens":
            raise UsageError("readout 'lens' is learned: train exits with it. Untrained exits use 'head' or 'tail'.")
        depths = place_exits(layers, backbone.n_layers)
        config = ExitConfig(
            depths, backbone.n_layers, head=None, readout=readout, tail_layers=tail_layers, candidates=0
        )
        return cls.of(backbone, config)

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        config: ExitConfig,
        heads: ExitHeads | None = None,
        lens: Lens | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> Exits:
        """Exits of this backbone; its fingerprint is taken here."""
        identity = fingerprint(backbone.model)
        return cls(config, heads, lens, identity, backbone.width, backbone.vocab_size, provenance or {})

    def estimator(self, name: str | None = None) -> ConfidenceEstimator:
        """The trained heads, or the measure called ``name``. Raises UsageError if there are no heads to use."""
        if name is not None:
            return measure(name)
        if self.heads is None:
            raise UsageError(f"these exits have no trained head. Name a confidence measure: {', '.join(MEASURES)}.")
        return self.heads

    def readout(self, backbone: Backbone) -> Readout:
        """How these exits speak on ``backbone``; a lens moves to its device."""
        return Readout(backbone, self.config, None if self.lens is None else self.lens.to(backbone.device))

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
        PolicyMismatchError if it is under another policy or judge, ArtifactMismatchError if it is another
        backbone's."""
        found = find_promise(self.promises, text, policy, measure)
        if found.fingerprint != digest(self.fingerprint) or found.readout != self.config.readout:
            raise ArtifactMismatchError(
                f"promise {found.text!r} was calibrated on another backbone or readout than these exits are for. "
                "Calibrate it here: dynamax calibrate."
            )
        return found

    def keep(self, promise: Promise) -> Exits:
        """These exits with one more promise; it takes the place of one with the same text, policy and judge."""
        others = tuple(item for item in self.promises if item.key != promise.key)
        return replace(self, promises=(*others, promise))

    def save(self, folder: str | Path) -> None:
        """Write the folder. Raises ArtifactError if it holds something else or cannot be written."""
        target = prepare_folder(folder, (MANIFEST, TENSORS))
        tensors = safetensors.torch.save(_state(self.heads, self.lens), metadata={"format": "pt"})
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
            "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
            "promises": [promise.to_json() for promise in self.promises],
            "drift_penalty": {policy: list(values) for policy, values in self.drift_penalty.items()},
        }
        # The manifest comes last: a save that dies in between leaves a hash that does not match, not a mixture.
        write_atomically(target / TENSORS, tensors)
        write_atomically(target / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False).encode())

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path) -> Exits:
        """Read a folder or hub repository that ``save`` wrote, or what ships with a reference backbone, by its name.

        Raises ArtifactError if there is none, ArtifactVersionError if it is newer than this DYNAMAX,
        ArtifactCorruptError, naming the field or tensor, if it is damaged.
        """
        name = str(shipped_exits(folder_or_hub_id) or folder_or_hub_id)
        manifest_path, tensors_path = fetch(name, (MANIFEST, TENSORS))
        manifest = _read_manifest(manifest_path)
        config = _read_config(manifest_path, manifest)
        heads, lens = _empty_modules(manifest_path, config, manifest["width"])
        blob = tensors_path.read_bytes()
        tensors = _read_tensors(tensors_path, blob)
        _check_tensors(tensors_path, tensors, _state(heads, lens))
        if hashlib.sha256(blob).hexdigest() != manifest["tensors_sha256"]:
            raise _corrupt(tensors_path, f"its hash is not the one {MANIFEST} names; the two belong to different saves")
        heads, lens = _filled(heads, "heads.", tensors), _filled(lens, "lens.", tensors)
        identity, provenance = manifest["fingerprint"], manifest["provenance"]
        promises = _read_promises(manifest_path, manifest, len(config.layers))
        drift_penalty = _read_drift_penalty(manifest_path, manifest, len(config.layers))
        return cls(
            config,
            heads,
            lens,
            identity,
            manifest["width"],
            manifest["vocab_size"],
            provenance,
            promises,
            drift_penalty,
        )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise _corrupt(path, f"it is no valid JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _corrupt(path, f'it does not say "format": "{FORMAT}", so it is no set of exits')
    version = manifest.get("version")
    if not isinstance(version, int) or version < 1:
        raise _corrupt(path, f"its version is {version!r}, not a positive whole number")
    if version > VERSION:
        raise ArtifactVersionError(
            f"{path} has format version {version}, written by DYNAMAX {manifest.get('dynamax', '?')}; this one reads "
            f"up to {VERSION}. Upgrade: pip install --upgrade dynamax-llm."
        )
    for name, kind in FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            raise _corrupt(path, f"its field {name!r} is missing or no {kind.__name__}")
    return manifest


def _read_config(path: Path, manifest: Mapping[str, Any]) -> ExitConfig:
    try:
        config = ExitConfig.from_json(manifest["config"])
        placed = place_exits(config.layers, config.n_layers)
    except (TypeError, KeyError, ValueError) as error:  # UsageError is a ValueError
        raise _corrupt(path, f"its config cannot be used ({error})") from error
    if placed != config.layers:
        raise _corrupt(path, f"its exits {config.layers} are not in order")
    return config


def _read_drift_penalty(path: Path, manifest: Mapping[str, Any], n_exits: int) -> dict[str, tuple[float, ...]]:
    """The optional field "drift penalty"."""
    found = manifest.get("drift_penalty", manifest.get("disturbance", {}))
    try:
        by_policy = {str(policy): tuple(map(float, values)) for policy, values in found.items()}
    except (AttributeError, TypeError, ValueError):
        raise _corrupt(path, "its field 'drift_penalty' does not hold numbers by policy") from None
    for policy, values in by_policy.items():
        if len(values) != n_exits or not all(0.0 <= value < math.inf for value in values):
            raise _corrupt(path, f"its disturbance under {policy!r} is not {n_exits} numbers of 0 or more")
    return by_policy


def _read_promises(path: Path, manifest: Mapping[str, Any], n_exits: int) -> tuple[Promise, ...]:
    """The records of the optional field "promises"."""
    records = manifest.get("promises", [])
    if not isinstance(records, list):
        raise _corrupt(path, "its field 'promises' is no list")
    promises = []
    for number, record in enumerate(records, start=1):
        try:
            promises.append(Promise.from_json(record))
        except (ValueError, TypeError) as error:
            raise _corrupt(path, f"its promise {number} cannot be used: {error}") from error
        if len(promises[-1].thresholds) != n_exits:
            raise _corrupt(path, f"its promise {number} cannot be used: its field 'thresholds' is not one per exit")
    return tuple(promises)


def _empty_modules(path: Path, config: ExitConfig, width: int) -> tuple[ExitHeads | None, Lens | None]:
    """The modules the config describes, without memory: a damaged size must not ask for gigabytes."""
    try:
        with torch.device("meta"):
            heads = None if config.head is None else ExitHeads(config, width)
            lens = Lens(len(config.layers), width, config.lens_rank) if config.readout == "lens" else None
    except (RuntimeError, ValueError, TypeError) as error:
        raise _corrupt(path, f"its config describes no head that can be built ({error})") from error
    return heads, lens


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
            raise _corrupt(path, f"the tensor {name!r} has shape {have}, and {MANIFEST} asks for {want}")
        if not bool(torch.isfinite(tensors[name]).all()):
            raise _corrupt(path, f"the tensor {name!r} holds NaN or infinite values")


def _filled(module: Any, prefix: str, tensors: Mapping[str, Tensor]) -> Any:
    """The module with its tensors in place of the empty ones, in eval mode; None stays None."""
    if module is None:
        return None
    own = {name.removeprefix(prefix): value.float() for name, value in tensors.items() if name.startswith(prefix)}
    module.load_state_dict(own, assign=True)
    return module.requires_grad_(False).eval()


def _state(heads: nn.Module | None, lens: nn.Module | None) -> dict[str, Tensor]:
    """Every tensor of the artifact under its name in the file, float32."""
    named: dict[str, Tensor] = {}
    for prefix, module in (("heads.", heads), ("lens.", lens)):
        if module is not None:
            named |= {prefix + name: value.detach().float() for name, value in module.state_dict().items()}
    # Views of one tensor would be refused by safetensors; the file holds each by itself.
    return {name: value if value.is_meta else value.cpu().clone().contiguous() for name, value in named.items()}


def _corrupt(path: Path, problem: str) -> ArtifactCorruptError:
    return ArtifactCorruptError(f"{path} is damaged: {problem}. Copy the exits again, or train them anew.")


def _origin(provenance: Mapping[str, Any]) -> str:
    """Where the right backbone came from, if training recorded it."""
    model = provenance.get("model")
    return f" ({model})" if model else ""
