"""How much the running batch may hold, which is learned where memory is short."""

from dataclasses import dataclass, replace

from finetune.batches.budget import ENCODED_TOGETHER, REPLY_BATCH_ROWS, REPLY_BATCH_TOKENS


@dataclass
class BatchBounds:
    """Bounds of the running batch.

    Attributes:
        rows: most replies that grow together.
        tokens: most tokens of the batch, rows times the longest of them, prompt and reply; a request that is alone may
            have more.
        prefill_tokens: most tokens of prompts that join together, so that replies that run wait for that much; one
            prompt may have more.
        images: most images that are encoded together.
    """

    rows: int = REPLY_BATCH_ROWS
    tokens: int = REPLY_BATCH_TOKENS
    prefill_tokens: int = 2048
    images: int = ENCODED_TOGETHER

    def hold(self, rows: int, length: int) -> bool:
        """Whether so many rows, the longest of `length` tokens, are within the bounds."""
        return rows <= self.rows and rows * length <= self.tokens

    def within(self, rows: int | None, tokens: int | None) -> "BatchBounds":
        """These bounds, or lower ones where a decoder has them."""
        return replace(
            self,
            rows=self.rows if rows is None else min(self.rows, rows),
            tokens=self.tokens if tokens is None else min(self.tokens, tokens),
        )

    def lower(self, rows: int, length: int) -> None:
        """So many rows, the longest of `length` tokens, did not fit into memory."""
        self.tokens = max(1, min(self.tokens, rows * length * 9 // 10))
