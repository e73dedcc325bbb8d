"""What `generate` needs to know about this model: the stop tokens, and which images belong to which row."""

from pathlib import Path

import torch
from transformers import GenerationConfig

from qwenvl.checkpoint.checkpoint_files import find_file, read_json
from qwenvl.checkpoint.record import ModelRecord
from qwenvl.errors import InputError
from qwenvl.model.configuration import IMAGE_START_AFTER_END_OF_TEXT, QwenVLConfig
from qwenvl.model.image_span import image_span_starts

SAMPLING_ONLY = ("temperature", "top_p", "top_k", "typical_p", "min_p", "epsilon_cutoff", "eta_cutoff")


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
      published file has only the last as `eos_token_id`.
    - With `do_sample: false` sampling settings have no effect, but current Transformers refuses to save them.
    """
    if getattr(generation_config, "chat_format", None) == "chatml":
        end_of_text = end_of_text_id(generation_config, config)
        if end_of_text is not None:
            im_start, im_end = end_of_text + 1, end_of_text + 2
            generation_config.eos_token_id = [im_end, im_start, end_of_text]
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
    eos = generation_config.eos_token_id
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
