"""What an adapter does to one tensor of its base."""

from dataclasses import dataclass

from qwenvl.checkpoint.checkpoint_files import StoredTensor


@dataclass(frozen=True)
class LowRank:
    """W + scale * B A; with DoRA each output row is then scaled to its magnitude.

    Attributes:
        a: (r, in), for a convolution (r, in, height, width), for an embedding (r, rows).
        b: (out, r), for a convolution (out, r, 1, 1), for an embedding (width, r).
        scale: alpha / r, or alpha / sqrt(r) with rsLoRA.
        magnitude: (out,) of DoRA.
        transposed: for an embedding, whose table is (rows, width): the change is (B A)^T.
        init: "pissa" or "olora" where W is the residual that this initialisation left of the base.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    magnitude: StoredTensor | None = None
    transposed: bool = False
    init: str | None = None


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor, in this order.

    Attributes:
        replaced: the tensor trained in full, in place of the base's.
        rows: (indices, values) of an embedding's rows trained in full.
        low_rank: LoRA on it.
        added: (vector, scale) added to a bias.
    """

    replaced: StoredTensor | None = None
    rows: tuple[tuple[int, ...], StoredTensor] | None = None
    low_rank: LowRank | None = None
    added: tuple[StoredTensor, float] | None = None
