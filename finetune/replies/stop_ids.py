"""The tokens at which a reply ends."""

from transformers import GenerationConfig

from finetune.replies.task_replies import Style
from qwenvl import QwenVLTokenizer


def stop_ids_by(settings: GenerationConfig | None, tokenizer: QwenVLTokenizer, style: Style) -> tuple[int, ...]:
    """The tokens at which a reply ends: those of a generation config, and for style chat the ends of a turn.

    The config of a base checkpoint has no end of a turn, but a chat adapter on it generates them.
    """
    eos = None if settings is None else settings.eos_token_id
    own = [] if eos is None else [eos] if isinstance(eos, int) else eos
    turns = [tokenizer.im_end_id, tokenizer.im_start_id] if style == "chat" else []
    return tuple(dict.fromkeys([*own, *turns, tokenizer.eod_id]))
