"""Greedy replies to many prompts: batched, each image encoded once, token for token what one prompt at a time gives.

Prompts come page by page, so that questions on one page share a batch: their image is at hand, and what they all begin
with is computed once (`shared_prefix`). Pages come by the length of their longest question, in windows of a few score
images, of which the next one's are read while one is replied to.
"""

import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import GenerationConfig, StoppingCriteria

from finetune.batches.attempt import OutOfMemory, attempt
from finetune.batches.budget import KEPT_FEATURE_BYTES, REPLY_BATCH_ROWS, REPLY_BATCH_TOKENS
from finetune.batches.image_request import ImageRequest, VisionCache, image_key
from finetune.errors import Failed
from finetune.replies.image_features import ImageStore
from finetune.replies.shared_prefix import PrefixedBatch, cut_prefixes, generate_from_prefixes
from finetune.replies.task_replies import Style
from qwenvl import ImageAccess, QwenVLForConditionalGeneration, QwenVLImageProcessor, QwenVLTokenizer
from qwenvl.images.images import ImageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """What is replied to.

    Attributes:
        ids: as `qwenvl.text.chat` renders them, up to where the reply begins.
        images: their sources, in reading order.
        access: what these may reach.
        name: what to call the prompt in errors: file and row.
    """

    ids: Sequence[int]
    images: Sequence[Any]
    access: ImageAccess
    name: str


@dataclass(frozen=True)
class Reply:
    """The reply to one prompt.

    Attributes:
        index: of the prompt.
        ids: new tokens: without the one that ends a reply, with those that spell a stop text.
        text: of these, grounding tags kept, up to the stop text.
        unreadable: why an image of the prompt cannot be read; nothing was generated then. None where all is well.
    """

    index: int
    ids: tuple[int, ...] = ()
    text: str = ""
    unreadable: str | None = None


@dataclass(frozen=True)
class Decoding:
    """How replies are generated.

    Attributes:
        max_new_tokens: most tokens of a reply.
        stop_ids: tokens that end one (`stop_ids_of`).
        stop_texts: texts that end one, and are not part of it.
        batch_tokens: most tokens of a batch, with padding and new ones; a longer prompt goes by itself. Too much for
            the device's memory halves it.
        batch_rows: most rows of a batch.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    stop_texts: tuple[str, ...] = ()
    batch_tokens: int = REPLY_BATCH_TOKENS
    batch_rows: int = REPLY_BATCH_ROWS


@dataclass
class Plan:
    """What is known of prompts before any of them is replied to.

    Attributes:
        lengths: tokens of each prompt.
        images: for each the numbers of its images; the same image has the same number everywhere.
    """

    lengths: array = field(default_factory=lambda: array("q"))
    images: list[tuple[int, ...]] = field(default_factory=list)

    def order(self, images_at_once: int) -> list[list[int]]:
        """The prompts in windows of about so many distinct images, those on the same images together.

        Of each such group the longest comes first, and the groups by falling length of it: the first prompt of any
        stretch is its longest, and what takes most memory comes at the beginning.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, images in enumerate(self.images):
            groups.setdefault(images or (-1 - index,), []).append(index)
        longest_first = sorted(groups.items(), key=lambda item: -max(self.lengths[index] for index in item[1]))
        windows: list[list[int]] = []
        seen: set[int] = set()
        for images, group in longest_first:
            indices = sorted(group, key=lambda index: (-self.lengths[index], index))
            # Rows without images take their place too: a window is also what is held in memory.
            if not windows or len(seen | set(images)) > images_at_once:
                windows.append([])
                seen = set()
            windows[-1] += indices
            seen |= set(images)
        return windows


def plan_replies(prompts: Sequence[Prompt], seen: Callable[[int], None] = lambda count: None) -> Plan:
    """Look at every prompt once; no image is opened.

    Args:
        prompts: may make a prompt when it is asked for; none is kept.
        seen: is told how many have been looked at.
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
    """The tokens at which a reply ends: those of the model's generation config, and those of the way it is asked.

    A base checkpoint's config knows no end of a turn; with an adapter that was trained on turns it writes them.
    """
    eos = without_adapter(model).generation_config.eos_token_id
    own = [] if eos is None else [eos] if isinstance(eos, int) else eos
    turns = [tokenizer.im_end_id, tokenizer.im_start_id] if style == "chat" else []
    return tuple(dict.fromkeys([*own, *turns, tokenizer.eod_id]))


def without_adapter(model: torch.nn.Module) -> QwenVLForConditionalGeneration:
    """The model itself, in which PEFT has put its layers: they act, and PEFT's own `generate` sets its config."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


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
) -> Iterator[Reply]:
    """Reply to every prompt; replies come batch by batch, each prompt's once.

    Mode, generation config and random numbers of the model are as before when the iterator is done or closed.

    Args:
        model: with or without adapter.
        prompts, plan: `plan_replies(prompts)`.
        on_bad_image: an image that cannot be read ends it all, or its prompts come back as `unreadable`.
        keep_bytes: of image features held in memory.
        vision_cache: has features of images that were encoded before; None where there is none.

    Raises:
        ImageError: an image cannot be read, and that is refused.
        Failed: a single prompt is too much for the device's memory.
    """
    base = without_adapter(model)
    was_training, config = model.training, base.generation_config
    model.eval()
    # Whatever the model's config says of sampling and penalties is not what is measured.
    base.generation_config = GenerationConfig()
    try:
        with ImageStore(base, image_processor, keep_bytes, vision_cache) as store:
            yield from _Generator(base, prompts, plan, tokenizer, decoding, on_bad_image, store).replies(keep_bytes)
    finally:
        base.generation_config = config
        model.train(was_training)


@dataclass
class _Row:
    """A prompt of the window at hand: its number, its tokens, and its images by key, in reading order."""

    index: int
    ids: Sequence[int]
    images: list[tuple[str, ImageRequest]]

    @property
    def keys(self) -> list[str]:
        return [key for key, _ in self.images]


class _Generator:
    def __init__(self, model, prompts, plan, tokenizer, decoding, on_bad_image, store):
        self.model, self.prompts, self.plan, self.tokenizer = model, prompts, plan, tokenizer
        self.decoding, self.on_bad_image, self.store = decoding, on_bad_image, store
        self.batch_tokens = decoding.batch_tokens

    def replies(self, keep_bytes: int) -> Iterator[Reply]:
        config = self.model.config
        images_at_once = 64
        if config.visual is not None:
            feature_bytes = config.n_queries * config.hidden_size * self.model.dtype.itemsize
            images_at_once = max(1, keep_bytes // feature_bytes)
        # Two windows at once: the images of the next are read while the one before is replied to.
        ahead: list[_Row] = []
        for window in [*self.plan.order(images_at_once), []]:
            rows, ahead = ahead, self._open(window)
            while rows:
                count = self._batch_size(rows)
                replies = attempt(partial(self._reply, rows[:count]))
                if isinstance(replies, OutOfMemory):
                    self._take_smaller_batches(rows[:count], replies)
                    continue
                rows = rows[count:]
                yield from replies

    def _open(self, window: Sequence[int]) -> list[_Row]:
        rows: list[_Row] = []
        requests: dict[str, ImageRequest] = {}
        for index in window:
            prompt = self.prompts[index]
            images = []
            for source in prompt.images:
                key = image_key(source, prompt.access)
                # One request for all questions on an image: each row brought the encoded bytes along.
                request = requests.setdefault(key, ImageRequest(source, prompt.access, prompt.name))
                images.append((key, request))
            rows.append(_Row(index, prompt.ids, images))
        self.store.read_ahead(requests)
        return rows

    def _batch_size(self, rows: Sequence[_Row]) -> int:
        """How many of the rows, the first of which is the longest, go into one batch."""
        row_tokens = len(rows[0].ids) + self.decoding.max_new_tokens
        return max(1, min(self.batch_tokens // row_tokens, self.decoding.batch_rows, len(rows)))

    def _take_smaller_batches(self, rows: Sequence[_Row], failure: OutOfMemory):
        tokens = len(rows) * (len(rows[0].ids) + self.decoding.max_new_tokens)
        if len(rows) == 1:
            raise Failed(
                f"{self.prompts[rows[0].index].name}: {tokens:,} tokens do not fit into the device's memory, even by "
                f"themselves; take fewer new tokens, fewer shots, or a smaller dtype\n({failure.said})"
            )
        self.batch_tokens = tokens // 2
        logger.warning("out of memory with batches of %d tokens: going on with %d", tokens, self.batch_tokens)

    def _reply(self, rows: Sequence[_Row]) -> list[Reply]:
        found = self.store.features({key: request for row in rows for key, request in row.images})
        bad = {key: error for key, error in found.items() if isinstance(error, ImageError)}
        if bad and self.on_bad_image == "refuse":
            raise next(iter(bad.values()))
        replies = [
            Reply(row.index, unreadable=str(next(bad[key] for key in row.keys if key in bad)))
            for row in rows
            if any(key in bad for key in row.keys)
        ]
        good = [row for row in rows if not any(key in bad for key in row.keys)]
        if good:
            replies += self._generate(good, [[found[key] for key in row.keys] for row in good])
        return replies

    def _generate(self, rows: Sequence[_Row], features: Sequence[Sequence[torch.Tensor]]) -> list[Reply]:
        decoding, pad = self.decoding, self.tokenizer.pad_token_id
        batch = self._cut(rows)
        length = batch.length
        generated = generate_from_prefixes(
            self.model,
            batch,
            features,
            pad,
            generation_config=GenerationConfig(
                max_new_tokens=decoding.max_new_tokens,
                do_sample=False,
                eos_token_id=list(decoding.stop_ids) or None,
                pad_token_id=pad,
                use_cache=True,
            ),
            stopping_criteria=(
                [_StopAtText(self.tokenizer, length, decoding.stop_texts)] if decoding.stop_texts else None
            ),
        )
        return [self._read(row, new) for row, new in zip(rows, generated[:, length:].tolist(), strict=True)]

    def _cut(self, rows: Sequence[_Row]) -> PrefixedBatch:
        """The rows with what they share, where sharing saves a tenth of the work."""
        ids = [row.ids for row in rows]
        whole = PrefixedBatch([], [], [list(own) for own in ids])
        # Beyond seq_length the rotary stretch follows from the whole row's length, and a prefix is not shared.
        if max(map(len, ids)) > self.model.config.seq_length:
            return whole
        cut = cut_prefixes(ids, [tuple(row.keys) or row.index for row in rows], self.model.config)
        return cut if all(cut.prefixes) and cut.tokens < 0.9 * whole.tokens else whole

    def _read(self, row: _Row, new: list[int]) -> Reply:
        """One row of generated tokens; behind its end it is filled up to the longest row's."""
        ends = {*self.decoding.stop_ids, self.tokenizer.pad_token_id}
        end = next((place for place, token in enumerate(new) if token in ends), len(new))
        text, stops = _text(self.tokenizer, new[:end]), self.decoding.stop_texts
        if (place := _stop_place(text, stops)) is not None:
            # Where no token ends a reply, Transformers goes on in this row until all rows have ended.
            while _stop_place(_text(self.tokenizer, new[: end - 1]), stops) is not None:
                end -= 1
            text = text[:place]
        return Reply(row.index, tuple(new[:end]), text)


def _text(tokenizer: QwenVLTokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, keep_grounding=True)


def _stop_place(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop text begins, white space before the reply apart; None where there is none."""
    begin = len(text) - len(text.lstrip())
    return min((place for stop in stops if (place := text.find(stop, begin)) >= 0), default=None)


class _StopAtText(StoppingCriteria):
    """Ends each row by itself, once its new tokens spell a stop text."""

    def __init__(self, tokenizer: QwenVLTokenizer, prompt_length: int, stops: Sequence[str]):
        self.tokenizer, self.prompt_length, self.stops = tokenizer, prompt_length, stops

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        texts = [_text(self.tokenizer, ids) for ids in input_ids[:, self.prompt_length :].tolist()]
        ended = [_stop_place(text, self.stops) is not None for text in texts]
        return torch.tensor(ended, device=input_ids.device)
