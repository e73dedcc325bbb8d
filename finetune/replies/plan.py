"""In which order prompts are replied to, and how processes share them."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Plan:
    """The lengths and images of prompts, from which their order follows.

    Attributes:
        lengths: tokens of each prompt.
        images: for each prompt the numbers of its images; the same image has the same number in all prompts.
    """

    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    images: list[tuple[int, ...]] = field(default_factory=list)

    def order(self, images_at_once: int) -> list[list[int]]:
        """Order the prompts in windows of about `images_at_once` distinct images, those with the same images together.

        The longest prompt of such a group comes first, and groups are sorted by it, longest first: the first prompt of
        any slice is its longest, and the batches that need most memory come first.
        """
        longest_first = sorted(self._groups().items(), key=lambda item: -max(self.lengths[index] for index in item[1]))
        windows: list[list[int]] = []
        seen: set[int] = set()
        for images, group in longest_first:
            indices = sorted(group, key=lambda index: (-self.lengths[index], index))
            # Rows without images count too: a window is held in memory as a whole.
            if not windows or len(seen | set(images)) > images_at_once:
                windows.append([])
                seen = set()
            windows[-1] += indices
            seen |= set(images)
        return windows

    def shares(self, processes: int) -> list[list[int]]:
        """Share the prompts out over processes, in about equal numbers of tokens, those with the same images together.

        Returns:
            For each process the prompts' indices, ascending.
        """
        most = sum(self.lengths) / (2 * processes)  # so many questions on one image are not all for one process
        pieces: list[list[int]] = []
        for group in self._groups().values():
            size = most
            for index in group:
                size += self.lengths[index]
                if size > most:
                    pieces.append([])
                    size = self.lengths[index]
                pieces[-1].append(index)
        sizes = [sum(self.lengths[index] for index in piece) for piece in pieces]
        shares: list[list[int]] = [[] for _ in range(processes)]
        tokens = [0] * processes
        for number in sorted(range(len(pieces)), key=lambda number: -sizes[number]):
            emptiest = tokens.index(min(tokens))
            shares[emptiest] += pieces[number]
            tokens[emptiest] += sizes[number]
        return [sorted(share) for share in shares]

    def of(self, indices: Sequence[int]) -> "Plan":
        """The plan of some of the prompts."""
        return Plan(array("q", [self.lengths[index] for index in indices]), [self.images[index] for index in indices])

    def _groups(self) -> dict[tuple[int, ...], list[int]]:
        """The prompts with the same images; each without images by itself."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, images in enumerate(self.images):
            groups.setdefault(images or (-1 - index,), []).append(index)
        return groups
