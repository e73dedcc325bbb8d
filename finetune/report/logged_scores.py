"""Which logged keys of a run are scores (eval_anls), and which are of a part of the data (eval_anls_boarding)."""

from collections.abc import Iterable
from typing import get_args

from finetune.recipe.sections import MetricName

# Endings of an evaluation's speeds and counts, which say nothing about the model: ours, Transformers', TRL's.
_NOT_A_SCORE = (
    *("_runtime", "_seconds", "_per_second", "_preparation_time"),
    *("_tokens", "_samples", "_images", "_entropy"),
)
_WHOLES = tuple(f"eval_{metric}" for metric in get_args(MetricName))
_PARTS = tuple(f"{whole}_" for whole in _WHOLES)


def is_score(key: str) -> bool:
    """Whether a logged key rates the model: eval_loss and eval_anls, not eval_runtime.

    So does the score of a part of the data, whatever its name: eval_anls_images.
    """
    return key.startswith("eval_") and (key.startswith(_PARTS) or not key.endswith(_NOT_A_SCORE))


def parts_of_scores(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """The scores among logged keys, each with those of its parts: {"eval_anls": {"eval_anls_boarding": "boarding"}}.

    The key of a part, a source or a group of the data, starts with that of the whole; a key without its whole is a
    score by itself. The order of the keys is kept.
    """
    scores = [key for key in dict.fromkeys(keys) if is_score(key)]
    wholes = {f"{key}_": key for key in scores if key in _WHOLES}
    found: dict[str, dict[str, str]] = {}
    for key in scores:
        start = next((start for start in wholes if key.startswith(start)), None)
        if start is None:
            found.setdefault(key, {})
        else:
            found.setdefault(wholes[start], {})[key] = key.removeprefix(start)
    return found
