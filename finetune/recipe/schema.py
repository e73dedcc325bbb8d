"""The JSON Schema of a recipe's sections, and look-ups in it."""

from functools import cache
from typing import Any

from finetune.recipe.section import Section


@cache
def schema_of(section: type[Section]) -> dict[str, Any]:
    """JSON Schema of a section and all below it, with `$defs`."""
    return section.model_json_schema()


def part(schema: dict[str, Any], path: tuple[str | int, ...]) -> dict[str, Any] | None:
    """The schema of the value at `path`, references resolved; None for a path that the schema does not have."""
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
    """The members of an `anyOf`; a schema without one is its only member."""
    return [resolve(choice, schema) for choice in here.get("anyOf", [here])]


def resolve(here: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """A reference followed into `$defs`."""
    return schema["$defs"][here["$ref"].rsplit("/", 1)[1]] if "$ref" in here else here


def keys_at(schema: dict[str, Any], path: tuple[str | int, ...]) -> list[str]:
    """The keys of the section at `path`; empty where `path` is not a section."""
    here = part(schema, path)
    choices = alternatives(here, schema) if here else []
    return [key for choice in choices for key in choice.get("properties", {})]
