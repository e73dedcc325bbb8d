"""The questions of an evaluation: those of its sources, all of them or a sample that a seed draws.

A sample has as many questions of each source as of any other; a source with fewer gives all it has, and the others
share what is left. So a small source is scored as exactly as a large one, and in the score over all of them, their
questions' mean, it is not drowned by it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from finetune.data.sample import BadRow
from finetune.errors import UserError
from finetune.evaluation.questions import Question, Questions
from finetune.recipe.sections import name_given_twice
from finetune.replies.replies import Prompt
from qwenvl import QwenVLTokenizer


class QuestionSample(Sequence[Question]):
    """Questions of several sources as one sequence, in the order of the sources.

    Args:
        parts: the questions of each source.
        names: of the sources; with several, each question says which it is from.
        limit: only the first so many, over all sources; None is all.
        sample: so many of these, drawn without replacement; None is all.
        seed: of the draw.

    Attributes:
        chosen: (questions,) int64, their numbers among those of all sources, ascending.
        total: questions of all sources.
        answered: whether all answers are there to score with.
        counts: name of each source -> questions chosen of it; empty where there is one source.

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

    def __getitem__(self, index: int) -> Question:
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
        """What is wrong with the rows that were left out."""
        return [problem for part in self._parts for problem in part.problems]

    def fingerprint(self) -> str:
        """Hexadecimal digest of what is asked: the sources' rows, prompts and names, and which were chosen."""
        digest = hashlib.sha256(" ".join(part.fingerprint() for part in self._parts).encode())
        digest.update(" ".join(self.counts).encode())
        digest.update(self.chosen.tobytes())
        return digest.hexdigest()


def fair_shares(sizes: Sequence[int], count: int) -> list[int]:
    """How many to take of each, `count` in all, or all there are: equal numbers, as far as each has so many.

    fair_shares([500, 30, 300], 200) == [85, 30, 85]. What does not divide goes to the larger ones, of equals to the
    first.
    """
    shares = [0] * len(sizes)
    left = min(count, sum(sizes))
    # The smallest first: what it cannot give is left to those after it.
    for place, number in enumerate(sorted(range(len(sizes)), key=lambda number: (sizes[number], -number))):
        shares[number] = min(sizes[number], left // (len(sizes) - place))
        left -= shares[number]
    return shares


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
