"""The files that are made from code: TRL's fields, and the JSON Schema for editors."""

import dataclasses
import json
from importlib.metadata import version

from trl import SFTConfig

from finetune.recipe import Recipe, schema, schema_file
from finetune.recipe import fields as recipe_fields
from finetune.recipe.train_section import DECIDING, FIELDS, LIMITS, OWNED, Train


def test_train_fields_are_those_of_the_installed_trl():
    stored = json.loads(recipe_fields.FILE.read_text())
    here = {"trl": version("trl"), "transformers": version("transformers")}
    made_with = {name: stored[name] for name in here}
    assert set(DECIDING) <= {field.name for field in dataclasses.fields(SFTConfig)}
    if here == made_with:  # other versions have other fields and sentences besides
        assert recipe_fields.FILE.read_text() == recipe_fields.written(), "run python -m finetune.recipe.fields"


def test_every_field_is_taken_or_owned():
    ours = {"parallel", "save_minutes", "checkpointing"}
    ours |= {"learning_rates", "loraplus_lr_ratio", "vision_layer_decay"}
    assert set(Train.model_fields) - ours == set(FIELDS) - set(OWNED)
    for name in (*OWNED, *DECIDING, *LIMITS):
        assert name in FIELDS
    assert not set(OWNED) & {*DECIDING, *LIMITS}


def test_defaults_are_of_their_own_type():
    for name, about in FIELDS.items():
        if name not in OWNED:
            assert Train.model_validate({name: about["default"]}) is not None


def test_every_key_has_a_sentence():
    whole = schema.schema_of(Recipe)
    for section in (whole, *whole["$defs"].values()):
        for key, about in section["properties"].items():
            # A sentence that is the section's own too is not repeated.
            assert about.get("description") or schema.resolve(about, whole)["description"], key


def test_the_schema_is_current():
    assert schema_file.FILE.read_text(encoding="utf-8") == schema_file.written(), (
        "run python -m finetune.recipe.schema_file"
    )
