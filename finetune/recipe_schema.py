"""The JSON Schema of recipes, for editors: completion, and errors while typing.

    python -m finetune.recipe_schema

writes `recipe_schema.json`; a recipe names it in its first line (`# yaml-language-server: $schema=...`).
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from finetune.recipe_sections import Section

FILE = Path(__file__).with_name("recipe_schema.json")


@cache
def schema_of(section: type[Section]) -> dict[str, Any]:
    """JSON Schema of a section and all below it, with `$defs`."""
    return section.model_json_schema()


def part(schema: dict[str, Any], path: tuple[str | int, ...]) -> dict[str, Any] | None:
    """The schema of what stands at `path`, references resolved; None where nothing may stand."""
    here = resolve(schema, schema)
    for step in path:
        found = None
        for choice in alternatives(here, schema):
            if isinstance(step, int):
                found = found or choice.get("items")
            else:
                below = choice.get("additionalProperties")
                found = found or choice.get("properties", {}).get(step) or (below if isinstance(below, dict) else None)
        if found is None:
            return None
        here = resolve(found, schema)
    return here


def alternatives(here: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The members of a choice, or the one there is."""
    return [resolve(choice, schema) for choice in here.get("anyOf", [here])]


def resolve(here: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """A reference followed into `$defs`."""
    return schema["$defs"][here["$ref"].rsplit("/", 1)[1]] if "$ref" in here else here


def keys_at(schema: dict[str, Any], path: tuple[str | int, ...]) -> list[str]:
    """The keys of the section at `path`; none where it is no section."""
    here = part(schema, path)
    choices = alternatives(here, schema) if here else []
    return [key for choice in choices for key in choice.get("properties", {})]


def written() -> str:
    """The text of `recipe_schema.json`."""
    from finetune.recipe import Recipe

    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema_of(Recipe)}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
