"""JSON that every reader reads: NaN and the infinities, which JSON does not have, are written by their names."""

import json
import math
from typing import Any

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""The names that Protocol Buffers' JSON and JavaScript give them. (null would hide which of them a loss was.)"""


def to_json(value: object, indent: int | None = None) -> str:
    """A value as JSON text."""
    return json.dumps(_with_names(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _with_names(value: object) -> object:
    """Non-finite floats -> their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _with_names(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_with_names(below) for below in value]
    return value


def with_floats(value: Any) -> Any:
    """The names of non-finite floats -> the floats."""
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: with_floats(below) for key, below in value.items()}
    if isinstance(value, list):
        return [with_floats(below) for below in value]
    return value
