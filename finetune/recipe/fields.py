"""Write `train_fields.json`: the names, types and defaults of TRL's `SFTConfig`, for recipes to be checked without it.

    python -m finetune.recipe.fields

Reading a recipe must not import TRL, which imports PyTorch and takes seconds. Run this after another version of TRL
or Transformers was pinned.
"""

import dataclasses
import json
import re
import types
import typing
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("train_fields.json")

PLAIN = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null", dict: "object"}


def train_fields() -> dict[str, Any]:
    """What `train_fields.json` holds.

    Returns:
        `trl`, `transformers`: the versions it was made with; `fields`: for each name its JSON `types`, the `choices`
        of its strings where they are limited, its `default`, and the first sentence of its `help`.
    """
    from trl import SFTConfig

    hints = typing.get_type_hints(SFTConfig)
    fields = {field.name: _describe(field, hints[field.name]) for field in dataclasses.fields(SFTConfig) if field.init}
    return {"trl": version("trl"), "transformers": version("transformers"), "fields": fields}


def _describe(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    kinds, choices = set(), list(field.metadata.get("choices", ()))
    for member in typing.get_args(hint) if _is_union(hint) else (hint,):
        if isinstance(member, type) and issubclass(member, Enum):
            kinds.add("string")
            choices = [choice.value for choice in member]
        elif typing.get_origin(member) is list:
            kinds.add("array")
        elif typing.get_origin(member) is typing.Literal:
            kinds |= {PLAIN[type(value)] for value in typing.get_args(member)}
        elif (plain := typing.get_origin(member) or member) in PLAIN:
            kinds.add(PLAIN[plain])
    if field.metadata.get("const") is True:
        kinds.add("boolean")
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if isinstance(default, Enum):
        default = default.value
    if default is None:
        kinds.add("null")
    help_text = " ".join(field.metadata.get("help", "").replace("%%", "%").split())
    return {
        "types": sorted(kinds),
        **({"choices": choices} if choices else {}),
        "default": default,
        "help": re.split(r"(?<=\.) (?=[A-Z`])", help_text)[0],
    }


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def written() -> str:
    """The text of `train_fields.json`: a line for each field."""
    made = train_fields()
    lines = [f"  {json.dumps(name)}: {json.dumps(about)}" for name, about in made.pop("fields").items()]
    versions = json.dumps(made)[1:-1]
    return f'{{{versions}, "fields": {{\n' + ",\n".join(lines) + "\n}}\n"


if __name__ == "__main__":
    FILE.write_text(written())
