"""The text of generated tokens, and where it is stopped."""

from collections.abc import Sequence
from typing import Literal

from qwenvl import QwenVLTokenizer


def reply_text(
    tokenizer: QwenVLTokenizer, ids: Sequence[int], errors: Literal["replace", "strict"] = "replace"
) -> str:
    """The text of generated tokens, with grounding tags and without other control tokens.

    Raises:
        UnicodeDecodeError: with `errors` "strict", they end within a character.
    """
    text = tokenizer.decode(list(ids), skip_special_tokens=True, keep_grounding=True, errors=errors)
    assert isinstance(text, str), "one sequence of ids decodes to one text"
    return text


def stop_place(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop text begins, leading white space aside; None where there is none."""
    begin = len(text) - len(text.lstrip())
    return min((place for stop in stops if (place := text.find(stop, begin)) >= 0), default=None)
