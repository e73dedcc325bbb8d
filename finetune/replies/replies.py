"""Greedy replies to many prompts in batches: the same tokens as one prompt at a time, with each image encoded once.

Prompts with the same images are neighbours, so that they share a batch and their common prefix is computed once
(`shared_prefix`). Groups of such prompts are ordered by their longest prompt and processed in windows of some hundred
images; the images of the next window are read while the current one is processed.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import GenerationConfig

from finetune.batches.attempt import OutOfMemory, attempt
from finetune.batches.budget import KEPT_FEATURE_BYTES, REPLY_BATCH_ROWS, REPLY_BATCH_TOKENS
from finetune.batches.image_request import ImageRequest, VisionCache, image_key
from finetune.errors import Failed
from finetune.replies.image_features import ImageStore
from finetune.replies.lockstep import Lockstep
from finetune.replies.plan import Plan
from finetune.replies.reply_text import FirstOfChoices, StopAtText, StopWhenAbandoned, reply_text, stop_place
from finetune.replies.shared_prefix import PrefixedBatch, cut_prefixes, generate_from_prefixes
from finetune.replies.stop_ids import stop_ids_by
from finetune.replies.task_replies import Style
from qwenvl import ImageAccess, QwenVLConfig, QwenVLForConditionalGeneration, QwenVLImageProcessor, QwenVLTokenizer
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
    """Reply to every prompt, once each, batch by batch.

    The model's mode and generation config are restored when the iterator is exhausted or closed; random number
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
    was_training, config = model.training, base.generation_config
    model.eval()
    # Sampling and penalties of the model's own config must not change what is measured.
    base.generation_config = GenerationConfig()
    try:
        encode = base.get_image_features if lockstep is None else lockstep.encode
        with ImageStore(base, image_processor, keep_bytes, vision_cache, encode) as store:
            batch_tokens = decoding.batch_tokens
            # Two windows at once: images of the next one are read while the replies of the one before are generated.
            next_rows: list[_Row] = []
            for window in [*plan.order(_images_at_once(base, keep_bytes)), []]:
                rows, next_rows = next_rows, _open(prompts, window, store)
                while rows:
                    batch = rows[: _batch_size(rows, decoding, batch_tokens)]
                    replies = attempt(
                        partial(_reply, base, batch, tokenizer, decoding, store, on_bad_image, is_abandoned)
                    )
                    if is_abandoned():
                        return
                    if isinstance(replies, OutOfMemory):
                        # Where the model is sharded, others are in the forward that has failed.
                        batch_tokens = _smaller_budget(batch, prompts, decoding, replies, can_repeat=lockstep is None)
                        continue
                    rows = rows[len(batch) :]
                    yield from replies
    finally:
        base.generation_config = config
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


def _batch_size(rows: Sequence[_Row], decoding: Decoding, batch_tokens: int) -> int:
    """How many of the rows, the first of which is the longest, go into one batch."""
    row_tokens = len(rows[0].ids) + decoding.max_new_tokens
    return max(1, min(batch_tokens // row_tokens, decoding.batch_rows, len(rows)))


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


def _reply(
    model: QwenVLForConditionalGeneration,
    rows: Sequence[_Row],
    tokenizer: QwenVLTokenizer,
    decoding: Decoding,
    store: ImageStore,
    on_bad_image: Literal["refuse", "wrong"],
    is_abandoned: Callable[[], bool],
) -> list[Reply]:
    """The replies to one batch, those with unreadable images first."""
    features: dict[str, torch.Tensor] = {}
    bad: dict[str, ImageError] = {}
    for key, found in store.features({key: request for row in rows for key, request in row.images}).items():
        if not isinstance(found, ImageError):
            features[key] = found
        elif on_bad_image == "refuse":
            raise found
        else:
            bad[key] = found
    replies = [
        Reply(row.index, unreadable=str(next(bad[key] for key in row.keys if key in bad)))
        for row in rows
        if any(key in bad for key in row.keys)
    ]
    good = [row for row in rows if not any(key in bad for key in row.keys)]
    if good:
        own = [[features[key] for key in row.keys] for row in good]
        replies += _generate(model, good, own, tokenizer, decoding, is_abandoned)
    return replies


def _generate(
    model: QwenVLForConditionalGeneration,
    rows: Sequence[_Row],
    features: Sequence[Sequence[torch.Tensor]],
    tokenizer: QwenVLTokenizer,
    decoding: Decoding,
    is_abandoned: Callable[[], bool],
) -> list[Reply]:
    """The replies to rows with the features of their images, (n_queries, hidden) each, in reading order."""
    pad = tokenizer.pad_token_id
    batch = _cut(rows, model.config)
    generated = generate_from_prefixes(
        model,
        batch,
        features,
        pad,
        generation_config=GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            min_new_tokens=decoding.min_new_tokens or None,
            do_sample=False,
            eos_token_id=list(decoding.stop_ids) or None,
            pad_token_id=pad,
            use_cache=True,
        ),
        stopping_criteria=[
            StopWhenAbandoned(is_abandoned),
            *([StopAtText(tokenizer, batch.length, decoding.stop_texts)] if decoding.stop_texts else []),
        ],
        logits_processor=[FirstOfChoices(batch.length, [row.choices for row in rows])]
        if any(row.choices for row in rows)
        else None,
        # Where the model is sharded, `Lockstep` keeps the processes together.
        synced_gpus=False,
    )
    assert isinstance(generated, torch.Tensor), "no dictionary was asked for"
    new_ids = generated[:, batch.length :].tolist()
    return [_read(row, new, tokenizer, decoding) for row, new in zip(rows, new_ids, strict=True)]


def _cut(rows: Sequence[_Row], config: QwenVLConfig) -> PrefixedBatch:
    """The rows cut into prefixes and rests where that saves at least a tenth of the positions; otherwise whole."""
    ids = [row.ids for row in rows]
    whole = PrefixedBatch([], [], [list(own) for own in ids])
    # Beyond seq_length the rotary base depends on the length of the whole row, so prefixes cannot be shared.
    if max(map(len, ids)) > config.seq_length:
        return whole
    cut = cut_prefixes(ids, [tuple(row.keys) or row.index for row in rows], config)
    return cut if all(cut.prefixes) and cut.tokens < 0.9 * whole.tokens else whole


def _read(row: _Row, new: list[int], tokenizer: QwenVLTokenizer, decoding: Decoding) -> Reply:
    """One row of generated tokens; after its end it is padded to the longest row's length."""
    ends = {*decoding.stop_ids, tokenizer.pad_token_id}
    end = next((place for place, token in enumerate(new) if token in ends), len(new))
    text, stops = reply_text(tokenizer, new[:end]), decoding.stop_texts
    cut = end == decoding.max_new_tokens
    if (place := stop_place(text, stops)) is not None:
        # Without a stop token, Transformers continues this row until all rows have ended.
        while stop_place(reply_text(tokenizer, new[: end - 1]), stops) is not None:
            end -= 1
        text, cut = text[:place], False
    return Reply(row.index, tuple(new[:end]), text, cut=cut)
