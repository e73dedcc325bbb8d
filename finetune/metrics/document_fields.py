"""The fields of a document in a reply: read from JSON or as a single value, and scored.

Values are compared as `exact_match` compares answers: in Unicode's form C, without surrounding white space and letter
case. Numbers count as the text they are written as. A null, a blank value and a missing key are the same; where a
reply should be JSON and is none, no field of it is right, not even one without a value.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.metrics.answers import anls
from finetune.metrics.text_form import composed
from finetune.metrics.tree_edit import MOST_CHARACTERS, tree_accuracy

LONGEST_REPLY = 100_000
"""Characters of a JSON reply; a longer one counts as broken."""
DEEPEST = 64
"""Levels of lists and mappings in a JSON reply; one with more counts as broken."""
_FENCED = re.compile(r"\s*```(?:json)?[ \t]*\n(.*?)\n?```\s*", re.DOTALL | re.IGNORECASE)
_NULL = "null"


@dataclass(frozen=True)
class FieldsAsked:
    """What a question asks for.

    Attributes:
        names: of the fields; a single one where the reply is its value.
        gold: their values: text, lists and mappings of texts, or None.
        is_json: the reply is a JSON object of them.
    """

    names: tuple[str, ...]
    gold: tuple[Any, ...]
    is_json: bool


@dataclass(frozen=True)
class FieldsFound:
    """The fields of one reply against the right ones.

    Attributes:
        exact, anls: of each field asked for, in [0, 1]; texts too long for a distance count as exact match does.
        right: values of the reply that are in the gold; in lists and mappings each text is a value of its own.
        given: values of the reply, also under keys that were not asked for.
        gold: values of the gold.
        tree: see `tree_edit`; None where the reply is no JSON by its question, or too large to compare.
        broken: it should be a JSON object, and is none.
    """

    exact: dict[str, float]
    anls: dict[str, float]
    right: int
    given: int
    gold: int
    tree: float | None
    broken: bool

    @property
    def f1(self) -> float:
        """2 x right / (given + gold); 1 where there is nothing to find and nothing was given, but 0 if broken."""
        return 0.0 if self.broken else f1_of(self.right, self.given + self.gold)


def f1_of(right: float, total: float) -> float:
    """F1 from the right values, and those of reply and gold together."""
    return 2 * right / total if total else 1.0


def score_fields(reply: str, asked: FieldsAsked, *, compare_trees: bool = True) -> FieldsFound:
    """Score a reply.

    Args:
        reply: without the model's own tokens.
        compare_trees: False leaves out `tree`, which takes the most time.
    """
    gold = {name: _plain(value) for name, value in zip(asked.names, asked.gold, strict=True)}
    broken = False
    if asked.is_json:
        read = read_json_object(reply)
        broken = read is None
        found = {key: _plain(value) for key, value in (read or {}).items()}
    else:
        [name] = asked.names
        found = {name: _read_value(reply, gold[name])}
    in_gold, in_reply = Counter(_leaves(gold)), Counter(_leaves(found))
    tree = None
    if asked.is_json and compare_trees:
        tree = 0.0 if broken else tree_accuracy(found, gold)
    return FieldsFound(
        # No JSON says of no field that it has no value.
        exact={name: float(not broken and found.get(name) == gold[name]) for name in asked.names},
        anls={name: 0.0 if broken else _similarity(found.get(name), gold[name]) for name in asked.names},
        right=(in_gold & in_reply).total(),
        given=in_reply.total(),
        gold=in_gold.total(),
        tree=tree,
        broken=broken,
    )


def read_json_object(reply: str) -> dict[str, Any] | None:
    """The JSON object that a reply is, also between ``` lines; None where it is none. Numbers stay as written."""
    if fenced := _FENCED.fullmatch(reply[: LONGEST_REPLY + 1]):
        reply = fenced[1]
    if len(reply) > LONGEST_REPLY:
        return None
    try:
        value = json.loads(reply, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and _depth_is_bounded(value) else None


def _depth_is_bounded(value: Any, left: int = DEEPEST) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner: Sequence[Any] = list(value.values()) if isinstance(value, dict) else value
    return left > 0 and all(_depth_is_bounded(item, left - 1) for item in inner)


def _read_value(reply: str, gold: Any) -> Any:
    """The value in a reply to a question for one field; as JSON where the gold is a list or mapping."""
    if reply.strip().lower() == _NULL:
        return None
    if isinstance(gold, dict | list):
        try:
            return _plain(json.loads(reply[:LONGEST_REPLY], parse_int=str, parse_float=str, parse_constant=str))
        except (ValueError, RecursionError):
            return _plain(reply)
    return _plain(reply)


def _plain(value: Any) -> Any:
    """A value in the form that is compared: texts, and lists and mappings without what has no value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return composed(value).strip().lower() or None
    if isinstance(value, dict):
        kept = {str(key): _plain(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None} or None
    if isinstance(value, list | tuple):
        return [item for item in map(_plain, value) if item is not None] or None
    return value


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each text with the keys above it; items of a list share their path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, path)
    elif value is not None:
        yield path, value


def _similarity(found: Any, gold: Any) -> float:
    if found is None or gold is None:
        return float(found is None and gold is None)
    one, other = _text(found), _text(gold)
    if one == other or len(one) * len(other) > MOST_CHARACTERS:
        return float(one == other)
    return anls(one, [other])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
