"""The questions of an evaluation: those of its sources, all of them or a sample that a seed draws."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from finetune.data.sample import BadRow
from finetune.questions import Question, Questions
from finetune.replies import Prompt
from qwenvl import QwenVLTokenizer


class QuestionSample(Sequence[Question]):
    """Questions of several sources as one sequence, in the order of the sources.

    Args:
        parts: the questions of each source.
        limit: only the first so many, over all sources; None is all.
        sample: so many of these, drawn without replacement; None is all.
        seed: of the draw.

    Attributes:
        chosen: (questions,) int64, their numbers among those of all sources, ascending.
        total: questions of all sources.
        answered: whether all answers are there to score with.
    """

    def __init__(
        self, parts: Sequence[Questions], *, limit: int | None = None, sample: int | None = None, seed: int = 0
    ):
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.total = int(self._ends[-1])
        self.answered = all(part.answered for part in parts)
        count = self.total if limit is None else min(limit, self.total)
        self.chosen = np.arange(count)
        if sample is not None and sample < count:
            self.chosen = np.sort(np.random.default_rng(seed).permutation(count)[:sample])

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Question:
        number = self.chosen[index]
        part = int(np.searchsorted(self._ends, number, side="right"))
        return self._parts[part][int(number - (self._ends[part - 1] if part else 0))]

    @property
    def problems(self) -> list[BadRow]:
        """What is wrong with the rows that were left out."""
        return [problem for part in self._parts for problem in part.problems]

    def fingerprint(self) -> str:
        """Hexadecimal digest of what is asked: the sources' rows and prompts, and which were chosen."""
        digest = hashlib.sha256(" ".join(part.fingerprint() for part in self._parts).encode())
        digest.update(self.chosen.tobytes())
        return digest.hexdigest()


class QuestionPrompts(Sequence[Prompt]):
    """The prompts of some questions, rendered when they are asked for.

    Args:
        questions: all of them.
        numbers: which of them, in this order.
    """

    def __init__(
        self, questions: Sequence[Question], numbers: Sequence[int], tokenizer: QwenVLTokenizer, n_queries: int
    ):
        self.questions, self.numbers = questions, numbers
        self._tokenizer, self._n_queries = tokenizer, n_queries

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Prompt:
        question = self.questions[self.numbers[index]]
        rendered = question.render(self._tokenizer, self._n_queries)
        return Prompt(rendered.ids, rendered.images, question.access, str(question.origin))

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))
