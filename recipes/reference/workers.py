"""The little of data parallelism this recipe needs; every function is a no-op in a single process."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


def start() -> torch.device:
    """Join the process group torchrun described, if any; returns this process's device."""
    cuda = torch.cuda.is_available()
    rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return device


def count() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """True in the process that prints and saves."""
    return not dist.is_initialized() or dist.get_rank() == 0


def my_share(windows: Tensor) -> Tensor:
    """This process's rows of the batch."""
    return windows.chunk(count())[dist.get_rank()] if count() > 1 else windows


def average_gradients(parameters: list[Tensor]) -> None:
    """Replace every .grad by its mean over the processes, in one exchange."""
    if count() == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= count()
    for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(piece.view_as(parameter))


def from_first(value: float, device: torch.device) -> float:
    """The first process's value, everywhere."""
    if count() == 1:
        return value
    shared = torch.tensor(value, device=device)
    dist.broadcast(shared, 0)
    return shared.item()
