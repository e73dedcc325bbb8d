"""Next-token cross-entropy: memory only for supervised positions, and no logits kept for training."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from qwenvl.model.quantized_head import QuantizedHeadCrossEntropy, comes_in_pieces
from qwenvl.text.chat import IGNORED

# Rows of logits in float32 at a time: 256 rows of the published vocabulary are 156 MB.
ROWS_AT_A_TIME = 256


class _SavedTensors(Protocol):
    """What `SummedCrossEntropy` uses of its autograd context."""

    saved_tensors: tuple[torch.Tensor, ...]

    def save_for_backward(self, *tensors: torch.Tensor) -> None: ...


class _Gradients(Protocol):
    """What `HeadCrossEntropy` uses of its autograd context."""

    needs_input_grad: tuple[bool, ...]
    gradients: tuple[torch.Tensor | None, torch.Tensor | None] | None
    weight_type: torch.dtype


class SummedCrossEntropy(torch.autograd.Function):
    """Sum of -log p(target) over rows of logits, in float32, a few rows at a time in forward and backward.

    `nn.functional.cross_entropy` keeps a float32 copy of all logits; here backward recomputes the probabilities of
    each piece from the logits, which are kept anyway, and the saved log-sum-exp.
    """

    @staticmethod
    def forward(ctx: _SavedTensors, logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
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
    def backward(ctx: _SavedTensors, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
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

    The loss is a sum, so backward only scales its gradients: they are computed in forward, while a piece's logits
    exist. Kept for backward are the gradient of the hidden states, and that of the matrix if it is trained; logits
    are neither kept nor recomputed.
    """

    @staticmethod
    def forward(
        ctx: _Gradients,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        chunk: int,
        for_training: bool,
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
                # In float32 even for a 16-bit matrix: many pieces are summed.
                grad_weight.addmm_(grad_logits.T.to(wide_type), rows.to(wide_type))
        # Not saved tensors: activation offloading would move them to the host and back.
        ctx.gradients = (grad_hidden, grad_weight)
        ctx.weight_type = weight.dtype
        return total

    @staticmethod
    def backward(ctx: _Gradients, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("Trying to backward through the loss a second time: its gradients are already freed")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            grad_hidden *= grad_total
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_total).to(ctx.weight_type)
        return grad_hidden, grad_weight, None, None, None


def supervised_loss(
    hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, *, chunk: int = ROWS_AT_A_TIME
) -> torch.Tensor:
    """Cross-entropy summed over rows of hidden states, without the logits of all rows in memory at once.

    Args:
        hidden: (rows, hidden), after the final norm, at the positions that predict a supervised token.
        head: the output head. A single matrix (plain, or trained beside an adapter) goes through `HeadCrossEntropy`,
            one in 4 bits through `quantized_head.QuantizedHeadCrossEntropy`. Any other head (with LoRA on it, or
            sharded by ZeRO-3) is called piece by piece under activation checkpointing.
        targets: (rows,), ids.
        chunk: rows whose logits exist at a time.

    Returns:
        A scalar, in float32 at least, that supports one backward. Zero, with zero gradients, without rows.
    """
    # A matrix trained in float32 computes in float32, also under autocast.
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
    """Hidden states in the dtype of the head, which may be trained in float32 beside 16-bit blocks. A 4-bit head has
    none: it takes them as they are."""
    weight = head.weight
    assert isinstance(weight, torch.Tensor), "a head is, or wraps, one matrix"
    return hidden.to(weight.dtype) if weight.is_floating_point() else hidden


def _loss_of_piece(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor) -> torch.Tensor:
    logits = head(in_type_of(head, hidden))
    return SummedCrossEntropy.apply(logits, torch.arange(len(logits), device=logits.device), targets)


def _without_autocast(device_type: str) -> AbstractContextManager:
    if not torch.amp.is_autocast_available(device_type):  # the meta device, on which memory is planned
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _matrix_of(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor | None:
    """The matrix (vocabulary, hidden) of a head that is nothing else and whose values are in memory; else None."""
    weight = getattr(head, "weight", None)
    if not isinstance(weight, torch.Tensor) or getattr(head, "bias", None) is not None:
        return None
    # With LoRA on a head, `weight` is that of the base layer only. PEFT's ModulesToSaveWrapper, around a head that is
    # trained beside an adapter, returns the active copy; its attribute tells, so that the model does not need PEFT.
    if type(head) is not nn.Linear and not isinstance(getattr(head, "modules_to_save", None), nn.ModuleDict):
        return None
    # Until its module is called, a weight may be on the meta device (offloaded), empty (ZeRO-3) or a shard (FSDP2).
    is_there = weight.ndim == 2 and weight.is_meta == hidden.is_meta and not isinstance(weight, DTensor)
    return weight if is_there else None


def supervised_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions that predict a supervised token, and those tokens: position t predicts token t + 1.

    Synchronises with the device.

    Args:
        labels: (batch, length), ids, not shifted, -100 where not trained.

    Returns:
        Indices into the flattened positions (batch * length), and the ids to predict there.
    """
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    targets = targets.flatten()
    rows = (targets != IGNORED).nonzero()[:, 0]
    return rows, targets[rows]


def without_image_targets(labels: torch.Tensor, image_token_id: int | None) -> torch.Tensor:
    """Ignore image placeholders among the labels, which are there where a trainer takes all of `input_ids` as labels.

    Args:
        labels: (batch, length), ids, not shifted, -100 where not trained.
        image_token_id: of `<imgpad>`; None for a text-only checkpoint.
    """
    return labels if image_token_id is None else labels.masked_fill(labels == image_token_id, IGNORED)


def mean_loss(total: torch.Tensor, rows: int, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """Divide a summed loss by the supervised tokens of the whole accumulated step.

    Args:
        total: the sum over the supervised tokens of this batch.
        rows: supervised tokens of this batch.
        num_items_in_batch: supervised tokens of the whole step; None for `rows`. It is taken as it is given: a trainer
            that counts labels which are image placeholders too gets a loss that is smaller by their share, with
            gradients of the right direction. Labels set on the processor's batches have none (see `ModelInputs`).

    Returns:
        A scalar. Without supervised tokens: zero, with zero gradients, if `num_items_in_batch` is given; else NaN.
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
        logits: (batch, length, vocabulary), any float dtype; never copied as a whole.
        labels: (batch, length), ids, not shifted, -100 where not trained.
        num_items_in_batch: see `mean_loss`.

    Returns:
        A scalar, in float32 at least.
    """
    # Row indices into the unshifted logits save a shifted copy of them.
    rows, targets = supervised_positions(labels.to(logits.device))
    total = SummedCrossEntropy.apply(logits.flatten(0, 1), rows, targets)
    return mean_loss(total, len(rows), num_items_in_batch)
