"""What is wrong with a recipe, and where: problems are collected and raised together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Self

from finetune.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where a key or value was written: a line of a file, or an override."""

    file: str
    line: int = 1
    """Counted from 1."""
    column: int = 1
    """Counted from 1."""
    override: str | None = None
    """The whole override, for a value that did not come from the file."""

    def __str__(self) -> str:
        return f"override {self.override}" if self.override is not None else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, with its place, its key and what to do about it.

    Written out: `recipes/x.yaml:14: train.learning_rat: unknown key; did you mean train.learning_rate?`
    """

    place: Place
    key: str
    """Dotted path of the key, list indices as numbers (`data.train.0.path`); empty for the file as a whole."""
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        where = f"{self.place}: {self.key}" if self.key else str(self.place)
        return f"{where}: {self.reason}; {self.remedy}" if self.remedy else f"{where}: {self.reason}"


class RecipeError(UserError):
    """A recipe that cannot be used; the message has a line for each problem, all of them.

    Args:
        problems: at least one, in any order.
    """

    def __init__(self, problems: Iterable[Problem]):
        # Those of the file by line, then those of overrides.
        self.problems = tuple(
            sorted(problems, key=lambda problem: (problem.place.override is not None, problem.place.line))
        )
        super().__init__("\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


def nearest(word: str, candidates: Sequence[str]) -> list[str]:
    """The candidates that `word` was most likely meant to be: one, several that are equally near, or none."""
    allowed = 1 if len(word) < 6 else 2
    alike = [candidate for candidate in candidates if abs(len(candidate) - len(word)) <= allowed]
    distances = {candidate: edit_distance(word, candidate) for candidate in alike}
    least = min(distances.values(), default=allowed + 1)
    if least <= allowed:
        return [candidate for candidate, distance in distances.items() if distance == least]
    return get_close_matches(word, candidates, n=1)


def edit_distance(a: str, b: str) -> int:
    """Letters inserted, deleted, replaced or swapped with their neighbour to turn `a` into `b`."""
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


def dotted(path: Sequence[str | int]) -> str:
    """`("data", "train", 0, "path")` as `data.train.0.path`."""
    return ".".join(map(str, path))
