"""How the processes of a run share the work, and what is refused."""

import pytest
from recipes_for_tests import write_recipe

from finetune.errors import UserError
from finetune.recipe import Train, load_recipe
from finetune.recipe.problems import RecipeError
from finetune.training.parallel import (
    Launch,
    Parallel,
    asked_for,
    parallel_arguments,
    refuse_impossible,
    settle_parallel,
)

TWO = {"WORLD_SIZE": "2"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
STAGE_2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("keys", "environment", "way"),
    [
        ({}, {}, "none"),
        ({}, {"WORLD_SIZE": "1", "RANK": "0"}, "none"),
        ({"parallel": "none"}, {}, "none"),
        ({"parallel": "ddp"}, {}, "none"),
        ({}, TWO, "ddp"),
        ({"parallel": "ddp"}, TWO, "ddp"),
        ({"parallel": "fsdp"}, TWO, "fsdp"),
        ({"parallel": "zero2"}, TWO, "zero2"),
        ({"parallel": "zero3"}, TWO, "zero3"),
        ({"fsdp": True}, TWO, "fsdp"),
        ({"fsdp": "full_shard auto_wrap"}, TWO, "fsdp"),
        ({"fsdp": True, "parallel": "fsdp"}, TWO, "fsdp"),
        ({"fsdp": False}, TWO, "ddp"),
        ({"deepspeed": STAGE_2}, TWO, "zero2"),
        ({}, TWO | FSDP, "fsdp"),
        ({"parallel": "fsdp"}, TWO | FSDP, "fsdp"),
        ({}, TWO | ZERO3, "zero3"),
        ({"parallel": "zero3"}, TWO | ZERO3, "zero3"),
        ({"parallel": "fsdp"}, {}, "none"),
        ({}, FSDP, "none"),
    ],
)
def test_settled_from_recipe_and_launcher(keys, environment, way):
    settled = settle_parallel(Train(**keys), Launch.of(environment))
    assert settled.way == way
    asked = asked_for(Train(**keys)) or Launch.of(environment).plugin
    assert bool(settled.note) == (way == "none" and asked not in ("", "none", "ddp"))


@pytest.mark.parametrize(
    ("keys", "environment", "said"),
    [
        ({"parallel": "none"}, TWO, "the launcher started 2"),
        ({"parallel": "ddp"}, TWO | FSDP, "train.parallel is ddp.*asks for fsdp"),
        ({"parallel": "zero2"}, TWO | FSDP, "train.parallel is zero2.*asks for fsdp"),
        ({"parallel": "fsdp"}, TWO | ZERO3, "train.parallel is fsdp.*asks for zero3"),
        ({"parallel": "none"}, TWO | FSDP, "train.parallel is none.*asks for fsdp"),
        ({"parallel": "zero2"}, TWO | ZERO3, "zero2.*asks for zero3"),
        ({}, TWO | {"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 1"),
        ({}, TWO | FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({}, TWO | FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing"),
        ({}, TWO | {"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({}, TWO | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
        ({}, TWO | ZERO3 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero1"),
        ({"deepspeed": "nowhere.json"}, TWO, "nowhere.json cannot be read"),
        ({"deepspeed": {"fp16": {}}}, TWO, "no zero_optimization.stage"),
    ],
)
def test_what_disagrees_or_is_not_supported_is_refused(keys, environment, said):
    with pytest.raises(UserError, match=said):
        settle_parallel(Train(**keys), Launch.of(environment))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"parallel": "ddp", "fsdp": True}, "train.fsdp"),
        ({"parallel": "fsdp", "deepspeed": STAGE_2}, "train.deepspeed"),
        ({"fsdp": True, "deepspeed": STAGE_2}, "both shard"),
        ({"fsdp": "full_shard offload"}, "old FSDP"),
        ({"fsdp": "shard_grad_op"}, "old FSDP"),
        ({"fsdp_config": {"version": 2}}, "has no effect"),
        ({"parallel": "fsdp", "fsdp_config": {"cpu_offload": True}}, "cpu_offload"),
        ({"parallel": "fsdp", "fsdp_config": {"version": 1}}, "version 1"),
        ({"parallel": "fsdp", "fsdp_config": {"reshard_after_forward": "yes"}}, "true or false"),
        ({"parallel": "fsdp", "fsdp_config": "fsdp.json"}, "is a file"),
        ({"parallelism_config": {"tp_size": 2}}, "train.parallel"),
        ({"ddp_find_unused_parameters": True}, "exchange gradients once a step"),
    ],
)
def test_keys_that_disagree_are_found_in_the_recipe(tmp_path, keys, said):
    recipe = write_recipe(tmp_path, **{f"train__{key}": value for key, value in keys.items()})
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__quantization": "nf4"}, "model.quantization.*train.parallel: ddp"),
        ({"model__embeddings_on_cpu": True}, "model.embeddings_on_cpu"),
        ({"data__vision_cache": "memory"}, "data.vision_cache"),
        ({"train__optim": "paged_adamw_8bit"}, "train.optim.*adamw_torch"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_loaded(tmp_path, changes, said):
    with pytest.raises(RecipeError, match=f"(?s){said}"):  # in check too
        load_recipe(write_recipe(tmp_path, **changes, train__parallel="fsdp"))
    recipe = load_recipe(write_recipe(tmp_path, **changes))  # and where the launcher asks for it
    with pytest.raises(UserError, match=said):
        refuse_impossible(recipe, Parallel("fsdp"))
    refuse_impossible(recipe, Parallel("ddp"))
    refuse_impossible(recipe, Parallel())


def test_deepspeed_needs_its_package(tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path))
    monkeypatch.setattr("finetune.training.parallel.find_spec", lambda name: None)
    for way in ("zero2", "zero3"):
        with pytest.raises(UserError, match="needs the package deepspeed"):
            refuse_impossible(recipe, Parallel(way))


def test_the_arguments_that_follow():
    assert parallel_arguments(Parallel("ddp"), {"learning_rate": 1, "fsdp": False}) == {"learning_rate": 1}
    # One process of a recipe for several: Transformers would refuse the field.
    assert parallel_arguments(Parallel("none"), {"fsdp": True}) == {}
    given = parallel_arguments(Parallel("fsdp"), {"fsdp_config": {"fsdp_reshard_after_forward": False}})
    assert given["fsdp"] is True
    assert given["fsdp_config"]["version"] == 2
    assert given["fsdp_config"]["reshard_after_forward"] is False
    for stage in (2, 3):
        given = parallel_arguments(Parallel(f"zero{stage}"), {"deepspeed": {"zero_optimization": {"stage": stage}}})
        assert given["deepspeed"]["zero_optimization"]["stage"] == stage
