"""Muon: momentum whose steps are made orthogonal, for hidden matrices, shared out among the processes of a run.

PyTorch's own computes in bfloat16 always, which a CPU without it does at a fortieth of the speed, and in every process
all over again.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: steepest at zero, https://kellerjordan.github.io/posts/muon/."""
ITERATIONS = 5
MOMENTUM = 0.95
SIZE = 0.2
"""Root mean square of a step per learning rate, AdamW's usual (arXiv 2502.16982)."""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    Args:
        matrices: parameters of two dimensions, or groups of them that have an `lr` of their own; with several
            processes they have the same gradients in all.
        lr: of AdamW's scale: steps are as large as AdamW's would be.
    """

    def __init__(self, matrices: Iterable[nn.Parameter | dict[str, Any]], lr: float, weight_decay: float):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        assert all(matrix.ndim == 2 for group in self.param_groups for matrix in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            with torch.autocast(matrices[0].device.type, enabled=False):
                updates = self._updates(matrices)
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * SIZE * math.sqrt(max(matrix.shape)))

    def _updates(self, matrices: list[nn.Parameter]) -> list[torch.Tensor]:
        """Orthogonal directions of all matrices; each process makes its share of them, and all get all."""
        processes, own = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        sizes = [matrix.numel() for matrix in matrices]
        updates = torch.zeros(sum(sizes), device=matrices[0].device)
        shares = updates.split(sizes)
        for number, (matrix, share) in enumerate(zip(matrices, shares, strict=True)):
            state = self.state[matrix]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(matrix)
            momentum = state["momentum"].lerp_(matrix.grad, 1 - MOMENTUM)
            if number % processes == own:
                share.copy_(orthogonal(matrix.grad.lerp(momentum, MOMENTUM)).flatten())
        if processes > 1:
            dist.all_reduce(updates)
        return [share.view_as(matrix) for matrix, share in zip(matrices, shares, strict=True)]


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Nearly U V' of a float32 matrix U S V' (rows, columns): singular values from 0.7 to 1.2, by Newton and Schulz.

    Every iteration multiplies W from the left by a polynomial p of W W'. So W itself, often several times as wide as
    high, is needed at both ends only: between them W W' becomes p W W' p. That asks for float32: eigenvalues near zero
    that rounding makes clearly negative would grow from one iteration to the next.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    gram, product = wide @ wide.T, None
    for iteration in range(ITERATIONS):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        product = polynomial if product is None else polynomial @ product
        if iteration < ITERATIONS - 1:
            gram = polynomial @ gram @ polynomial
    wide = product @ wide
    return wide.T if tall else wide
