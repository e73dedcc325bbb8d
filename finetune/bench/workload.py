"""What the bench trains on: conversations of known lengths made of random tokens, batched for either setting.

Two kinds of samples, one image each:

| name | tokens | supervised |
|---|---|---|
| a length, such as 512 | exactly that many | half of the text: long replies |
| mix | as in question answering on documents, 310 on average | the answer and the token that ends it |

In the mix an image is 258 tokens; system turn, turn markers and prompt are `TURNS` tokens; question and answer have
means of `QUESTION` and `ANSWER` tokens. Both are log-normal, as lengths of texts are: at least 1, most below the mean,
a few long. No data set was measured for these numbers: they follow the published description of the task.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from finetune.batches.images import image_columns
from finetune.errors import UserError
from qwenvl import QwenVLConfig
from qwenvl.model.configuration import IMAGE_START_AFTER_END_OF_TEXT
from qwenvl.text.chat import IGNORED

MIX = "mix"
TURNS = 28
"""Tokens that every conversation of the mix has: system turn, turn markers, `Picture 1:`, `Answer:`."""
QUESTION, QUESTION_SPREAD = 15, 0.4
"""Mean tokens of a question, and the standard deviation of the logarithm."""
ANSWER, ANSWER_SPREAD = 8, 0.7
"""The same for an answer, without the token that ends it."""
LEAST_TEXT = 8
"""Fewest tokens besides the image."""


class Lengths(NamedTuple):
    """A sample's tokens, how many of them are supervised, and its images."""

    tokens: int
    supervised: int
    images: int


class BenchSample(NamedTuple):
    """A sample, for the trainer's messages."""

    origin: str


def draw_lengths(name: str, count: int, config: QwenVLConfig, *, most: int, seed: int = 0) -> list[Lengths]:
    """Samples of one row of the bench.

    Args:
        name: "mix", or a number of tokens.
        count: samples.
        most: tokens of the longest conversation that the recipe takes; longer ones of the mix are cut.

    Raises:
        UserError: fewer tokens than an image and a few words take.
    """
    images = 0 if config.visual is None else 1
    span = images * (config.n_queries + 2)
    if name != MIX:
        tokens = int(name)
        if tokens < span + LEAST_TEXT:
            raise UserError(f"--lengths {name}: an image and some text are at least {span + LEAST_TEXT} tokens")
        return [Lengths(tokens, (tokens - span) // 2, images)] * count
    if most < span + TURNS + LEAST_TEXT:
        raise UserError(f"--lengths mix: data.max_length {most} has no room for an image, a question and an answer")
    draws = np.random.default_rng(seed)
    lengths = []
    for _ in range(count):
        question, answer = _draw(draws, QUESTION, QUESTION_SPREAD), _draw(draws, ANSWER, ANSWER_SPREAD)
        question = min(question, most - span - TURNS - 2)
        answer = min(answer, most - span - TURNS - question - 1)
        lengths.append(Lengths(span + TURNS + question + answer + 1, answer + 1, images))
    return lengths


def _draw(draws: np.random.Generator, mean: float, spread: float) -> int:
    """Draw a log-normal length with this mean; its logarithm has the mean log(mean) - spread^2 / 2."""
    return max(1, round(draws.lognormal(math.log(mean) - spread**2 / 2, spread)))


class BenchCollator:
    """Takes the place of `collate.Collator`: makes batches of the same form without rendering or decoding anything.

    Ids and images are random, seeded by the sample's number: a sample is the same in every batch and setting.

    Args:
        lengths: of each sample.
        tokenizer: not used here; the trainer requires one.
        features: dtype of image features, for batches as with a vision cache; None gives pixels to encode.
    """

    def __init__(
        self, lengths: Sequence[Lengths], config: QwenVLConfig, tokenizer: Any, features: torch.dtype | None = None
    ):
        self.lengths = lengths
        self.config = config
        self.tokenizer = tokenizer
        self.samples = [BenchSample(f"sample {number}") for number in range(1, len(lengths) + 1)]
        self._images = [] if config.visual is None else [self._make_image(config.visual["image_size"], features)]

    def _make_image(self, side: int, features: torch.dtype | None) -> torch.Tensor:
        """The image of all samples, (3, side, side) uint8, or its (n_queries, hidden) features."""
        draws = torch.Generator().manual_seed(0)
        if features is not None:
            return torch.randn(self.config.n_queries, self.config.hidden_size, generator=draws).to(features)
        return torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=draws)

    def tokens_of(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels of a sample, (tokens,) each: image, question, reply."""
        tokens, supervised, images = self.lengths[number]
        config = self.config
        image_ids: list[int] = []
        words = config.vocab_size
        if images:
            start, pad, end = config.image_start_id, config.image_token_id, config.image_end_id
            assert start is not None and pad is not None and end is not None, "a model that takes images has these ids"
            image_ids = [start, *[pad] * config.n_queries, end]
            # Below the control tokens, which begin with <|endoftext|>.
            words = start - IMAGE_START_AFTER_END_OF_TEXT
        ids = torch.randint(0, words, (tokens,), generator=torch.Generator().manual_seed(number))
        ids[1 : 1 + len(image_ids)] = torch.tensor(image_ids, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        labels[tokens - supervised :] = ids[tokens - supervised :]
        return ids, labels

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, torch.Tensor]:
        """As `collate.Collator`: (1, tokens of all rows), concatenated."""
        numbers = [row["sample"] for row in rows]
        drawn = [self.tokens_of(number) for number in numbers]
        lengths = [len(ids) for ids, _ in drawn]
        batch = {
            "input_ids": torch.cat([ids for ids, _ in drawn])[None],
            "labels": torch.cat([labels for _, labels in drawn])[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "sequence_lengths": torch.tensor(lengths),
            "sequence_images": torch.tensor([self.lengths[number].images for number in numbers]),
            "samples": torch.tensor(numbers),
        }
        return {**image_columns(self._images * int(batch["sequence_images"].sum())), **batch}


class PaddedCollator(BenchCollator):
    """Batches of the published settings: one sample, padded at its end to a fixed length, with an attention mask.

    Args:
        padded_to: tokens of every batch.
    """

    def __init__(self, lengths: Sequence[Lengths], config: QwenVLConfig, tokenizer: Any, *, padded_to: int):
        super().__init__(lengths, config, tokenizer)
        assert max(sample.tokens for sample in lengths) <= padded_to
        self.padded_to = padded_to

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, torch.Tensor]:
        """(1, padded_to), with the columns of `BenchCollator` and `attention_mask`."""
        assert len(rows) == 1
        batch = super().__call__(rows)
        tokens = batch["input_ids"].shape[1]
        missing = (0, self.padded_to - tokens)
        batch["attention_mask"] = torch.nn.functional.pad(torch.ones(1, tokens, dtype=torch.long), missing)
        batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], missing)
        batch["labels"] = torch.nn.functional.pad(batch["labels"], missing, value=IGNORED)
        batch["position_ids"] = torch.arange(self.padded_to)[None]
        batch["sequence_lengths"] = torch.tensor([self.padded_to])
        return batch
