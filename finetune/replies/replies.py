"""Greedy replies to many prompts in a batch: the same tokens as one prompt at a time, with each image encoded once.

Prompts with the same images are neighbours, so that they join the batch together and their common prefix is computed
once. Groups of such prompts are ordered by their longest prompt and wait in windows of some hundred images; the images
of the next window are read while there are replies to the current one.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from peft import PeftModel

from finetune.batches.budget import KEPT_FEATURE_BYTES
from finetune.batches.image_request import ImageRequest, VisionCache, image_key
from finetune.replies.growing_replies import GrowingReplies, WaitingPrompt
from finetune.replies.image_features import ImageStore
from finetune.replies.lockstep import Lockstep
from finetune.replies.plan import Plan
from finetune.replies.reply import Decoding, Prompt, Reply
from finetune.replies.stop_ids import stop_ids_by
from finetune.replies.task_replies import Style
from qwenvl import QwenVLForConditionalGeneration, QwenVLImageProcessor, QwenVLTokenizer


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
            growing = GrowingReplies(base, prompts, tokenizer, decoding, store, on_bad_image, lockstep is None)
            # Images of the next window are read while there are replies to the one before.
            windows = iter(plan.order(_images_at_once(base, keep_bytes)))
            opened = _open(prompts, next(windows, []), store)
            waiting: deque[WaitingPrompt] = deque()
            order: deque[int] = deque()
            made: dict[int, Reply] = {}
            while waiting or opened or growing.rows:
                if not waiting and opened:
                    waiting.extend(opened)
                    order.extend(row.index for row in opened)
                    opened = _open(prompts, next(windows, []), store)
                if is_abandoned():
                    return
                ended = growing.next(waiting)
                if ended and is_abandoned():
                    return
                made |= {reply.index: reply for reply in ended}
                while order and order[0] in made:
                    yield made.pop(order.popleft())
    finally:
        model.train(was_training)


def _images_at_once(model: QwenVLForConditionalGeneration, keep_bytes: int) -> int:
    """How many images have features of `keep_bytes` together."""
    config = model.config
    if config.visual is None:
        return 64
    return max(1, keep_bytes // (config.n_queries * config.hidden_size * model.dtype.itemsize))


def _open(prompts: Sequence[Prompt], window: Sequence[int], store: ImageStore) -> list[WaitingPrompt]:
    """The rows of a window; the store begins to read their images."""
    rows: list[WaitingPrompt] = []
    requests: dict[str, ImageRequest] = {}
    for index in window:
        prompt = prompts[index]
        images = []
        for source in prompt.images:
            key = image_key(source, prompt.access)
            # One request for all prompts with this image: each has its own copy of the encoded bytes.
            request = requests.setdefault(key, ImageRequest(source, prompt.access, prompt.name))
            images.append((key, request))
        rows.append(WaitingPrompt(index, prompt.ids, images, prompt.choices))
    store.read_ahead(requests)
    return rows
