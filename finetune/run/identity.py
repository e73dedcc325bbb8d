"""What tells two runs apart: a resume continues the same run, or is refused."""

import json
from collections.abc import Collection, Iterator

from finetune.run.json_values import to_json


def compare_runs(stored: dict, now: dict, ignore: Collection[str] = ()) -> list[str]:
    """In what two runs' identities differ; a resume is refused where this is not empty.

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


def _differences(stored, now, path: str, ignore: Collection[str]) -> Iterator[str]:
    if path in ignore:
        return
    sides = [side for side in (stored, now) if side is not _ABSENT]
    if all(isinstance(side, dict) for side in sides) and (len(sides) == 2 or sides[0]):
        stored, now = ({} if side is _ABSENT else side for side in (stored, now))
        for key in stored | now:
            below = f"{path}.{key}" if path else key
            yield from _differences(stored.get(key, _ABSENT), now.get(key, _ABSENT), below, ignore)
    elif all(isinstance(side, list) for side in (stored, now)) and len(stored) == len(now):
        for index, (left, right) in enumerate(zip(stored, now, strict=True)):
            yield from _differences(left, right, f"{path}[{index}]", ignore)
    elif stored != now:
        shown = ["(absent)" if side is _ABSENT else json.dumps(side, ensure_ascii=False) for side in (stored, now)]
        yield f"{path}: {shown[0]} -> {shown[1]}"
