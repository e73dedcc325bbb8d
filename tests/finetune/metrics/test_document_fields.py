"""Fields in replies and JSON by tree edit distance, against values worked out by hand and by brute force."""

import itertools
import json

import numpy as np
import pytest

from finetune.metrics import tree_edit
from finetune.metrics.document_fields import FieldsAsked, read_json_object, score_fields
from finetune.metrics.tree_edit import Node, json_tree, tree_accuracy, tree_distance

GOLD = {"no": "A-17", "date": None, "total": "12.40"}


def asked(gold=GOLD):
    return FieldsAsked(tuple(gold), tuple(gold.values()), is_json=True)


def test_a_reply_with_one_right_one_wrong_and_one_invented_field():
    found = score_fields('{"no": "a-17 ", "date": "May 4", "total": 12.5, "tip": "1"}', asked())
    # "12.5" against "12.40": two changes (4 -> 5, 0 deleted) of five characters.
    assert found.exact == {"no": 1, "date": 0, "total": 0}
    assert found.anls == {"no": 1, "date": 0, "total": pytest.approx(1 - 2 / 5)}
    # Given: no, date, total, tip; in the gold: no, total; right: no.
    assert (found.right, found.given, found.gold) == (1, 4, 2) and found.f1 == pytest.approx(2 / 6)
    # Changes: date (1) and "may 4" (5) inserted, tip (1) and "1" (1) inserted, two in the total.
    # The gold by itself: two keys, 4 and 5 characters.
    assert found.tree == pytest.approx(max(0, 1 - 10 / 11)) and not found.broken


@pytest.mark.parametrize(
    ("reply", "tree", "f1"),
    [
        ('{"no": "A-17", "total": "12.40"}', 1, 1),
        ('{"total": "12.40", "date": null, "no": "A-17"}', 1, 1),  # another order, and null
        ('```json\n{"no": "A-17", "date": "", "total": 12.40}\n```', 1, 1),  # a number as it is written
        ("{}", 0, 0),
        ('{"no": "A-17"}', 1 - 6 / 11, 2 / 3),  # total (1) and its text (5) are missing
        ('{"no": "A-18", "total": "12.40"}', 1 - 1 / 11, 2 / 4),
        ('{"nr": "A-17", "total": "12.40"}', 1 - 1 / 11, 2 / 4),  # another key costs 1
    ],
)
def test_replies_by_hand(reply, tree, f1):
    found = score_fields(reply, asked())
    assert found.tree == pytest.approx(tree) and found.f1 == pytest.approx(f1) and not found.broken


@pytest.mark.parametrize(
    "reply",
    ["", "A-17", '["A-17"]', '{"no": "A-17"', "{'no': 'A-17'}", 'The JSON: {"no": "A-17"}', "null", "[" * 100_000]
    + ['{"a": ' * 80 + "1" + "}" * 80, json.dumps({"no": "x" * 100_001})],
)
def test_broken_json_scores_nothing_and_is_counted(reply):
    found = score_fields(reply, asked())
    assert found.broken and found.tree == 0 and found.f1 == 0 and found.given == 0
    assert found.exact == found.anls == {"no": 0, "date": 0, "total": 0}  # nor does it say that there is no date
    nothing = score_fields(reply, FieldsAsked(("date",), (None,), is_json=True))
    assert nothing.f1 == 0 and nothing.exact == {"date": 0}


def test_forms_of_unicode_and_kinds_of_values():
    decomposed, composed = "Cafe\u0301", "Caf\u00e9"
    gold = {"shop": composed, "paid": "true", "big": "1e400"}
    found = score_fields(json.dumps({"shop": decomposed, "paid": True})[:-1] + ', "big": 1e400}', asked(gold))
    assert found.f1 == 1 and found.tree == 1
    assert read_json_object('{"n": NaN}') == {"n": "NaN"}


def test_lists_and_mappings_count_each_text():
    gold = {"lines": [{"item": "tea", "price": "2"}, {"item": "rice", "price": "5"}], "total": "7"}
    assert score_fields(json.dumps(gold), asked(gold)).f1 == 1
    found = score_fields('{"lines": [{"item": "tea", "price": "3"}], "total": "7"}', asked(gold))
    assert (found.right, found.given, found.gold) == (2, 3, 5)
    assert found.exact == {"lines": 0, "total": 1}
    # The gold: lines 1, two items 2, four keys 4, texts 3 + 1 + 4 + 1, total 1 + 1 = 18 without its root.
    # Changes: "2" -> "3" costs 1; an item with two keys and texts of 4 and 1 is missing: 8.
    assert found.tree == pytest.approx(1 - 9 / 18)
    turned = score_fields(json.dumps({**gold, "lines": gold["lines"][::-1]}), asked(gold))
    assert turned.f1 == 1 and turned.tree < 1 and turned.exact["lines"] == 0  # items have an order


@pytest.mark.parametrize(
    ("reply", "gold", "exact", "counts"),
    [
        ("12.40", "12.40", 1, (1, 1, 1)),
        (" 12.40\n", "12.40", 1, (1, 1, 1)),
        ("", "12.40", 0, (0, 0, 1)),
        ("null", None, 1, (0, 0, 0)),
        ("", None, 1, (0, 0, 0)),
        ("May 4", None, 0, (0, 1, 0)),
        ('["a", "b"]', ["a", "b"], 1, (2, 2, 2)),
        ("a", ["a", "b"], 0, (1, 1, 2)),
    ],
)
def test_a_question_for_one_field(reply, gold, exact, counts):
    found = score_fields(reply, FieldsAsked(("x",), (gold,), is_json=False))
    assert found.exact == {"x": exact} and (found.right, found.given, found.gold) == counts and found.tree is None


def test_nothing_to_find():
    assert tree_accuracy({}, {"a": None}) == 1 and tree_accuracy({"a": "x"}, {}) == 0
    assert score_fields("{}", asked({"a": None})).f1 == 1


def by_mappings(one: Node, other: Node) -> int:
    """The distance as the cheapest mapping that keeps ancestors and order; tries all of them."""

    def listed(root):
        nodes, above = [], []

        def visit(node, ancestors):
            own = len(nodes)
            nodes.append(node)
            above.append(set(ancestors))
            for child in node.children:
                visit(child, [*ancestors, own])

        visit(root, [])
        return nodes, above  # in preorder

    (a, above_a), (b, above_b) = listed(one), listed(other)
    best = sum(node.cost for node in (*a, *b))
    for size in range(1, min(len(a), len(b)) + 1):
        for chosen in itertools.combinations(range(len(a)), size):
            for images in itertools.combinations(range(len(b)), size):
                pairs = list(zip(chosen, images, strict=True))
                kept = all(
                    (x in above_a[y]) == (v in above_b[w]) for (x, v), (y, w) in itertools.combinations(pairs, 2)
                )
                if kept:
                    cost = sum(tree_edit.change_cost(a[x], b[v]) for x, v in pairs)
                    cost += sum(a[x].cost for x in range(len(a)) if x not in chosen)
                    cost += sum(b[v].cost for v in range(len(b)) if v not in images)
                    best = min(best, cost)
    return best


def test_the_distance_is_the_cheapest_mapping():
    draw = np.random.default_rng(0)

    def tree(left):
        node = Node(str(draw.choice(["a", "b", "cc"])), is_text=bool(draw.random() < 0.4))
        if node.is_text:
            return node, left - 1
        left -= 1
        while left > 0 and draw.random() < 0.65:
            child, left = tree(left)
            node.children.append(child)
        return node, left

    sizes = set()
    for _ in range(150):
        (one, _), (other, _) = tree(5), tree(5)
        assert tree_distance(one, other) == by_mappings(one, other)
        sizes.add(len(one.children))
    assert len(sizes) > 2


def test_large_trees_are_not_compared():
    many = {"lines": [{"a": str(n), "b": "x"} for n in range(800)]}
    assert tree_accuracy(many, many) is None
    long = {"a": "x" * 3000}
    assert tree_accuracy(long, long) is None and score_fields(json.dumps(long), asked(long)).f1 == 1
    assert json_tree({"a": ["x", ["y"], {"b": "z"}, None]}).children[0].children[1].children[0].label == "y"
