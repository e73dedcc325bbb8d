"""The tokens at which a reply ends."""

from pathlib import Path

from transformers import GenerationConfig

from finetune.replies.task_replies import Style
from qwenvl import QwenVLConfig, QwenVLTokenizer
from qwenvl.checkpoint.record import ModelRecord
from qwenvl.model.generation import read_published_settings, reply_as_trained, stored_generation_config


def stop_ids_as_trained(
    base: str | Path, config: QwenVLConfig, record: ModelRecord, tokenizer: QwenVLTokenizer, style: Style
) -> tuple[int, ...]:
    """The tokens at which the replies of a checkpoint, or of an adapter on it, end; no weights are read.

    Args:
        base: checkpoint folder or hub id, with or without a generation config.
        record: what was trained.

    Raises:
        InputError: its generation config is damaged.
    """
    settings = read_published_settings(stored_generation_config(base) or GenerationConfig(), config)
    return stop_ids_by(reply_as_trained(settings, config, record), tokenizer, style)


def stop_ids_by(settings: GenerationConfig | None, tokenizer: QwenVLTokenizer, style: Style) -> tuple[int, ...]:
    """The tokens at which a reply ends: those of a generation config, and for style chat the ends of a turn.

    The config of a base checkpoint has no end of a turn, but a chat adapter on it generates them.
    """
    eos = None if settings is None else settings.eos_token_id
    own = [] if eos is None else [eos] if isinstance(eos, int) else eos
    turns = [tokenizer.im_end_id, tokenizer.im_start_id] if style == "chat" else []
    return tuple(dict.fromkeys([*own, *turns, tokenizer.eod_id]))
