"""Provenance of a document: command, time, machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from dynamax_llm.backbones import Backbone
from dynamax_llm.backbones.fingerprint import fingerprint
from dynamax_llm.evaluation.common.documents import BackboneFacts, Run
from dynamax_llm.version import installed_version, processor_name

#: Distributions whose versions affect results.
PACKAGES = {"torch": "torch", "transformers": "transformers", "lm_eval": "lm_eval"}


def run_facts(command: str, seconds: float) -> Run:
    """The facts of a run that ends now."""
    return Run(
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        hardware=hardware(),
        versions=versions(),
        commit=commit(),
    )


def backbone_facts(name: str, backbone: Backbone) -> BackboneFacts:
    """The backbone that was measured."""
    return BackboneFacts(
        name=name,
        model_type=backbone.model_type,
        n_layers=backbone.n_layers,
        parameters=sum(parameter.numel() for parameter in backbone.model.parameters()),
        fingerprint=str(fingerprint(backbone.model)["weights"]),
    )


def versions() -> dict[str, str]:
    """Versions by name; a package that is not installed is left out."""
    versions = {"dynamax": installed_version(), "python": platform.python_version()}
    for name, distribution in PACKAGES.items():
        try:
            versions[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return versions


def hardware() -> str:
    """The accelerators if there are any, the processor, its cores, and the threads in use."""
    chips = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    return ", ".join([*chips, f"{processor_name()}, {cores} cores, {threads} thread{'' if threads == 1 else 's'}"])


def commit() -> str | None:
    """The commit of the checkout this code runs from, "+" added if files differ from it; None outside of one."""
    here = Path(__file__).resolve().parent
    try:
        head = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
