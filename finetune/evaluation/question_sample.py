"""The questions of an evaluation: those of all its sources, or a sample of them drawn by a seed.

A sample takes the same number of questions from each source; a source with fewer gives all it has, and the others
share the rest. So a small source is scored as precisely as a large one, and has the same weight in the score over all
questions.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import overload

import numpy as np

from finetune.data.sample import BadRow
from finetune.errors import UserError
from finetune.evaluation.questions import Question, Questions
from finetune.recipe.sources import name_given_twice
from finetune.replies.replies import Prompt
from qwenvl import QwenVLTokenizer


class QuestionSample(Sequence[Question]):
    """Questions of several sources as one sequence, in the order of the sources.

    Args:
        parts: the questions of each source.
        names: of the sources; with several, each question has the name of its source.
        limit: use only the first `limit` questions, over all sources; None uses all.
        sample: number of these to draw, without replacement; None takes all.
        seed: of the draw.

    Attributes:
        chosen: (questions,) int64, their numbers among the questions of all sources, ascending.
        total: number of questions of all sources.
        answered: whether all questions have gold answers to score with.
        pages_left_out: pages of files that are not shown, over the questions of all sources.
        counts: name of each source -> number of questions chosen from it; empty where there is one source.

    Raises:
        UserError: two sources have one name.
    """

    def __init__(
        self,
        parts: Sequence[Questions],
        *,
        names: Sequence[str],
        limit: int | None = None,
        sample: int | None = None,
        seed: int = 0,
    ):
        if (name := name_given_twice(names)) is not None:
            raise UserError(f"two sources are called {name}, and their scores are told apart by name: rename one")
        self._parts, self._names = list(parts), list(names)
        self._ends = np.cumsum([len(part) for part in parts])
        self.total = int(self._ends[-1])
        self.pages_left_out = sum(part.pages_left_out for part in parts)
        self.answered = all(part.answered for part in parts)
        count = self.total if limit is None else min(limit, self.total)
        starts = self._ends - [len(part) for part in parts]
        sizes = np.clip(count - starts, 0, [len(part) for part in parts])
        taken = sizes if sample is None else np.array(fair_shares(sizes.tolist(), sample))
        draw = np.random.default_rng(seed)
        drawn = [
            np.arange(size) if share == size else np.sort(draw.permutation(size)[:share])
            for size, share in zip(sizes, taken, strict=True)
        ]
        self.chosen = np.concatenate([start + numbers for start, numbers in zip(starts, drawn, strict=True)])
        self.counts = dict(zip(self._names, taken.tolist(), strict=True)) if len(parts) > 1 else {}

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> list[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | list[Question]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = self.chosen[index]
        part = int(np.searchsorted(self._ends, number, side="right"))
        question = self._parts[part][int(number - (self._ends[part - 1] if part else 0))]
        return replace(question, source=self._names[part]) if len(self._parts) > 1 else question

    def __str__(self) -> str:
        """`200 of 5,949 questions (boarding 100, before 100)`"""
        of = f" of {self.total:,}" if len(self) < self.total else ""
        each = ", ".join(f"{name} {count:,}" for name, count in self.counts.items())
        return f"{len(self):,}{of} questions" + (f" ({each})" if each else "")

    @property
    def problems(self) -> list[BadRow]:
        """The problems of the rows that were left out."""
        return [problem for part in self._parts for problem in part.problems]

    def fingerprint(self) -> str:
        """Hexadecimal digest of the questions: the sources' rows, prompts and names, and the chosen numbers."""
        digest = hashlib.sha256(" ".join(part.fingerprint() for part in self._parts).encode())
        digest.update(" ".join(self.counts).encode())
        digest.update(self.chosen.tobytes())
        return digest.hexdigest()


def fair_shares(sizes: Sequence[int], count: int) -> list[int]:
    """How many to take from each source, `count` in total: equal numbers, as far as each source has enough.

    fair_shares([500, 30, 300], 200) == [85, 30, 85]. A remainder goes to the larger sources, the first one of equals.
    """
    shares = [0] * len(sizes)
    left = min(count, sum(sizes))
    # The smallest first: what it lacks is left to the others.
    for place, number in enumerate(sorted(range(len(sizes)), key=lambda number: (sizes[number], -number))):
        shares[number] = min(sizes[number], left // (len(sizes) - place))
        left -= shares[number]
    return shares


class QuestionPrompts(Sequence[Prompt]):
    """The prompts of some questions, each rendered on access.

    Args:
        questions: all questions.
        numbers: which of them, in this order.
        tokenizer: of the model.
        n_queries: positions of an image, of the model.
    """

    def __init__(
        self, questions: Sequence[Question], numbers: Sequence[int], tokenizer: QwenVLTokenizer, n_queries: int
    ):
        self.questions, self.numbers = questions, numbers
        self._tokenizer, self._n_queries = tokenizer, n_queries

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        question = self.questions[self.numbers[index]]
        rendered = question.render(self._tokenizer, self._n_queries)
        choices = question.choices(self._tokenizer)
        return Prompt(rendered.ids, rendered.images, question.access, str(question.origin), choices)

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))
