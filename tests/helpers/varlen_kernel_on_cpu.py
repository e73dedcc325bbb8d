"""PyTorch's variable-length attention on a machine without a GPU: its own operation and autograd, and under them, in
the place of the CUDA kernel, the same mathematics spelled out."""

import contextlib
from itertools import pairwise

import torch

from qwenvl.model import varlen_attention


@contextlib.contextmanager
def kernel_on_cpu(monkeypatch):
    """Inside, `varlen_attention` finds a kernel on the CPU. Yields the calls of it: (bounds, longest sequence)."""
    calls = []

    def forward(query, key, value, bounds, key_bounds, longest, key_longest, dropout, causal, *others, **kwargs):
        assert causal and dropout == 0 and torch.equal(bounds, key_bounds) and longest == key_longest
        assert bounds.dtype == torch.int32 and bounds[-1] == len(query) and (bounds.diff() <= longest).all()
        # The real one takes any strides but these.
        assert all(part.stride(-1) == 1 for part in (query, key, value))
        calls.append((bounds.tolist(), longest))
        output = spelled_out(query, key, value, bounds, kwargs["scale"])
        empty = query.new_empty(0)
        return output, query.new_empty(query.shape[1], len(query), dtype=torch.float32), empty, empty, empty

    def backward(grad, query, key, value, out, log_sums, bounds, *others, scale=None, **kwargs):
        pieces = []
        for one in pieces_of(bounds, query, key, value, out, grad):
            q, k, v, o, do = one
            weights = weights_of(q, k, scale)
            scores = weights * (do @ v.transpose(1, 2) - (do * o).sum(-1, keepdim=True)) * scale
            pieces.append((scores @ k, scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ do))
        return tuple(torch.cat(parts, dim=1).transpose(0, 1) for parts in zip(*pieces, strict=True))

    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_flash_attention_forward", forward)
    library.impl("_flash_attention_backward", backward)
    monkeypatch.setattr(varlen_attention, "kernel_takes", lambda query, dropout=0.0: dropout == 0)
    try:
        yield calls
    finally:
        library._destroy()


def spelled_out(query, key, value, bounds, scale):
    """(tokens, heads, head_dim) of all sequences -> the same shape."""
    pieces = [weights_of(q, k, scale) @ v for q, k, v in pieces_of(bounds, query, key, value)]
    return torch.cat(pieces, dim=1).transpose(0, 1)


def weights_of(query, key, scale):
    """(heads, tokens, head_dim) twice -> (heads, tokens, tokens)."""
    later = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).triu(1)
    return (query @ key.transpose(1, 2) * scale).masked_fill(later, -torch.inf).softmax(-1)


def pieces_of(bounds, *tensors):
    for start, end in pairwise(bounds.tolist()):
        yield [tensor[start:end].transpose(0, 1) for tensor in tensors]
