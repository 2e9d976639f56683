"""The Muon optimizer: momentum whose update is made orthogonal, for matrices only.

Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
(https://kellerjordan.github.io/posts/muon/), coefficients and scale as there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Muon:
    """Optimizes matrices with Nesterov momentum and five Newton-Schulz iterations; `rate` may change at any step."""

    def __init__(self, matrices: Iterable[Tensor], rate: float, momentum: float = 0.95) -> None:
        self.rate = rate
        self.momentum = momentum
        self._state = [(matrix, torch.zeros_like(matrix)) for matrix in matrices]

    @torch.no_grad()
    def step(self) -> None:
        """Update the matrices by their gradients."""
        for matrix, velocity in self._state:
            if matrix.grad is None:
                continue
            velocity.lerp_(matrix.grad, 1 - self.momentum)
            update = orthogonal(matrix.grad.lerp(velocity, self.momentum))
            rows, columns = matrix.shape
            matrix.sub_(update, alpha=self.rate * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """Roughly the nearest semi-orthogonal matrix: all singular values come to lie near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    update: Tensor = x.T if matrix.shape[0] > matrix.shape[1] else x
    return update
