"""Next-token cross-entropy that costs memory only where tokens are supervised."""

import torch

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


def next_token_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of each token given those before it, over the labels that are not -100.

    Args:
        logits: (batch, length, vocabulary), any float type; never copied whole.
        labels: (batch, length), the ids themselves (the shift by one happens here), -100 where not trained.
        num_items_in_batch: supervised tokens of the whole accumulated step; the sum is divided by it. None: the mean
            over this batch's own supervised tokens.

    Returns:
        A scalar, in float32 at least. Zero, with a gradient of zeros, when nothing is supervised and
        `num_items_in_batch` is given; NaN (a mean over nothing) when it is not.
    """
    labels = labels.to(logits.device)
    flat_logits = logits.flatten(0, 1)
    # Position t predicts token t + 1: row indices into the unshifted logits save a shifted copy of them.
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    targets = targets.flatten()
    rows = (targets != IGNORED).nonzero()[:, 0]
    total = SummedCrossEntropy.apply(flat_logits, rows, targets[rows])
    if num_items_in_batch is None:
        return total / rows.numel() if rows.numel() else total / total.new_zeros(())
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
