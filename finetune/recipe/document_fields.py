"""What a source of format `fields` may say about its fields; the recipe and the format both ask here."""

from collections.abc import Mapping, Sequence

FIELD = "{field}"
"""In a prompt: the name of the field that is asked for."""
FIELDS = "{fields}"
"""In a prompt for JSON: the names of all fields."""

DEFAULT_QUESTION = f"What is the {FIELD}?"
DEFAULT_JSON_PROMPT = f"Read these fields of the document and reply in JSON: {FIELDS}"

TAKEN = ("image", "id", "group", "options", "hint", "document")
"""Roles that a source's columns may have besides its fields."""

Prompts = str | Sequence[str] | Mapping[str, str | Sequence[str]]
"""A prompt, several phrasings of it, or either for single fields."""


def problems_of_fields(
    names: Sequence[str], reply: str, nested: Sequence[str], prompts: Prompts | None
) -> list[tuple[str, str, str]]:
    """(key, reason, remedy) of each thing that is wrong."""
    found = []
    if not names:
        found.append(("fields", "format fields reads columns, and none is named", "name them: fields: [date, total]"))
    for name in dict.fromkeys(name for name in names if list(names).count(name) > 1):
        found.append(("fields", f"{name} is named twice", "name it once"))
    for name in (name for name in names if name in TAKEN):
        remedy = f"call it otherwise, and map it: fields: [its_{name}], columns: {{its_{name}: {name}}}"
        found.append(("fields", f"{name} is a role of its own", remedy))
    for name in (name for name in nested if name not in names):
        found.append(("nested", f"{name} is not among the fields", f"the fields are {', '.join(names)}"))
    found += [("prompts", reason, remedy) for reason, remedy in _of_prompts(names, reply, prompts)]
    return found


def phrasings(prompts: Prompts | None, name: str, default: str) -> tuple[str, ...]:
    """The phrasings of the prompt for a field, or for all (`name` is empty)."""
    given = prompts.get(name, default) if isinstance(prompts, Mapping) else prompts
    if given is None:
        given = default
    return (given,) if isinstance(given, str) else tuple(given)


def _of_prompts(names: Sequence[str], reply: str, prompts: Prompts | None) -> list[tuple[str, str]]:
    if prompts is None:
        return []
    if isinstance(prompts, Mapping):
        if reply == "json":
            return [("are given by field, and reply: json asks for all fields at once", "give a text or a list")]
        found = [
            (f"{name} is not among the fields", f"the fields are {', '.join(names)}")
            for name in prompts
            if name not in names
        ]
        texts = [text for name in prompts for text in phrasings(prompts, name, "")]
    else:
        texts, found = list(phrasings(prompts, "", "")), []
        if reply != "json" and any(FIELD not in text for text in texts):
            found.append((f"one has no {FIELD} to fill in", f"write {FIELD} in each, or give prompts by field"))
    if not texts or any(not text.strip() for text in texts):
        found.append(("one is blank", "write what the user asks"))
    return found
