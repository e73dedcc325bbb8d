"""Where the sequences of a batch are in its rows: positions, padding, and packing of several sequences in a row."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from qwenvl.errors import InputError
from qwenvl.model.rotary import own_sequence_length


@dataclass(frozen=True)
class PackedSequences:
    """The packed sequences of a forward, with its rows concatenated; made once per forward, used by every layer.

    Attributes:
        lengths: tokens of each sequence, in order, on the host.
        bounds: (sequences + 1,), int32, on the tokens' device: cumulative lengths, from 0.
    """

    lengths: tuple[int, ...]
    bounds: torch.Tensor

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device) -> "PackedSequences":
        bounds = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
        return cls(tuple(lengths), bounds.to(device, non_blocking=True))

    @property
    def longest(self) -> int:
        return max(self.lengths)


def lengths_of_sequences(position_ids: torch.Tensor) -> list[int]:
    """Tokens of each sequence, row by row, from positions (batch, length) that restart with each sequence.

    Synchronises with the device.
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    starts = begins.flatten().nonzero()[:, 0].tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], position_ids.numel()], strict=True)]


def positions_of_sequences(lengths: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
    """Positions (batch, length) that restart with each sequence, for tokens (batch, length, ...), on their device.

    Raises:
        InputError: the lengths do not fill the rows.
    """
    batch, length = tokens.shape[:2]
    ends = set(accumulate(lengths))
    if (
        min(lengths, default=0) < 1
        or max(ends, default=0) != batch * length
        or not ends.issuperset(range(length, batch * length, length))
    ):
        raise InputError(
            f"sequence_lengths {list(lengths)} do not fill {batch} rows of {length} tokens: give the lengths of the "
            "packed sequences, in order, so that none reaches into the next row"
        )
    positions = torch.cat([torch.arange(one) for one in lengths])
    return positions.view(batch, length).to(tokens.device, non_blocking=True)


def padded_positions(attention_mask: torch.Tensor | None, past_length: int, tokens: torch.Tensor) -> torch.Tensor:
    """0-based positions of the new tokens, padding not counted: (batch or 1, length)."""
    length = tokens.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:].to(tokens.device)
    return torch.arange(past_length, past_length + length, device=tokens.device)[None]


def real_lengths(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Real tokens of the sequence that each position belongs to: (batch, 1), or (batch, length) from positions."""
    if attention_mask is not None and attention_mask.ndim == 2:
        return attention_mask.long().sum(dim=1, keepdim=True)
    return own_sequence_length(position_ids)


def is_packed(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> bool:
    """Whether rows hold several sequences: positions restart between two real tokens.

    Raises:
        InputError: packed positions with a 2-D attention mask, with which the sequences would see each other.
    """
    if position_ids is None or (attention_mask is not None and attention_mask.ndim != 2):
        return False
    restarts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if attention_mask is None:
        return bool(restarts.any())
    real = attention_mask[:, -position_ids.shape[1] :].bool()
    if (restarts & real[:, 1:] & real[:, :-1]).any():
        raise InputError(
            "position_ids restart within a row (packed sequences) but a 2-D attention_mask is given too: pass "
            "attention_mask=None, and the sequences are kept apart by their positions"
        )
    return False
