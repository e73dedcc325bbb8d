"""Muon: momentum with orthogonalised updates, for hidden matrices, distributed over the processes of a run.

`torch.optim.Muon` always computes in bfloat16, which is 40 times slower on a CPU without it, and computes every update
in every process.
"""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import ParamsT

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration, https://kellerjordan.github.io/posts/muon/."""
ITERATIONS = 5
MOMENTUM = 0.95
SIZE = 0.2
"""Root mean square of an update divided by the learning rate, as is typical of AdamW (arXiv 2502.16982)."""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    Args:
        matrices: parameters of two dimensions, or parameter groups of them. All processes of a run need the same
            gradients.
        lr: on AdamW's scale: updates are as large as AdamW's would be.
    """

    def __init__(self, matrices: ParamsT, lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        assert all(matrix.ndim == 2 for group in self.param_groups for matrix in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures: the trainers give none
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            with torch.autocast(matrices[0].device.type, enabled=False):
                updates = self._updates(matrices, [matrix.grad for matrix in matrices])
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * SIZE * math.sqrt(max(matrix.shape)))

    def _updates(self, matrices: list[nn.Parameter], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Orthogonal directions of all matrices; each process computes a part, and an all-reduce gives them to all."""
        processes, own = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        sizes = [matrix.numel() for matrix in matrices]
        updates = torch.zeros(sum(sizes), device=matrices[0].device)
        shares = updates.split(sizes)
        for number, (matrix, gradient, share) in enumerate(zip(matrices, gradients, shares, strict=True)):
            state = self.state[matrix]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(matrix)
            momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
            if number % processes == own:
                share.copy_(orthogonal(gradient.lerp(momentum, MOMENTUM)).flatten())
        if processes > 1:
            dist.all_reduce(updates)
        return [share.view_as(matrix) for matrix, share in zip(matrices, shares, strict=True)]


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Approximate U V' of a float32 matrix U S V' (rows, columns) by a Newton-Schulz iteration.

    The result has singular values from 0.7 to 1.2. Each iteration multiplies W from the left by a polynomial p of W
    W'. W may have many more columns than rows, so only W W' is iterated, to p W W' p, and the product of all p is
    applied to W at the end. This needs float32: eigenvalues that rounding makes clearly negative would grow with each
    iteration.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    gram = wide @ wide.T
    product: torch.Tensor | None = None
    for iteration in range(ITERATIONS):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        product = polynomial if product is None else polynomial @ product
        if iteration < ITERATIONS - 1:
            gram = polynomial @ gram @ polynomial
    assert product is not None, "there is an iteration"
    wide = product @ wide
    return wide.T if tall else wide
