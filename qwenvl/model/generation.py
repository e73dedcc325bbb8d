"""What `generate` needs to know about this model: the stop tokens, and which images belong to which row."""

import os
from pathlib import Path
from typing import Any, Self

import torch
from transformers import GenerationConfig

from qwenvl.checkpoint.checkpoint_files import find_file, read_json
from qwenvl.checkpoint.record import ModelRecord
from qwenvl.errors import InputError
from qwenvl.model.configuration import IMAGE_START_AFTER_END_OF_TEXT, QwenVLConfig
from qwenvl.model.image_span import image_span_starts

SAMPLING_ONLY = ("temperature", "top_p", "top_k", "typical_p", "min_p", "epsilon_cutoff", "eta_cutoff")


class PublishedGenerationConfig(GenerationConfig):
    """A generation config that is saved as published: with an integer `eos_token_id` beside `chat_format: chatml`.

    In memory all three tokens at which a reply of ChatML ends are stop tokens (`read_published_settings`). The
    published code takes them from `chat_format`, and its streaming (`transformers_stream_generator`) ends after one
    token when a file has a list.
    """

    @classmethod
    def of(cls, generation_config: GenerationConfig) -> Self:
        """The same settings."""
        published = cls()
        published.__dict__.update(generation_config.__dict__)
        return published

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        in_memory = self.eos_token_id
        self.eos_token_id = published_eos(in_memory, getattr(self, "chat_format", None))
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.eos_token_id = in_memory


def published_eos(eos_token_id: Any, chat_format: Any) -> Any:
    """`eos_token_id` as a published `generation_config.json` has it: an integer.

    That is the one token of a list of one, and of ChatML's three, which follow each other in the vocabulary, the first
    (`<|endoftext|>`, `<|im_start|>`, `<|im_end|>`): `chat_format` says the rest. Other lists are returned as they are.
    """
    if not isinstance(eos_token_id, list) or not eos_token_id:
        return eos_token_id
    if not all(isinstance(token, int) for token in eos_token_id):
        return eos_token_id
    tokens, first = set(eos_token_id), min(eos_token_id)
    if len(tokens) == 1 or (chat_format == "chatml" and tokens == {first, first + 1, first + 2}):
        return first
    return eos_token_id


def stored_generation_config(checkpoint: str | Path) -> GenerationConfig | None:
    """Read the generation config of a checkpoint folder or hub id; None if it has none.

    Raises:
        InputError: `generation_config.json` cannot be read, or is no JSON object.
    """
    file = find_file(checkpoint, "generation_config.json")
    if file is None:
        return None
    read_json(file)  # names the file if it is damaged
    return GenerationConfig.from_pretrained(file.parent)


def read_published_settings(generation_config: GenerationConfig, config: QwenVLConfig) -> GenerationConfig:
    """Adapt a published generation config to current Transformers, in place.

    - `chat_format: "chatml"` means that replies end at `<|im_end|>`, `<|im_start|>` or `<|endoftext|>`, but the
      published file has only the last as `eos_token_id`. Other tokens in a list there are kept.
    - With `do_sample: false` sampling settings have no effect, but current Transformers refuses to save them.
    """
    if getattr(generation_config, "chat_format", None) == "chatml":
        end_of_text = end_of_text_id(generation_config, config)
        if end_of_text is not None:
            im_start, im_end = end_of_text + 1, end_of_text + 2
            stops, stored = [im_end, im_start, end_of_text], generation_config.eos_token_id
            others = [token for token in stored if token not in stops] if isinstance(stored, list) else []
            generation_config.eos_token_id = stops + others
            if generation_config.pad_token_id is None:
                generation_config.pad_token_id = end_of_text
    if not generation_config.do_sample:
        for setting in SAMPLING_ONLY:
            if getattr(generation_config, setting, None) is not None:
                setattr(generation_config, setting, None)
    return generation_config


def reply_as_trained(settings: GenerationConfig, config: QwenVLConfig, record: ModelRecord) -> GenerationConfig:
    """Let replies end where they ended in training, in place: the base of a chat adapter has no end of a turn."""
    if record.chat_format is None:
        return settings
    setattr(settings, "chat_format", record.chat_format)  # noqa: B010  # the published key, which no attribute declares
    read_published_settings(settings, config)
    if record.stop_ids:
        settings.eos_token_id = list(record.stop_ids) if len(record.stop_ids) > 1 else record.stop_ids[0]
    return settings


def end_of_text_id(generation_config: GenerationConfig, config: QwenVLConfig) -> int | None:
    """Id of `<|endoftext|>`: counted back from `<img>`, or the `eos_token_id` of a text-only checkpoint."""
    if config.image_start_id is not None:
        return config.image_start_id - IMAGE_START_AFTER_END_OF_TEXT
    eos = published_eos(generation_config.eos_token_id, getattr(generation_config, "chat_format", None))
    return eos if isinstance(eos, int) else None


def refuse_chunked_prefill(*chunk_sizes: int | None) -> None:
    """Check that no chunk size is set.

    Dynamic NTK depends on the length of the whole prompt (see `rotary.py`), which is unknown in the first chunk:
    logits would be silently wrong.

    Raises:
        InputError: a chunk size is set.
    """
    if any(size is not None for size in chunk_sizes):
        raise InputError("prefill_chunk_size is not supported by this model: remove it (set it to None)")


def images_per_row(input_ids: torch.Tensor, config: QwenVLConfig) -> list[int]:
    """Complete image spans in each row of (batch, length) ids."""
    return image_span_starts(input_ids, config).sum(dim=1).tolist()


def repeat_images(
    image_features: torch.Tensor, input_ids: torch.Tensor, times: int, config: QwenVLConfig
) -> torch.Tensor:
    """Image features for a batch in which each row is repeated `times` times (beams, several returned sequences).

    (images, n_queries, hidden) in reading order -> (images * times, n_queries, hidden). A plain repeat_interleave
    of the images would give a row with two images its first one twice.
    """
    rows = image_features.split(images_per_row(input_ids, config))
    return torch.cat([row for row in rows for _ in range(times)])


def images_of_suffix(
    image_features: torch.Tensor, input_ids: torch.Tensor, suffix_length: int, config: QwenVLConfig
) -> torch.Tensor | None:
    """The features of the images that begin in the last `suffix_length` tokens; the cache has the others.

    Features that are of the suffix's images only are returned unchanged.
    """
    in_suffix = images_per_row(input_ids[:, -suffix_length:], config)
    if sum(in_suffix) == len(image_features):
        return image_features
    rows = image_features.split(images_per_row(input_ids, config))
    kept = [row[len(row) - count :] for row, count in zip(rows, in_suffix, strict=True)]
    return torch.cat(kept) if sum(in_suffix) else None
