"""The device: its name, its copy bandwidth, how much was allocated on it."""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess

import torch

from dynamax_llm.evaluation.bench.document import Place
from dynamax_llm.evaluation.common.timing import seconds

#: Bytes of a copy: far more than caches hold.
COPIED = {"cuda": 2 << 30, "cpu": 64 << 20}
TRIALS, COPIES = 5, 4


def describe(device: torch.device, dtype: torch.dtype) -> Place:
    """Name and driver of the device, and the bandwidth of a copy within it: the median of five trials."""
    on_gpu = device.type == "cuda"
    size = COPIED["cuda" if on_gpu else "cpu"]
    if on_gpu:
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    return Place(
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        dtype=str(dtype).removeprefix("torch."),
        copy_bandwidth=copy_bandwidth(device, size),
        copy_bytes=size,
        driver=_driver() if on_gpu else None,
        cuda=torch.version.cuda if on_gpu else None,
    )


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes/s, read and written, of copies of ``size`` bytes within the device."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)

    def copies() -> None:
        for _ in range(COPIES):
            target.copy_(source)

    rates = [2 * size * COPIES / seconds(copies, device) for _ in range(TRIALS)]
    return statistics.median(rates)


def forget_peak(device: torch.device) -> None:
    """Reset the peak of memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Bytes allocated at most since ``forget_peak``; None where torch does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    versions = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return versions[0] if versions else None
