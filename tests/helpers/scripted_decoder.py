"""A decoder whose replies are scripted, for tests of what runs it: order, ends, failures."""

import threading
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from finetune.replies.decoder import PromptRow
from qwenvl import QwenVLConfig, QwenVLProcessor

Script = Callable[[PromptRow], Sequence[int]]


class ScriptedDecoder:
    """Replies to a prompt with what `script` says, then with the end of a turn.

    Args:
        script: the tokens of a reply, by prompt.
        end: the token after them.
        vocabulary: how many tokens there are.
        held: each step waits until `permit` lets it go.

    Attributes:
        joined: the ids of prompts, by call of `join`.
        steps: how many rows each step had.
        live: the numbers of live rows.
        reused: of the prompts that joined last; those that were there before are known.
        dropped: how often what is kept was given up.
        before_join, before_step: called with the prompts, and with the numbers of the rows; may raise.
    """

    def __init__(self, script: Script, end: int, vocabulary: int, *, context: int = 4096, held: bool = False) -> None:
        self.most_rows = self.most_tokens = None
        self._script, self._end, self._vocabulary, self.context = script, end, vocabulary, context
        self._next = 0
        self._rows: dict[int, list[int]] = {}  # what each row will still say
        self._permits = threading.Semaphore(0) if held else None
        self.reused: list[int] = []
        self.dropped = 0
        self.joined: list[list[Sequence[int]]] = []
        self.steps: list[int] = []
        self.before_join: Callable[[Sequence[PromptRow]], None] = lambda rows: None
        self.before_step: Callable[[Sequence[int]], None] = lambda numbers: None

    @property
    def live(self) -> list[int]:
        return list(self._rows)

    def permit(self, steps: int = 1) -> None:
        """Let that many more steps go."""
        assert self._permits is not None
        self._permits.release(steps)

    def join(self, rows: Sequence[PromptRow]) -> tuple[list[int], torch.Tensor]:
        self.before_join(rows)
        before = {tuple(ids) for together in self.joined for ids in together}
        self.reused = [len(row.ids) if tuple(row.ids) in before else 0 for row in rows]
        self.joined.append([row.ids for row in rows])
        numbers = list(range(self._next, self._next + len(rows)))
        self._next += len(rows)
        self._rows |= {number: list(self._script(row)) for number, row in zip(numbers, rows, strict=True)}
        return numbers, self._logits(numbers)

    def step(self, tokens: Mapping[int, int]) -> torch.Tensor:
        if self._permits is not None:
            assert self._permits.acquire(timeout=20), "nobody lets the step go"
        assert list(tokens) == self.live, "each live row gets a token"
        self.before_step(list(tokens))
        self.steps.append(len(tokens))
        return self._logits(list(tokens))

    def drop_kept(self) -> bool:
        self.dropped += 1
        return False

    def leave(self, rows: Sequence[int]) -> None:
        for number in rows:
            del self._rows[number]

    def _logits(self, numbers: Sequence[int]) -> torch.Tensor:
        logits = torch.zeros(len(numbers), self._vocabulary)
        for row, number in enumerate(numbers):
            left = self._rows[number]
            logits[row, left.pop(0) if left else self._end] = 100.0
        return logits


def scripted_model(decoder: ScriptedDecoder, processor: QwenVLProcessor, config: QwenVLConfig) -> Any:
    """An `OpenedModel` that replies by script; `encode` counts the pictures in `encoded`."""
    model = SimpleNamespace(
        decoder=decoder,
        vision_key=lambda adapter: "",
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        config=config,
        encoded=0,
    )

    def encode(pixels: torch.Tensor, adapter: str | None) -> torch.Tensor:
        model.encoded += len(pixels)
        return pixels.float().mean((2, 3))[:, None].expand(-1, config.n_queries, -1).clone()

    model.encode = encode
    return model
