"""Texts of recipe errors: what a key takes, what was found, what was likely meant; read from the JSON Schema."""

from typing import Any

from finetune.recipe.problems import nearest
from finetune.recipe.schema import alternatives
from finetune.recipe.yaml_file import plain_value

PLAIN = {"string": "text", "boolean": "true or false", "null": "null", "object": "a mapping"}
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
YES, NO = ("true", "yes", "on"), ("false", "no", "off")


def expected(about: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a key takes: `a whole number, at least 1, or null`.

    Args:
        about: the schema of the key.
        schema: the whole schema, for references.
    """
    choices = alternatives(about, schema)
    kinds = {choice.get("type") for choice in choices}
    texts: list[str] = []
    for choice in choices:
        if choice.get("type") == "integer" and "number" in kinds:
            continue  # "a number" includes it
        if choice.get("type") == "array":
            items = expected(choice["items"], schema)
            texts.append("a list of such" if items in texts else f"a list of {items}")
        else:
            texts.append(_one(choice))
    return " or ".join(dict.fromkeys(texts))


def _one(choice: dict[str, Any]) -> str:
    kind = choice.get("type")
    if "const" in choice:
        return str(choice["const"])
    if "enum" in choice:
        return f"one of {', '.join(choice['enum'])}"
    if kind in ("integer", "number"):
        limits = " and ".join(f"{word} {choice[bound]}" for bound, word in BOUNDS.items() if bound in choice)
        return ("a whole number" if kind == "integer" else "a number") + (f", {limits}" if limits else "")
    if "properties" in choice:
        return f"a mapping ({', '.join(choice['properties'])})" if len(choice["properties"]) < 10 else "a mapping"
    return PLAIN[choice["type"]]


def found(value: Any) -> str:
    """What was found in its place."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value} (a number with a point)" if value.is_integer() else str(value)
        case int():
            return str(value)
        case str():
            return f"{value!r} (text)" if value else "empty text"
        case dict():
            return "a mapping"
        case _:
            return "a list" if value else "an empty list"


def remedy(value: Any, about: dict[str, Any], schema: dict[str, Any]) -> str:
    """What to write instead; empty where it cannot be guessed."""
    choices = alternatives(about, schema)
    kinds = {choice.get("type") for choice in choices}
    if isinstance(value, float) and "integer" in kinds and value.is_integer() and abs(value) < 1e15:
        return f"write {int(value)}"
    if isinstance(value, str):
        if meant := nearest(value, _words(choices)):
            return f"did you mean {' or '.join(meant)}?"
        if "boolean" in kinds and value.lower() in YES + NO:
            return f"write {'true' if value.lower() in YES else 'false'}"
        if kinds & {"integer", "number"} and isinstance(plain_value(value.replace("_", "")), int | float):
            return f"write {value.replace('_', '')}, without quotes"
        if "array" in kinds:
            return f"write [{value}]"
    if isinstance(value, bool | int | float) and "string" in kinds and not _words(choices):
        return f'write "{str(value).lower()}", in quotes'
    return ""


def _words(choices: list[dict[str, Any]]) -> list[str]:
    """The words that a key takes, where it takes only some."""
    return [word for choice in choices for word in [*choice.get("enum", ()), choice.get("const")] if word]
