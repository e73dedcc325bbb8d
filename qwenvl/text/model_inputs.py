"""Rendered conversations as the columns of a batch: padded, truncated, masked."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import BatchFeature

from qwenvl.errors import InputError
from qwenvl.text.chat import IGNORED, Rendered

if TYPE_CHECKING:
    from qwenvl.text.tokenizer import QwenVLTokenizer


class ModelInputs(BatchFeature):
    """What the processor returns: a `BatchFeature` in which image placeholders are never labels.

    Collators of other programs, TRL's among them, take a batch's `input_ids` as its labels, and set them on the batch:

        batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        batch["labels"] = batch["input_ids"].clone()  # -100 at <imgpad>

    So losses that are computed outside of the model, and counts of labels, leave the placeholders out too.
    """

    image_token_id: int | None = None  # of the class: libraries make copies from the data alone

    def __init__(self, data: dict[str, Any], tensor_type: str | None = None, *, image_token_id: int | None = None):
        self.image_token_id = image_token_id
        super().__init__(data, tensor_type=tensor_type)

    def __setitem__(self, key: str, item: Any) -> None:
        if key == "labels" and isinstance(item, torch.Tensor) and self.image_token_id is not None:
            item = item.masked_fill(item == self.image_token_id, IGNORED)
        super().__setitem__(key, item)


def input_columns(
    rendered: Sequence[Rendered],
    tokenizer: "QwenVLTokenizer",
    *,
    assistant_masks: bool = False,
    padding: bool | str = False,
    padding_side: str | None = None,
    truncation: bool = False,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    add_special_tokens: bool = False,
) -> dict[str, list[list[int]]]:
    """Build `input_ids`, `attention_mask` and, with `assistant_masks=True`, `assistant_masks`: a list of rows each.

    Args:
        rendered: one conversation or prompt a row.
        tokenizer: for the padding token (`<|endoftext|>`) and the side.
        assistant_masks: add a column with 1 for trained tokens, 0 elsewhere.
        padding: False, True or "longest" (the longest row), or "max_length".
        padding_side: "left" or "right"; the tokenizer's own if None.
        truncation, max_length: cut rows at `max_length` tokens, but never inside or before an image.
        pad_to_multiple_of: round the padded length up.
        add_special_tokens: accepted for compatibility with Transformers; the rows have all their tokens already.

    Raises:
        InputError: truncation would cut or drop an image, or `padding="max_length"` without `max_length`.
    """
    columns = {
        "input_ids": [row.ids for row in rendered],
        "attention_mask": [[1] * len(row.ids) for row in rendered],
    }
    if assistant_masks:
        columns["assistant_masks"] = [[int(label != IGNORED) for label in row.labels] for row in rendered]
    if truncation and max_length is not None:
        _check_truncation(rendered, tokenizer.image_end_id, max_length)
        columns = {name: [values[:max_length] for values in rows] for name, rows in columns.items()}
    if padding in (False, "do_not_pad"):
        return columns
    length = max(len(ids) for ids in columns["input_ids"])
    if padding == "max_length":
        if max_length is None:
            raise InputError('padding="max_length" needs max_length')
        length = max(length, max_length)
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    side = padding_side or tokenizer.padding_side
    fill = {"input_ids": tokenizer.pad_token_id}
    return {name: [_pad(values, length, fill.get(name, 0), side) for values in rows] for name, rows in columns.items()}


def conversation_batch(conversation: Sequence[Any]) -> tuple[list[Any], bool]:
    """A conversation (list of messages) or a list of conversations, as a list; and whether it was a list of them."""
    is_batch = bool(conversation) and not isinstance(conversation[0], Mapping)
    return (list(conversation) if is_batch else [conversation]), is_batch


def check_template_arguments(
    chat_template: str | None, own: str | dict[str, str] | None, tools: Any, documents: Any
) -> None:
    """Check the arguments of `apply_chat_template` that have no effect on Qwen-VL's format.

    Raises:
        InputError: a chat template other than `own`, tools, or documents.
    """
    if chat_template not in (None, own):
        raise InputError("Qwen-VL conversations are rendered by qwenvl.chat: leave chat_template out")
    if tools or documents:
        raise InputError("Qwen-VL's format has no tools and no documents: leave them out")


def _check_truncation(rendered: Sequence[Rendered], image_end_id: int, max_length: int) -> None:
    for index, row in enumerate(rendered):
        if image_end_id in row.ids[max_length:]:
            raise InputError(
                f"conversation {index} has {len(row.ids)} tokens; truncating it to max_length={max_length} would cut "
                "or drop an image. Raise max_length, shorten the text, or leave the conversation out"
            )


def _pad(values: list[int], length: int, fill: int, side: str) -> list[int]:
    padding = [fill] * (length - len(values))
    return padding + values if side == "left" else values + padding
