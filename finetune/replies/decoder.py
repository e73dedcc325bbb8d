"""What computes the next tokens of rows that join and leave between two steps: PyTorch, or llama.cpp."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class PromptRow:
    """A prompt, as a decoder takes it.

    Attributes:
        ids: its tokens; an image is `<img>`, n_queries x `<imgpad>`, `</img>`.
        features: (n_queries, hidden) of each image, in reading order.
        image_keys: one for each image; equal keys mean equal features, so that equal prefixes are known by them.
        adapter: name of the adapter that computes the row; None for the model without one, or with its only one.
    """

    ids: Sequence[int]
    features: Sequence[torch.Tensor] = ()
    image_keys: Sequence[str] = ()
    adapter: str | None = None


class Decoder(Protocol):
    """Keeps the state of live rows. A call that fails leaves the other rows as they were.

    Where memory does not hold what is asked, calls raise `torch.OutOfMemoryError`.
    """

    @property
    def context(self) -> int:
        """Most tokens of a row, prompt and reply together."""

    @property
    def most_rows(self) -> int | None:
        """Most live rows; None where only memory bounds them."""

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of all live rows together, prompts and replies; None where only memory bounds them. What is
        kept of rows that have left makes room for others."""

    @property
    def reused(self) -> Sequence[int]:
        """Of the rows that joined last, in their order: how many tokens of each prompt were known before."""

    def join(self, rows: Sequence[PromptRow]) -> tuple[list[int], torch.Tensor]:
        """Compute prompts, each of which is then a live row; what is known of them already is not computed again.

        Returns:
            The rows' numbers, which are never used twice, and (rows, vocabulary) logits of the token after each.
        """

    def step(self, tokens: Mapping[int, int]) -> torch.Tensor:
        """Give each live row its next token.

        Args:
            tokens: by row number; all live rows.

        Returns:
            (rows, vocabulary) logits of the token after it, in the order of `tokens`.
        """

    def leave(self, rows: Sequence[int]) -> None:
        """End rows; their memory is free for others. What they computed may be kept for later prompts."""

    def drop_kept(self) -> bool:
        """Give up what is kept of rows that have left, where memory is short; whether there was any."""
