"""The multi-exit loss of `dynamax_llm.training.multi_exit`, its gradient by hand: logits never outlive a slice.

What the loss is (which exits a step trains, what each weighs, what it learns from) is that module's. Here the teacher
is the model's own last layer, held fixed, and the last layer learns from the text alone. The gradient with respect to
exit e's logits is then w_e (p_e - (1 - k) onehot - k p_L): one expression that also gives the last layer's with w = 1,
k = 0. Slices of tokens keep memory at a few hundred megabytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dynamax_llm.training.multi_exit import Mixture

SLICE = 8192  # tokens per slice of the vocabulary products


def slice_gradient(states: Tensor, targets: Tensor, head: Tensor, hard: Tensor, soft: Tensor) -> tuple[Tensor, ...]:
    """Cross-entropy sums and gradients of one slice, the last layer's row last.

    states (E, n, d) normed, targets (n), head (V, d) in the states' dtype; hard, soft (E) float32 weights of
    onehot and of the last layer's distribution, both already divided by the number of tokens.
    Returns CE summed over tokens (E), d loss / d states (E, n, d), d loss / d head (V, d).
    """
    logits = states @ head.T  # (E, n, V)
    wide = logits.float()
    normal = torch.logsumexp(wide, -1, keepdim=True)  # (E, n, 1)
    index = targets[None, :, None].expand(states.shape[0], -1, -1)
    losses = (normal - torch.gather(logits, -1, index).float()).sum((1, 2))
    probable = torch.exp(wide - normal)
    onehot = torch.arange(head.shape[0], device=head.device) == targets[:, None]  # (n, V), fused, never stored
    last = torch.exp(wide[-1] - normal[-1])
    hard, soft = hard[:, None, None], soft[:, None, None]
    gradient = ((hard + soft) * probable - torch.where(onehot, hard, 0.0) - soft * last).to(states.dtype)
    of_states = gradient @ head
    of_head = gradient.flatten(0, 1).T @ states.flatten(0, 1)
    return losses, of_states, of_head


class MultiExitLoss:
    """Runs `slice_gradient` over a batch and sends the result into autograd."""

    def __init__(self, distil: float = 0.7, exit_weight: float = 1.0, compiled: bool = False) -> None:
        self.distil, self.exit_weight = distil, exit_weight
        self._slice: Callable[..., tuple[Tensor, ...]] = (
            torch.compile(slice_gradient, dynamic=False) if compiled else slice_gradient
        )

    def weights(self, exits: list[int], tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(hard, soft) weights per readout, exits first and the last layer at the end, shape (E + 1)."""
        mixture = Mixture.of(exits, self.distil, self.exit_weight)
        return torch.tensor(mixture.hard, device=device) / tokens, torch.tensor(mixture.soft, device=device) / tokens

    def backward(self, normed: list[Tensor], exits: list[int], targets: Tensor, head: Tensor) -> Tensor:
        """Accumulate all gradients; returns mean cross-entropy per readout (E + 1), the last layer's last.

        normed: the exits' and the last layer's hidden states (B, T, d) after the final norm; targets (B, T).
        """
        states = torch.stack([h.detach().flatten(0, 1) for h in normed])  # (E + 1, N, d)
        targets = targets.flatten()
        tokens = targets.numel()
        hard, soft = self.weights(exits, tokens, states.device)
        kernel = head.detach().to(states.dtype)
        of_states = torch.empty_like(states)
        of_head = torch.zeros_like(head, dtype=torch.float32)
        losses = torch.zeros(len(normed), device=states.device)
        for start in range(0, tokens, SLICE):
            part = slice(start, start + SLICE)
            loss, of_part, of_kernel = self._slice(states[:, part], targets[part], kernel, hard, soft)
            of_states[:, part] = of_part
            of_head += of_kernel
            losses += loss
        torch.autograd.backward(normed, [g.view_as(h) for g, h in zip(of_states, normed, strict=True)])
        head.grad = of_head if head.grad is None else head.grad + of_head
        return losses / tokens
