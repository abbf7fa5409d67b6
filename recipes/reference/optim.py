"""Muon for the layers' matrices, AdamW for everything else, and the learning-rate schedule.

torch.optim.Muon walks matrices one by one, which on 24 small layers costs more than the backward pass; here all
matrices of one shape are orthogonalised as one batch.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)  # Newton-Schulz coefficients of Muon (Jordan et al. 2024)


def orthogonalise(matrices: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, approximately: (K, r, c) -> (K, r, c), singular values near 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)).to(dtype)
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.transpose(1, 2) if tall else x).float()


class Optimizer:
    """Both optimizers behind one `step(scale)`; `scale` in [0, 1] multiplies every learning rate."""

    def __init__(
        self, model: nn.Module, matrix_lr: float, other_lr: float, decay: float = 0.05, compiled: bool = False
    ) -> None:
        shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
        decayed, plain = [], []
        for name, parameter in model.named_parameters():  # tied weights appear once
            if parameter.ndim == 2 and ".layers." in name:
                shapes[parameter.shape].append(parameter)
            else:
                (decayed if parameter.ndim == 2 else plain).append(parameter)
        self.matrices = list(shapes.values())
        self.momenta = [torch.zeros(len(group), *group[0].shape, device=group[0].device) for group in self.matrices]
        self.matrix_lr, self.other_lr, self.decay = matrix_lr, other_lr, decay
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
        on_gpu = next(model.parameters()).is_cuda
        self.adam = torch.optim.AdamW(groups, lr=other_lr, betas=(0.9, 0.95), eps=1e-10, fused=on_gpu)
        self.parameters = [p for group in self.matrices for p in group] + decayed + plain
        self._dtype = torch.bfloat16 if on_gpu else torch.float32
        self._orthogonalise = torch.compile(orthogonalise, dynamic=False) if compiled else orthogonalise

    @torch.no_grad()
    def step(self, scale: float, momentum: float = 0.95, clip: float = 1.0) -> Tensor:
        """One update from the parameters' .grad, which is cleared; returns the gradient norm before clipping."""
        gradients = [p.grad for p in self.parameters]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
        for group in self.adam.param_groups:
            group["lr"] = self.other_lr * scale
        self.adam.step()
        for parameters, buffer in zip(self.matrices, self.momenta, strict=True):
            gradient = torch.stack([p.grad for p in parameters])
            buffer.lerp_(gradient, 1 - momentum)
            update = self._orthogonalise(gradient.lerp(buffer, momentum), self._dtype)
            rows, columns = parameters[0].shape
            lr = self.matrix_lr * scale * max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(parameters, 1 - self.matrix_lr * scale * self.decay)
            torch._foreach_add_(parameters, list(update.unbind(0)), alpha=-lr)
        for parameter in self.parameters:
            parameter.grad = None
        return norm


def learning_rate(progress: float, warmup: float = 0.02, decay_from: float = 0.4) -> float:
    """Share of the peak rate at `progress` in [0, 1]: linear warm-up, flat, then linear to nearly zero."""
    if progress < warmup:
        return max(progress, 0.02 * warmup) / warmup
    return min(1.0, max(0.0, (1 - progress) / (1 - decay_from)) + 0.005)
