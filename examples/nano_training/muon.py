"""Muon: momentum whose steps are made orthogonal, for hidden matrices, shared out among the processes of a run.

PyTorch's own computes in bfloat16 always, which a CPU without it does at a fortieth of the speed, and in every process
all over again.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from examples.nano_training.arithmetic import matrix_dtype

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: steepest at zero, https://kellerjordan.github.io/posts/muon/."""
ITERATIONS = 5
MOMENTUM = 0.95
SIZE = 0.2
"""Root mean square of a step per learning rate, AdamW's usual (arXiv 2502.16982)."""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    Args:
        matrices: parameters of two dimensions; with several processes they have the same gradients in all.
        lr: of AdamW's scale: steps are as large as AdamW's would be.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        assert all(matrix.ndim == 2 for group in self.param_groups for matrix in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            for matrix, update in zip(matrices, self._updates(matrices), strict=True):
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
    """Nearly U V' of a matrix U S V' (rows, columns): singular values between 0.7 and 1.2, by Newton and Schulz."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    wide = (matrix.T if tall else matrix).to(matrix_dtype(matrix.device))
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide.T if tall else wide).to(matrix.dtype)
