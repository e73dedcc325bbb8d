"""Which turns are trained: the keys by which other tools mark a turn that is context only.

`loss`, `train`, `training` and `trainable` are true or false, `loss_scale` and `weight` are 0 or 1; each is read in
every conversation format. A marked turn of the assistant gets `"train": False`, which `qwenvl.text.chat` reads.
"""

from collections.abc import Mapping
from typing import Any

from finetune.data.sample import BadField

FLAGS = frozenset({"loss", "train", "training", "trainable"})
WEIGHTS = frozenset({"loss_scale", "weight"})
LOSS_KEYS = FLAGS | WEIGHTS


def train_flag(turn: Mapping[str, Any], role: str, name: str) -> dict[str, bool]:
    """`{"train": False}` for an assistant's turn that is marked as not trained; nothing for every other one.

    Args:
        turn: with its keys as in the data; `role`, as Qwen-VL calls it.
        name: of the turn, for errors.

    Raises:
        BadField: a weight other than 0 and 1, marks that contradict each other, or another role that shall be trained.
    """
    if LOSS_KEYS.isdisjoint(turn):
        return {}
    given = {key: turn[key] for key in sorted(LOSS_KEYS & turn.keys()) if turn[key] is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadField(f"{name}.{key}", f"must be 0 or 1 (or false, true), not {value!r}"[:200])
    if len({bool(value) for value in given.values()}) > 1:
        raise BadField(name, f"is marked to be trained and not to be: {', '.join(given)}")
    if role != "assistant":
        # A weight of 1 changes nothing; a mark asks for what is not done.
        for key in FLAGS & given.keys():
            if given[key]:
                raise BadField(f"{name}.{key}", f"only the assistant's turns are trained, and this is the {role}'s")
        return {}
    return {"train": False} if given and not any(given.values()) else {}
