"""Greedy replies to many prompts in batches: the same tokens as one prompt at a time, with each image encoded once.

Prompts with the same images are neighbours, so that they share a batch and their common prefix is computed once
(`shared_prefix`). Groups of such prompts are ordered by their longest prompt and processed in windows of some hundred
images; the images of the next window are read while the current one is processed.
"""

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftModel

from finetune.batches.attempt import OutOfMemory, attempt
from finetune.batches.budget import KEPT_FEATURE_BYTES, REPLY_BATCH_ROWS, REPLY_BATCH_TOKENS
from finetune.batches.image_request import ImageRequest, VisionCache, image_key
from finetune.errors import Failed
from finetune.replies.decoder import PromptRow
from finetune.replies.image_features import ImageStore
from finetune.replies.lockstep import Lockstep
from finetune.replies.plan import Plan
from finetune.replies.running_batch import NewToken, ReplyRequest, RunningBatch
from finetune.replies.stop_ids import stop_ids_by
from finetune.replies.task_replies import Style
from finetune.replies.torch_decoder import TorchDecoder
from qwenvl import ImageAccess, QwenVLForConditionalGeneration, QwenVLImageProcessor, QwenVLTokenizer
from qwenvl.images.images import ImageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A prompt to reply to.

    Attributes:
        ids: token ids as `qwenvl.text.chat` renders them, up to where the reply begins.
        images: image sources, in reading order.
        access: which files and URLs these may reach.
        name: of the prompt in errors: file and row.
        choices: tokens, the likeliest of which is the reply's first; empty where it may be any.
    """

    ids: Sequence[int]
    images: Sequence[Any]
    access: ImageAccess
    name: str
    choices: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reply:
    """The reply to one prompt.

    Attributes:
        index: of the prompt.
        ids: new tokens, without the one that ends the reply, with those that spell a stop text.
        text: their text with grounding tags, up to the stop text.
        unreadable: why an image of the prompt cannot be read; nothing was generated then. None if all can be read.
        cut: whether it ended because it had the most new tokens, so that the model may have gone on.
    """

    index: int
    ids: tuple[int, ...] = ()
    text: str = ""
    unreadable: str | None = None
    cut: bool = False


@dataclass(frozen=True)
class Decoding:
    """How replies are generated.

    Attributes:
        max_new_tokens: most tokens of a reply.
        stop_ids: tokens that end a reply (`stop_ids_of`).
        stop_texts: texts that end a reply and are not part of it.
        batch_tokens: most tokens of a batch, padding and new tokens included; a longer prompt gets its own batch. It
            is halved when a batch does not fit into the device's memory.
        batch_rows: most rows of a batch.
        min_new_tokens: fewest tokens of a reply; the stop ids are not generated before.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    stop_texts: tuple[str, ...] = ()
    batch_tokens: int = REPLY_BATCH_TOKENS
    batch_rows: int = REPLY_BATCH_ROWS
    min_new_tokens: int = 0


def plan_replies(prompts: Sequence[Prompt], seen: Callable[[int], None] = lambda count: None) -> Plan:
    """Take the length and the images of every prompt; no image is opened.

    Args:
        prompts: may render a prompt on access; none is kept.
        seen: called with the number of prompts done.
    """
    plan = Plan()
    numbers: dict[str, int] = {}
    for index in range(len(prompts)):
        prompt = prompts[index]
        plan.lengths.append(len(prompt.ids))
        keys = [image_key(source, prompt.access) for source in prompt.images]
        plan.images.append(tuple(numbers.setdefault(key, len(numbers)) for key in keys))
        seen(index + 1)
    return plan


def stop_ids_of(model: torch.nn.Module, tokenizer: QwenVLTokenizer, style: Style = "chat") -> tuple[int, ...]:
    """The tokens at which a reply ends: those of the model's generation config, and for style chat the ends of a turn.

    The config of a base checkpoint has no end of a turn, but a chat adapter on it generates them.
    """
    return stop_ids_by(without_adapter(model).generation_config, tokenizer, style)


def without_adapter(model: torch.nn.Module) -> QwenVLForConditionalGeneration:
    """The model inside PEFT's wrapper, adapter layers included: `PeftModel.generate` changes the generation config."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, QwenVLForConditionalGeneration), f"a {type(base).__name__} is not a Qwen-VL model"
    return base


def generate_replies(
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    plan: Plan,
    tokenizer: QwenVLTokenizer,
    image_processor: QwenVLImageProcessor,
    decoding: Decoding,
    *,
    on_bad_image: Literal["refuse", "wrong"] = "refuse",
    keep_bytes: int = KEPT_FEATURE_BYTES,
    vision_cache: VisionCache | None = None,
    lockstep: Lockstep | None = None,
    is_abandoned: Callable[[], bool] = lambda: False,
) -> Iterator[Reply]:
    """Reply to every prompt, once each, in a running batch: a prompt joins it when there is room.

    The model's mode is restored when the iterator is exhausted or closed; its generation config and random number
    generators are not used.

    Args:
        model: with or without adapter.
        prompts: to reply to.
        plan: `plan_replies(prompts)`.
        tokenizer, image_processor: of the model.
        decoding: how replies are generated.
        on_bad_image: "refuse" raises for an image that cannot be read, "wrong" returns its prompts as `unreadable`.
        keep_bytes: bytes of image features to keep in memory.
        vision_cache: has features of images that were encoded before; None without one.
        lockstep: entered, where the model is sharded over processes; each of them replies to its own prompts.
        is_abandoned: asked before each token; once it is true, no further replies come.

    Yields:
        Replies, in the order of the plan.

    Raises:
        ImageError: an image cannot be read, and `on_bad_image` is "refuse".
        Failed: a single prompt does not fit into the device's memory.
    """
    base = without_adapter(model)
    was_training = model.training
    model.eval()
    try:
        encode = base.get_image_features if lockstep is None else lockstep.encode
        with ImageStore(base, image_processor, keep_bytes, vision_cache, encode) as store:
            growing = _GrowingReplies(base, prompts, tokenizer, decoding, store, on_bad_image, lockstep is None)
            # Images of the next window are read while there are replies to the one before.
            windows = iter(plan.order(_images_at_once(base, keep_bytes)))
            opened = _open(prompts, next(windows, []), store)
            waiting: deque[_Row] = deque()
            order: deque[int] = deque()
            made: dict[int, Reply] = {}
            while waiting or opened or growing.rows:
                if not waiting and opened:
                    waiting.extend(opened)
                    order.extend(row.index for row in opened)
                    opened = _open(prompts, next(windows, []), store)
                if is_abandoned():
                    return
                made |= {reply.index: reply for reply in growing.next(waiting)}
                while order and order[0] in made:
                    yield made.pop(order.popleft())
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class _Row:
    """A prompt of the current window: its index, its tokens, its images by key, in reading order, and its choices."""

    index: int
    ids: Sequence[int]
    images: list[tuple[str, ImageRequest]]
    choices: tuple[int, ...]

    @property
    def keys(self) -> list[str]:
        return [key for key, _ in self.images]


def _images_at_once(model: QwenVLForConditionalGeneration, keep_bytes: int) -> int:
    """How many images have features of `keep_bytes` together."""
    config = model.config
    if config.visual is None:
        return 64
    return max(1, keep_bytes // (config.n_queries * config.hidden_size * model.dtype.itemsize))


def _open(prompts: Sequence[Prompt], window: Sequence[int], store: ImageStore) -> list[_Row]:
    """The rows of a window; the store begins to read their images."""
    rows: list[_Row] = []
    requests: dict[str, ImageRequest] = {}
    for index in window:
        prompt = prompts[index]
        images = []
        for source in prompt.images:
            key = image_key(source, prompt.access)
            # One request for all prompts with this image: each has its own copy of the encoded bytes.
            request = requests.setdefault(key, ImageRequest(source, prompt.access, prompt.name))
            images.append((key, request))
        rows.append(_Row(index, prompt.ids, images, prompt.choices))
    store.read_ahead(requests)
    return rows


class _GrowingReplies:
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
        self.rows: dict[int, _Row] = {}

    def next(self, waiting: "deque[_Row]") -> list[Reply]:
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

    def _room(self, waiting: "deque[_Row]") -> int:
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

    def _join(self, rows: Sequence[_Row]) -> list[Reply]:
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

    def _forget(self, number: int) -> _Row:
        del self._ids[number], self._texts[number]
        return self.rows.pop(number)


def _smaller_budget(
    rows: Sequence[_Row],
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
