"""Keys and values of rows that have ended: what the next prompts begin with need not be computed again."""

from collections import OrderedDict

from finetune.replies.prompt_tokens import ComparedTokens
from finetune.replies.row_cache import KeysAndValues


class PrefixStore:
    """At most `most_bytes` of keys and values, the least recently used dropped first.

    A row is found by the hashes of its beginnings, which are compared token by token then.

    Args:
        most_bytes: of keys and values together; 0 keeps none.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._kept: OrderedDict[int, tuple[ComparedTokens, KeysAndValues]] = OrderedDict()
        self._by_hash: dict[int, set[int]] = {}  # of a beginning, the rows that have it
        self._next = 0
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, tokens: ComparedTokens) -> tuple[int, KeysAndValues]:
        """How many tokens a kept row begins with that these do too, and the row; 0 where there is none."""
        for value in reversed(tokens.chain):
            if value in self._by_hash:
                number = max(self._by_hash[value])
                kept, keys_and_values = self._kept[number]
                self._kept.move_to_end(number)
                return tokens.common(kept), keys_and_values
        return 0, []

    def keep(self, tokens: ComparedTokens, row: KeysAndValues) -> None:
        """Keep copies of a row's keys and values.

        Args:
            tokens: of the row.
            row: views of them.
        """
        size = sum(key.nbytes + value.nbytes for key, value in row)
        if not tokens.chain or size > self.most_bytes:
            return
        for number in self._by_hash.get(tokens.chain[-1], ()):  # it is the beginning of a kept row
            self._kept.move_to_end(number)
            return
        # Rows that are the beginning of this one are part of it.
        found = set().union(*(self._by_hash.get(value, ()) for value in tokens.chain))
        for number in found:
            if self._kept[number][0].chain[-1] in tokens.chain:
                self._drop(number)
        while self.bytes + size > self.most_bytes:
            self._drop(next(iter(self._kept)))
        self._kept[self._next] = tokens, [(key.clone(), value.clone()) for key, value in row]
        for value in tokens.chain:
            self._by_hash.setdefault(value, set()).add(self._next)
        self._next += 1
        self.bytes += size

    def clear(self) -> bool:
        """Drop all rows; whether there were any."""
        had = bool(self._kept)
        self._kept.clear()
        self._by_hash.clear()
        self.bytes = 0
        return had

    def forget(self, adapter: str) -> None:
        """Drop the rows of an adapter that goes."""
        for number in [number for number, (tokens, _) in self._kept.items() if tokens.adapter == adapter]:
            self._drop(number)

    def _drop(self, number: int) -> None:
        tokens, row = self._kept.pop(number)
        self.bytes -= sum(key.nbytes + value.nbytes for key, value in row)
        for value in tokens.chain:
            self._by_hash[value].discard(number)
            if not self._by_hash[value]:
                del self._by_hash[value]
