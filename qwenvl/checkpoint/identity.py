"""Which checkpoint a model was trained on: what decides what it computes, wherever and however it is stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenvl.errors import InputError

Setting = bool | int | float | str | None

IMAGE_SIZE = "preprocessor.size"
"""The key of `BaseIdentity.computation` for the side of images in pixels: `visual.image_size`, unless a file of the
image processor says another."""

ABSENT = "not set"


@dataclass(frozen=True)
class BaseIdentity:
    """The identity of a checkpoint; `qwenvl.base_check.identify_base` finds it.

    Adapters and runs from before there were all of these know `sampled` alone.

    Attributes:
        weights: fingerprint of every value of its weights (`fingerprint.weights_fingerprint`); of a 4-bit folder,
            those of the 16-bit checkpoint that it was made from. None where it is not known.
        computation: what in its configuration changes what the model computes, by key, such as `visual.image_size`;
            with the defaults of keys that are absent. None where it is not known.
        tokenizer: fingerprint of its vocabulary (`fingerprint.vocabulary_fingerprint`). None where it is not known, or
            there is none.
        sampled: fingerprint of some values of each tensor (`fingerprint.sampled_fingerprint`).
    """

    weights: str | None
    computation: Mapping[str, Setting] | None
    tokenizer: str | None
    sampled: str

    @property
    def fingerprint(self) -> str:
        """Of the weights, to be shown: of every value where that is known."""
        return self.weights or self.sampled


def differences(expected: BaseIdentity, found: BaseIdentity) -> list[str]:
    """List in what a checkpoint differs from the one that was expected; empty where it is the same.

    What one of the two does not know is not compared, nor are keys that were not noted of the expected one. Sampled
    values of the weights are compared only where one of the two knows nothing better.

    Returns:
        Phrases such as `config.json: visual.image_size was 280, is 140`.
    """
    lines = []
    if expected.weights is not None and found.weights is not None:
        weights = expected.weights, found.weights
    else:
        weights = expected.sampled, found.sampled
    if weights[0] != weights[1]:
        lines.append(f"other weights (fingerprint was {weights[0]}, is {weights[1]})")
    if expected.computation is not None and found.computation is not None:
        changed = {
            key: f"was {_shown(was)}, is {_shown(found.computation.get(key, ABSENT))}"
            for key, was in expected.computation.items()
            if found.computation.get(key, ABSENT) != was
        }
        if changed.get(IMAGE_SIZE) == changed.get("visual.image_size"):
            changed.pop(IMAGE_SIZE, None)  # it follows from the other
        lines += [
            f"{'preprocessor_config.json: size' if key == IMAGE_SIZE else f'config.json: {key}'} {change}"
            for key, change in changed.items()
        ]
    if None not in (expected.tokenizer, found.tokenizer) and expected.tokenizer != found.tokenizer:
        lines.append(f"qwen.tiktoken: other tokens (fingerprint was {expected.tokenizer}, is {found.tokenizer})")
    return lines


def identity_to_json(identity: BaseIdentity) -> dict[str, Any]:
    """What is stored of an identity: JSON's types, and only what is known."""
    content = {
        "weights": identity.weights,
        "sampled": identity.sampled,
        "tokenizer": identity.tokenizer,
        "computation": None if identity.computation is None else dict(identity.computation),
    }
    return {key: value for key, value in content.items() if value is not None}


def identity_from_json(content: Any, file: str | Path) -> BaseIdentity:
    """Read what `identity_to_json` gave; or a string, which is the sampled fingerprint that was all before there was
    more.

    Args:
        file: where it is from, for the message.

    Raises:
        InputError: it is something else.
    """
    if isinstance(content, str):
        return BaseIdentity(None, None, None, content)
    if isinstance(content, dict):
        weights, tokenizer = content.get("weights"), content.get("tokenizer")
        sampled, computation = content.get("sampled"), content.get("computation")
        settings = computation.values() if isinstance(computation, dict) else [] if computation is None else [()]
        if (
            isinstance(sampled, str)
            and isinstance(weights, str | None)
            and isinstance(tokenizer, str | None)
            and all(isinstance(value, Setting) for value in settings)
        ):
            return BaseIdentity(weights, computation, tokenizer, sampled)
    raise InputError(f"{file}: what it says of the base's fingerprints is damaged: restore the file")


def _shown(value: Setting) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
