"""Write `recipe_schema.json` for editors: completion, and errors while typing.

    python -m finetune.recipe.schema_file

A recipe names the file in its first line (`# yaml-language-server: $schema=...`).
"""

import json
from pathlib import Path

from finetune.recipe import Recipe
from finetune.recipe.schema import schema_of

FILE = Path(__file__).parents[1] / "recipe_schema.json"


def written() -> str:
    """The text of `recipe_schema.json`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema_of(Recipe)}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
