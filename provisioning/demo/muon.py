"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al., 2024).

For a training of minutes it learns faster per step than AdamW: every direction of a weight matrix moves by the same
amount, also those whose gradients are small. The size of an update is matched to AdamW's (Liu et al., arXiv:2502.16982),
so that one learning rate serves both. Vectors, embeddings and the outermost layers are AdamW's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

# The quintic that drives all singular values towards 1 in a few steps: Jordan et al.'s coefficients.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_RMS_OF_ADAMW: Final = 0.2


def orthogonalize(matrices: Tensor, steps: int = 4) -> Tensor:
    """Return, for a stack (…, rows, columns), matrices with the same singular vectors and singular values near 1."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    # The iteration is a polynomial in the Gram matrix times x: it runs on the small square and touches x once.
    gram = x @ x.mT
    eye = torch.eye(gram.shape[-1])
    product = eye
    for step in range(steps):
        polynomial = _A * eye + _B * gram + _C * (gram @ gram)
        product = polynomial @ product
        if step < steps - 1:
            gram = polynomial @ gram @ polynomial
    x = product @ x
    turned: Tensor = x.mT if tall else x
    return turned


class Muon(torch.optim.Optimizer):
    """Muon for weight matrices and convolutions, whose kernels are read as (out, in · height · width)."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 (there is nothing to re-evaluate)
        """Apply one update."""
        for group in self.param_groups:
            # Equal shapes are stacked: one batched product instead of many small ones.
            stacks: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                nesterov = parameter.grad.lerp(state["momentum"], group["momentum"]).reshape(len(parameter), -1)
                stacks.setdefault(nesterov.shape, []).append((parameter, nesterov))
            for shape, pairs in stacks.items():
                directions = orthogonalize(torch.stack([matrix for _, matrix in pairs]))
                size = _RMS_OF_ADAMW * max(shape) ** 0.5 * group["lr"]
                for (parameter, _), direction in zip(pairs, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(direction.reshape(parameter.shape), alpha=size)
