"""The identity of a run: a resume continues the same run, or is refused."""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from finetune.run.json_values import to_json


def compare_runs(stored: Mapping[str, Any], now: Mapping[str, Any], ignore: Collection[str] = ()) -> list[str]:
    """List the differences between two runs' identities; a resume is refused where there are any.

    Args:
        stored: from `run.json`.
        now: of the run about to start.
        ignore: key paths (`recipe.output`), each with all below it.

    Returns:
        Lines `key.path: stored -> now`, values as JSON, in the order of the keys.
    """
    # Both as JSON gives them back, so that a tuple is no difference from the list it was stored as.
    return list(_differences(json.loads(to_json(stored)), json.loads(to_json(now)), "", frozenset(ignore)))


_ABSENT = object()


def _differences(stored: object, now: object, path: str, ignore: Collection[str]) -> Iterator[str]:
    if path in ignore:
        return
    left, right = ({} if side is _ABSENT else side for side in (stored, now))
    absent = stored is _ABSENT or now is _ABSENT
    # A section that one side does not have is compared key by key too, unless the other side's is empty.
    if isinstance(left, dict) and isinstance(right, dict) and (left or right or not absent):
        for key in left | right:
            below = f"{path}.{key}" if path else key
            yield from _differences(left.get(key, _ABSENT), right.get(key, _ABSENT), below, ignore)
    elif isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        for index, (one, other) in enumerate(zip(stored, now, strict=True)):
            yield from _differences(one, other, f"{path}[{index}]", ignore)
    elif stored != now:
        shown = ["(absent)" if side is _ABSENT else json.dumps(side, ensure_ascii=False) for side in (stored, now)]
        yield f"{path}: {shown[0]} -> {shown[1]}"
