"""When and how generated tokens are a reply: their text, where it is stopped, and what its first token may be."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from transformers import LogitsProcessor, StoppingCriteria

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


class StopAtText(StoppingCriteria):
    """Ends each row once its new tokens spell a stop text."""

    def __init__(self, tokenizer: QwenVLTokenizer, prompt_length: int, stops: Sequence[str]):
        self.tokenizer, self.prompt_length, self.stops = tokenizer, prompt_length, stops

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        texts = [reply_text(self.tokenizer, ids) for ids in input_ids[:, self.prompt_length :].tolist()]
        ended = [stop_place(text, self.stops) is not None for text in texts]
        return torch.tensor(ended, device=input_ids.device)


class StopWhenAbandoned(StoppingCriteria):
    """Ends all rows once nobody wants the replies any more."""

    def __init__(self, is_abandoned: Callable[[], bool]):
        self.is_abandoned = is_abandoned

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], self.is_abandoned(), device=input_ids.device)


class FirstOfChoices(LogitsProcessor):
    """Leaves each row its choices as the first new token, so that greedy decoding takes the likeliest of them."""

    def __init__(self, prompt_length: int, choices: Sequence[tuple[int, ...]]):
        self.prompt_length, self.choices = prompt_length, choices

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if input_ids.shape[1] > self.prompt_length:
            return scores
        kept = torch.full_like(scores, -torch.inf)
        for row, own in enumerate(self.choices):
            places = list(own) or slice(None)
            kept[row, places] = scores[row, places]
        return cast(torch.FloatTensor, kept)
