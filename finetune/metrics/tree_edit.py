"""How near a JSON reply is to the right one: accuracy by tree edit distance.

The score is 1 - D(reply, gold) / D(nothing, gold), and 0 where that is negative. D is the fewest changes that turn one
tree into the other: a key is a node and costs 1, a text is a leaf and costs its characters; two texts that are put in
place of one another cost their Levenshtein distance. A mapping or list inside a list is a node as well. The order of
keys does not count, that of list items does.

Source: Kim et al. 2022, "OCR-free Document Understanding Transformer" (Donut), section 3.2; the distance is that of
Zhang and Shasha 1989, "Simple fast algorithms for the editing distance between trees".
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.metrics.answers import edit_distance

MOST_CELLS = 2_000_000
"""Of the tables of one comparison, some seconds of work."""
MOST_CHARACTERS = 4_000_000
"""Characters of all texts of the reply times those of the gold."""
_ITEM = "<item>"


@dataclass(frozen=True)
class Node:
    """A key, an item of a list, or a text (a leaf)."""

    label: str
    is_text: bool = False
    children: "list[Node]" = field(default_factory=list)

    @property
    def cost(self) -> int:
        """Of inserting or deleting it."""
        return len(self.label) if self.is_text else 1


def tree_accuracy(reply: Mapping[str, Any], gold: Mapping[str, Any]) -> float | None:
    """The score in [0, 1] of two JSON objects whose leaves are texts; None where they are too large to compare.

    None, for a missing value, is the same as a key that is left out.
    """
    mine, right = json_tree(reply), json_tree(gold)
    whole = sum(node.cost for node in _postorder(right)) - right.cost
    if not whole:
        return float(not mine.children)
    distance = tree_distance(mine, right)
    return None if distance is None else max(0.0, 1 - distance / whole)


def json_tree(value: Mapping[str, Any]) -> Node:
    """A JSON object as a tree: below a key its text, or a node for each mapping or item of its list."""
    return Node("<root>", children=_keys(value))


def _keys(value: Mapping[str, Any]) -> list[Node]:
    kept = [(str(key), item) for key, item in value.items() if item is not None and item != ""]
    return [Node(key, children=_items(item)) for key, item in sorted(kept, key=lambda one: (len(one[0]), one[0]))]


def _items(value: Any) -> list[Node]:
    items = value if isinstance(value, list) else [value]
    return [_item(item) for item in items if item is not None and item != ""]


def _item(value: Any) -> Node:
    if isinstance(value, Mapping):
        return Node(_ITEM, children=_keys(value))
    return Node(_ITEM, children=_items(value)) if isinstance(value, list) else Node(value, is_text=True)


def change_cost(one: Node, other: Node) -> int:
    """Of putting a node in place of another."""
    if one.is_text and other.is_text:
        return edit_distance(one.label, other.label)
    if one.is_text or other.is_text:
        return 1 + (one if one.is_text else other).cost
    return int(one.label != other.label)


def tree_distance(one: Node, other: Node, change: Callable[[Node, Node], int] = change_cost) -> int | None:
    """The fewest changes that turn one tree into the other, by cost; None beyond `MOST_CELLS` or `MOST_CHARACTERS`."""
    a, b = _Ordered.of(one), _Ordered.of(other)
    cells = a.cells * b.cells
    characters = [sum(len(node.label) for node in tree.nodes if node.is_text) for tree in (a, b)]
    if cells > MOST_CELLS or characters[0] * characters[1] > MOST_CHARACTERS:
        return None
    known: dict[tuple[str, bool, str, bool], int] = {}

    def changed(left: Node, right: Node) -> int:
        key = (left.label, left.is_text, right.label, right.is_text)
        if key not in known:
            known[key] = change(left, right)
        return known[key]

    between = [[0] * len(b.nodes) for _ in a.nodes]
    for i in a.keyroots:
        for j in b.keyroots:
            _between_forests(a, b, i, j, between, changed)
    return between[-1][-1]


@dataclass(frozen=True)
class _Ordered:
    """A tree's nodes in postorder.

    Attributes:
        first: of each node, the place of the leftmost leaf below it.
        keyroots: the places that are the root or have a sibling to their left, ascending.
    """

    nodes: list[Node]
    first: list[int]
    keyroots: list[int]

    @classmethod
    def of(cls, root: Node) -> "_Ordered":
        nodes: list[Node] = []
        first: list[int] = []

        def visit(node: Node) -> int:
            leftmost = [visit(child) for child in node.children]
            nodes.append(node)
            first.append(leftmost[0] if leftmost else len(nodes) - 1)
            return first[-1]

        visit(root)
        last = {place: number for number, place in enumerate(first)}
        return cls(nodes, first, sorted(last.values()))

    @property
    def cells(self) -> int:
        """Entries that the tables of its keyroots have along this tree's side."""
        return sum(root - self.first[root] + 2 for root in self.keyroots)


def _between_forests(
    a: _Ordered, b: _Ordered, i: int, j: int, between: list[list[int]], changed: Callable[[Node, Node], int]
) -> None:
    """Fill in the distances of the subtrees on the leftmost paths of two keyroots."""
    start_a, start_b = a.first[i], b.first[j]
    rows, columns = i - start_a + 2, j - start_b + 2
    forest = [[0] * columns for _ in range(rows)]
    for x in range(1, rows):
        forest[x][0] = forest[x - 1][0] + a.nodes[start_a + x - 1].cost
    for y in range(1, columns):
        forest[0][y] = forest[0][y - 1] + b.nodes[start_b + y - 1].cost
    for x in range(1, rows):
        place_a = start_a + x - 1
        node_a, first_a = a.nodes[place_a], a.first[place_a]
        for y in range(1, columns):
            place_b = start_b + y - 1
            node_b, first_b = b.nodes[place_b], b.first[place_b]
            least = min(forest[x - 1][y] + node_a.cost, forest[x][y - 1] + node_b.cost)
            if first_a == start_a and first_b == start_b:
                least = min(least, forest[x - 1][y - 1] + changed(node_a, node_b))
                between[place_a][place_b] = least
            else:
                least = min(least, forest[first_a - start_a][first_b - start_b] + between[place_a][place_b])
            forest[x][y] = least


def _postorder(node: Node) -> Iterator[Node]:
    for child in node.children:
        yield from _postorder(child)
    yield node
