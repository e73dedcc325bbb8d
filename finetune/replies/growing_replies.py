"""Replies that grow in a running batch, within the bounds of its memory."""

import logging
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from finetune.batches.attempt import OutOfMemory, attempt
from finetune.batches.image_request import ImageRequest
from finetune.errors import Failed
from finetune.replies.decoder import PromptRow
from finetune.replies.image_features import ImageStore
from finetune.replies.reply import Decoding, Prompt, Reply
from finetune.replies.running_batch import NewToken, ReplyRequest, RunningBatch
from finetune.replies.torch_decoder import TorchDecoder
from qwenvl import QwenVLForConditionalGeneration, QwenVLTokenizer
from qwenvl.images.images import ImageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WaitingPrompt:
    """A prompt of the current window: its index, its tokens, its images by key, in reading order, and its choices."""

    index: int
    ids: Sequence[int]
    images: list[tuple[str, ImageRequest]]
    choices: tuple[int, ...]

    @property
    def keys(self) -> list[str]:
        return [key for key, _ in self.images]


class GrowingReplies:
    """The replies that grow at the moment.

    Attributes:
        rows: the prompts of the growing replies, by the reply's number.
    """

    def __init__(
        self,
        model: QwenVLForConditionalGeneration,
        prompts: Sequence[Prompt],
        tokenizer: QwenVLTokenizer,
        decoding: Decoding,
        store: ImageStore,
        on_bad_image: Literal["refuse", "wrong"],
        can_repeat: bool,
    ) -> None:
        # Prompts may be longer than the model's context, as in its own `generate`.
        self._batch = RunningBatch(TorchDecoder(model, context=sys.maxsize), tokenizer)
        self._prompts, self._decoding, self._store = prompts, decoding, store
        self._on_bad_image, self._can_repeat = on_bad_image, can_repeat
        self._tokens = decoding.batch_tokens
        self._ids: dict[int, list[int]] = {}
        self._texts: dict[int, list[str]] = {}
        self.rows: dict[int, WaitingPrompt] = {}

    def next(self, waiting: "deque[WaitingPrompt]") -> list[Reply]:
        """Let prompts join, or the replies grow by a token; the replies that have ended.

        Raises:
            Failed: a single prompt does not fit into the device's memory.
        """
        joining = [waiting.popleft() for _ in range(self._room(waiting))]
        replies = attempt(partial(self._join, joining)) if joining else attempt(self._step)
        if not isinstance(replies, OutOfMemory):
            return replies
        rows = sorted([*self.rows.values(), *joining], key=lambda row: -len(row.ids))
        # Where the model is sharded, others are in the forward that has failed.
        self._tokens = _smaller_budget(rows, self._prompts, self._decoding, replies, can_repeat=self._can_repeat)
        if not joining:  # those that came last begin again later
            numbers = list(self.rows)[(len(self.rows) + 1) // 2 :]
            joining = [self._forget(number) for number in numbers]
            self._batch.leave(numbers)
        waiting.extendleft(reversed(joining))
        return []

    def _room(self, waiting: "deque[WaitingPrompt]") -> int:
        """How many of the prompts that wait join now: when there is room for a quarter of the batch, or for all."""
        new, live = self._decoding.max_new_tokens, len(self.rows)
        longest = max((len(row.ids) for row in self.rows.values()), default=0)
        count = 0
        for row in waiting:
            longest = max(longest, len(row.ids))
            together = live + count + 1
            if together > self._decoding.batch_rows or together * (longest + new) > self._tokens:
                break
            count += 1
        if not live:
            return max(count, min(1, len(waiting)))
        return count if count == len(waiting) or 4 * count >= live + count else 0

    def _join(self, rows: Sequence[WaitingPrompt]) -> list[Reply]:
        """Those that have unreadable images, or end with their first token, are done."""
        features: dict[str, torch.Tensor] = {}
        bad: dict[str, ImageError] = {}
        for key, found in self._store.features({key: image for row in rows for key, image in row.images}).items():
            if not isinstance(found, ImageError):
                features[key] = found
            elif self._on_bad_image == "refuse":
                raise found
            else:
                bad[key] = found
        unreadable = {
            row.index: Reply(row.index, unreadable=str(next(bad[key] for key in row.keys if key in bad)))
            for row in rows
            if any(key in bad for key in row.keys)
        }
        good = [row for row in rows if row.index not in unreadable]
        if not good:
            return list(unreadable.values())
        decoding = self._decoding
        requests = [
            ReplyRequest(
                PromptRow(row.ids, [features[key] for key in row.keys], row.keys),
                decoding.max_new_tokens,
                decoding.stop_ids,
                decoding.stop_texts,
                min_new_tokens=decoding.min_new_tokens,
                choices=row.choices,
            )
            for row in good
        ]
        numbers, tokens = self._batch.join(requests)
        self.rows |= dict(zip(numbers, good, strict=True))
        self._ids |= {number: [] for number in numbers}
        self._texts |= {number: [] for number in numbers}
        return [*unreadable.values(), *self._take(tokens)]

    def _step(self) -> list[Reply]:
        return self._take(self._batch.step())

    def _take(self, tokens: Sequence[NewToken]) -> list[Reply]:
        ended = []
        for token in tokens:
            ids, texts = self._ids[token.reply], self._texts[token.reply]
            texts.append(token.text)
            if token.id is not None:
                ids.append(token.id)
            if token.finish is not None:
                row = self._forget(token.reply)
                ended.append(Reply(row.index, tuple(ids), "".join(texts), cut=token.finish == "length"))
        return ended

    def _forget(self, number: int) -> WaitingPrompt:
        del self._ids[number], self._texts[number]
        return self.rows.pop(number)


def _smaller_budget(
    rows: Sequence[WaitingPrompt],
    prompts: Sequence[Prompt],
    decoding: Decoding,
    failure: OutOfMemory,
    *,
    can_repeat: bool,
) -> int:
    """The token budget of further batches, after these rows did not fit.

    Raises:
        Failed: it was a single row, or they cannot be run again.
    """
    tokens = len(rows) * (len(rows[0].ids) + decoding.max_new_tokens)
    if not can_repeat:
        raise Failed(
            f"{prompts[rows[0].index].name}: {len(rows)} prompts of {tokens:,} tokens together do not fit into the "
            "device's memory, and smaller batches cannot be tried where the model is sharded over processes; take "
            f"fewer new tokens, or a smaller dtype\n({failure.said})"
        )
    if len(rows) == 1:
        raise Failed(
            f"{prompts[rows[0].index].name}: {tokens:,} tokens do not fit into the device's memory, even by "
            f"themselves; take fewer new tokens, fewer shots, or a smaller dtype\n({failure.said})"
        )
    logger.warning("out of memory with batches of %d tokens: going on with %d", tokens, tokens // 2)
    return tokens // 2
