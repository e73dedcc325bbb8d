"""What is said of the checkpoint that training starts from."""

import torch
from recipes_for_tests import write_recipe

from finetune.model.adapters import put_lora
from finetune.model.base import Base, build_without_weights, find_base
from finetune.recipe import load_recipe
from qwenvl import load_model
from qwenvl.checkpoint.record import ModelRecord
from qwenvl.views import Views

FOUR = Views(page=True, grid=(2, 2), overlap=0.1)
TWO = Views(page=True, grid=(1, 2), overlap=0.1)


def test_other_views_than_those_of_the_checkpoint_are_said(tiny_processor):
    trained = Base("m", (), tiny_processor, record=ModelRecord(views=FOUR))
    assert trained.notes(FOUR) == ()
    assert trained.notes(None) == (
        f"The checkpoint was trained on images as {FOUR}; this run shows them alone (data.views).",
    )
    assert trained.notes(TWO)[0].endswith(f"this run shows them as {TWO} (data.views).")
    assert Base("m", (), tiny_processor).notes(FOUR) == ()


def test_without_weights_biases_are_computed_in_the_same_type(tmp_path, tiny_folder):
    """A process that gets its part of the weights from another one makes such a model."""
    recipe = load_recipe(write_recipe(tmp_path, adapter={"r": 4, "bias": "lora_only"}, model__path=str(tiny_folder)))
    model = load_model(tiny_folder, dtype="bfloat16")
    loaded = put_lora(model, recipe.adapter, recipe.freeze, embeddings=False)
    made = build_without_weights(recipe, find_base(recipe.model), torch.bfloat16)
    hooked, same = (
        [name for name, module in one.named_modules() if module._forward_pre_hooks] for one in (loaded, made)
    )
    assert hooked == same and hooked
