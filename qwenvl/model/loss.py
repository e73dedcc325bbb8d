"""Next-token cross-entropy that costs memory only where tokens are supervised, and keeps no logits for training."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from qwenvl.model.quantized_head import QuantizedHeadCrossEntropy, comes_in_pieces

IGNORED = -100

# Rows of logits widened to float32 at a time: 256 rows of the published vocabulary are 156 MB.
ROWS_AT_A_TIME = 256


class SummedCrossEntropy(torch.autograd.Function):
    """Sum of -log p(target) over rows of logits, in float32, a few rows at a time in both directions.

    Autograd's own cross-entropy keeps a float32 copy of everything; here backward recomputes each piece from the
    logits, which are kept anyway, and the row's log-sum-exp.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        log_sums = torch.empty(rows.shape, dtype=total.dtype, device=logits.device)
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            piece = slice(start, start + ROWS_AT_A_TIME)
            wide = logits[rows[piece]].to(total.dtype)
            log_sums[piece] = wide.logsumexp(-1)
            total += (log_sums[piece] - wide.gather(1, targets[piece, None])[:, 0]).sum()
        ctx.save_for_backward(logits, rows, targets, log_sums)
        return total

    @staticmethod
    def backward(ctx, grad_total: torch.Tensor):
        logits, rows, targets, log_sums = ctx.saved_tensors
        grad_logits = torch.zeros_like(logits)
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            piece = slice(start, start + ROWS_AT_A_TIME)
            wide = (logits[rows[piece]].to(log_sums.dtype) - log_sums[piece, None]).exp_()
            wide.scatter_add_(1, targets[piece, None], -torch.ones_like(wide[:, :1]))
            grad_logits[rows[piece]] = (wide * grad_total).to(logits.dtype)
        return grad_logits, None, None


class HeadCrossEntropy(torch.autograd.Function):
    """Sum of -log p(target) over rows of hidden states through a head's matrix, a few rows at a time.

    The loss is a sum, so its gradients need nothing from behind it but one factor: they are made right away, beside
    the loss, while a piece's logits are there. Kept for backward are rows as wide as the hidden states, and one buffer
    for the matrix where it is trained. Against keeping or recomputing logits: no logits, no product a second time.
    """

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int, for_training: bool
    ) -> torch.Tensor:
        wide_type = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=wide_type, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if for_training and ctx.needs_input_grad[0] else None
        grad_weight = None
        if for_training and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=wide_type)
        for start in range(0, len(hidden), chunk):
            piece = slice(start, start + chunk)
            rows, target = hidden[piece].to(weight.dtype), targets[piece, None]
            wide = (rows @ weight.T).to(wide_type)
            log_sums = wide.logsumexp(-1, keepdim=True)
            total += (log_sums - wide.gather(1, target)).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad_logits = wide.sub_(log_sums).exp_()
            grad_logits.scatter_add_(1, target, -torch.ones_like(log_sums))
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[piece] = grad_logits @ weight
            if grad_weight is not None:
                # In float32 also where the matrix is in 16 bits: many pieces are added up.
                grad_weight.addmm_(grad_logits.T.to(wide_type), rows.to(wide_type))
        # Not as saved tensors: activation offloading would carry them to the host and back.
        ctx.gradients = (grad_hidden, grad_weight)
        ctx.weight_type = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total: torch.Tensor):
        if ctx.gradients is None:
            raise RuntimeError("the loss at supervised positions was gone backward through already")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            grad_hidden *= grad_total
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_total).to(ctx.weight_type)
        return grad_hidden, grad_weight, None, None, None


def supervised_loss(
    hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, *, chunk: int = ROWS_AT_A_TIME
) -> torch.Tensor:
    """Cross-entropy summed over rows of hidden states, without ever having the logits of all of them.

    Args:
        hidden: (rows, hidden), the states that predict, after the final norm.
        head: gives logits. One that is a single matrix (plain, or trained beside an adapter) goes through
            `HeadCrossEntropy`, one in 4 bits through `quantized_head.QuantizedHeadCrossEntropy`. Any other (with LoRA
            on it, or sharded by ZeRO-3) is called on one piece after the other, and again in backward.
        targets: (rows,), ids.
        chunk: rows that have logits at a time.

    Returns:
        A scalar, in float32 at least; backward goes through it once. Zero, with gradients of zero, without rows.
    """
    # A matrix trained in float32 is to be computed with in float32, whatever autocast says.
    with _without_autocast(hidden.device.type):
        if comes_in_pieces(head, hidden):
            return QuantizedHeadCrossEntropy.apply(hidden, head, targets, chunk, torch.is_grad_enabled())
        weight = _matrix_of(head, hidden)
        if weight is not None:
            return HeadCrossEntropy.apply(hidden, weight, targets, chunk, torch.is_grad_enabled())
        pieces = range(0, max(len(hidden), 1), chunk)
        if len(pieces) == 1:
            return _loss_of_piece(hidden, head, targets)
        return sum(
            checkpoint(_loss_of_piece, hidden[at : at + chunk], head, targets[at : at + chunk], use_reentrant=False)
            for at in pieces
        )


def in_type_of(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states in the type that a head takes: one trained in float32 beside 16-bit blocks, its own; 4-bit codes
    have none."""
    return hidden.to(head.weight.dtype) if head.weight.is_floating_point() else hidden


def _loss_of_piece(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor) -> torch.Tensor:
    logits = head(in_type_of(head, hidden))
    return SummedCrossEntropy.apply(logits, torch.arange(len(logits), device=logits.device), targets)


def _without_autocast(device_type: str) -> AbstractContextManager:
    if not torch.amp.is_autocast_available(device_type):  # as of the meta device, on which memory is planned
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _matrix_of(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor | None:
    """(vocabulary, hidden) of a head that is a matrix and nothing else, here and now; None of any other."""
    if getattr(head, "bias", None) is not None or not hasattr(head, "weight"):
        return None
    # With LoRA on a head, `weight` is the base's alone. PEFT's ModulesToSaveWrapper, around a head that is trained
    # beside an adapter, gives the copy in use; it is known by its attribute, so that the model does not need PEFT.
    if type(head) is not nn.Linear and not isinstance(getattr(head, "modules_to_save", None), nn.ModuleDict):
        return None
    weight = head.weight
    # Until its module is called: on the meta device (offloaded), empty (ZeRO-3), or a piece (FSDP2).
    is_there = weight.ndim == 2 and weight.is_meta == hidden.is_meta and not isinstance(weight, DTensor)
    return weight if is_there else None


def supervised_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a supervised token is predicted, and which: position t predicts token t + 1.

    Args:
        labels: (batch, length), the ids themselves, -100 where not trained.

    Returns:
        Indices into the rows laid end to end (batch * length), and the ids there; waits for the device.
    """
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    targets = targets.flatten()
    rows = (targets != IGNORED).nonzero()[:, 0]
    return rows, targets[rows]


def mean_loss(total: torch.Tensor, rows: int, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """A summed loss divided by the supervised tokens of the whole accumulated step, or of this batch if None.

    Zero, with a gradient of zeros, when nothing is supervised and `num_items_in_batch` is given; NaN (a mean over
    nothing) when it is not.
    """
    if num_items_in_batch is None:
        return total / rows if rows else total / total.new_zeros(())
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def next_token_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of each token given those before it, over the labels that are not -100.

    Args:
        logits: (batch, length, vocabulary), any float type; never copied whole.
        labels: (batch, length), the ids themselves (the shift by one happens here), -100 where not trained.
        num_items_in_batch: see `mean_loss`.

    Returns:
        A scalar, in float32 at least.
    """
    # Row indices into the unshifted logits save a shifted copy of them.
    rows, targets = supervised_positions(labels.to(logits.device))
    total = SummedCrossEntropy.apply(logits.flatten(0, 1), rows, targets)
    return mean_loss(total, len(rows), num_items_in_batch)
