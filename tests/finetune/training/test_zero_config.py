"""DeepSpeed's configuration as it is made of a recipe, and what of a recipe's own one is refused."""

import json

import pytest
from recipes_for_tests import write_recipe

from finetune.errors import UserError
from finetune.recipe import load_recipe
from finetune.recipe.problems import RecipeError
from finetune.training import parallel
from finetune.training.parallel import Parallel, parallel_arguments, refuse_impossible
from finetune.training.zero import refuse_other_checkpoint
from finetune.training.zero_config import refuse_config, zero_config, zero_stage

OF_TRANSFORMERS = {
    "zero_optimization": {"stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto"},
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale_window": "auto"},
    "optimizer": {"type": "auto", "params": {"lr": "auto"}},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 100,
}
"""As its pages show it."""


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("has_adapter", [False, True])
def test_the_recipe_decides_all_that_changes_a_result(stage, has_adapter):
    config = zero_config(stage, has_adapter=has_adapter)
    assert config["zero_optimization"]["stage"] == stage
    assert {config[key] for key in ("train_micro_batch_size_per_gpu", "gradient_clipping")} == {"auto"}
    assert config["bf16"] == config["fp16"] == {"enabled": "auto"}
    assert not {"optimizer", "scheduler", "train_batch_size"} & config.keys()
    # A batch may be several packs: the trainer, and no counter, says when a step is complete.
    assert config["gradient_accumulation_steps"] == 1
    assert config["data_types"]["grad_accum_dtype"] == config["communication_data_type"] == "fp32"


def test_small_parameters_of_two_dtypes_are_not_kept_whole():
    key = "stage3_param_persistence_threshold"
    assert zero_config(3, has_adapter=True)["zero_optimization"][key] == 0
    assert zero_config(3, has_adapter=False)["zero_optimization"][key] == "auto"
    assert key not in zero_config(2, has_adapter=True)["zero_optimization"]


def test_what_a_recipe_says_about_communication_is_kept():
    given = {
        "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 1000},
        "communication_data_type": "bf16",
    }
    refuse_config(given, 2)
    config = zero_config(2, given)
    assert config["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": 1000,
    }
    assert config["communication_data_type"] == "bf16"


def test_a_configuration_that_leaves_the_rest_to_the_recipe_is_taken(tmp_path):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(OF_TRANSFORMERS))
    for given in (OF_TRANSFORMERS, str(file)):
        assert zero_stage(given) == 3
        refuse_config(given, 3)
        config = zero_config(3, given)
        assert config["steps_per_print"] == 100
        assert "optimizer" not in config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, "decided by train.per_device_train_batch_size"),
        ({"train_batch_size": 64}, "train_batch_size is decided by"),
        ({"gradient_accumulation_steps": 2}, "decided by train.gradient_accumulation_steps"),
        ({"gradient_clipping": 0.5}, "decided by train.max_grad_norm"),
        ({"bf16": {"enabled": True}}, "bf16 is decided by model.dtype"),
        ({"fp16": {"enabled": False}}, "fp16 is decided by model.dtype"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is decided by train.optim"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is decided by train.lr_scheduler_type"),
        ({"zero_optimization": {"stage": 2}}, "stage is 2, and train.parallel is zero3"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer is not supported"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param is not supported"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights is not followed"),
        ({"zero_optimization": 3}, "zero_optimization is not a mapping"),
        ({"prescale_gradients": True}, "prescale_gradients is not followed"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel is not followed"),
    ],
)
def test_what_contradicts_the_recipe_is_refused(changes, said):
    with pytest.raises(UserError, match=f"train.deepspeed: .*{said}"):
        refuse_config(OF_TRANSFORMERS | changes, 3)


def test_all_of_it_is_said_at_once():
    with pytest.raises(UserError) as error:
        refuse_config({"gradient_clipping": 1, "train_batch_size": 2}, 2)
    assert "max_grad_norm" in str(error.value)
    assert "per_device_train_batch_size" in str(error.value)


@pytest.mark.parametrize("written", ["[1]", "{", "3"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, written):
    file = tmp_path / "zero.json"
    file.write_text(written)
    with pytest.raises(UserError, match=r"zero.json"):
        zero_stage(str(file))


@pytest.mark.parametrize(
    ("way", "changes", "said"),
    [
        ("zero2", {"train__optim": "adamw_8bit"}, "train.optim.*adamw_8bit"),
        ("zero3", {"train__optim": "adafactor"}, "train.optim.*adafactor"),
        ("zero2", {"model__embeddings_on_cpu": True}, "model.embeddings_on_cpu"),
        ("zero3", {"model__embeddings_on_cpu": True}, "model.embeddings_on_cpu"),
        ("zero3", {"model__quantization": "nf4"}, "model.quantization"),
        ("zero3", {"data__vision_cache": "memory"}, "data.vision_cache"),
        ("zero3", {"adapter": {"r": 4, "bias": "lora_only"}}, "adapter.bias"),
        ("zero2", {"train__deepspeed": {"zero_optimization": {"stage": 2}, "gradient_clipping": 3}}, "max_grad_norm"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, way, changes, said):
    monkeypatch.setattr(parallel, "find_spec", lambda name: name)
    recipe = load_recipe(write_recipe(tmp_path, **changes))
    with pytest.raises(UserError, match=said):
        refuse_impossible(recipe, Parallel(way))
    if "train__deepspeed" not in changes:
        with pytest.raises(RecipeError, match=f"(?s){said}"):  # in check too
            load_recipe(write_recipe(tmp_path, **changes, train__parallel=way))


@pytest.mark.parametrize(
    "changes",
    [{"model__quantization": "nf4"}, {"data__vision_cache": "memory"}, {"adapter": {"r": 4, "bias": "lora_only"}}],
)
def test_stage_2_has_all_weights_on_each_process(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(parallel, "find_spec", lambda name: name)
    recipe = write_recipe(tmp_path, **changes, train__parallel="zero2")
    refuse_impossible(load_recipe(recipe), Parallel("zero2"))


def test_the_trainer_gets_the_configuration():
    given = {"deepspeed": {"zero_optimization": {"stage": 2}, "wall_clock_breakdown": True}, "seed": 1}
    arguments = parallel_arguments(Parallel("zero2"), given, has_adapter=True)
    assert arguments["seed"] == 1
    assert arguments["deepspeed"] == zero_config(2, given["deepspeed"], has_adapter=True)
    assert "deepspeed" not in parallel_arguments(Parallel("ddp"), given)


def checkpoint_of(folder, stage, processes):
    """The names of a checkpoint's files, as DeepSpeed has them."""
    states = folder / "checkpoints" / "step-4" / "global_step4"
    states.mkdir(parents=True)
    for rank in range(processes):
        (states / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
        if stage == 3:
            (states / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
    if stage == 2:
        (states / "mp_rank_00_model_states.pt").touch()
    return states.parent


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_is_read_by_as_many_processes_in_the_same_way(tmp_path, monkeypatch, stage):
    checkpoint = checkpoint_of(tmp_path, stage, 2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse_other_checkpoint(checkpoint, Parallel(f"zero{stage}"))
    for way in {"ddp", "fsdp", "zero2", "zero3"} - {f"zero{stage}"}:
        with pytest.raises(UserError, match=rf"saved by 2 processes with train.parallel: zero{stage}"):
            refuse_other_checkpoint(checkpoint, Parallel(way))
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = rf"Start 2 processes with zero{stage}.*finetune merge {tmp_path} --checkpoint"
    with pytest.raises(UserError, match=said):
        refuse_other_checkpoint(checkpoint, Parallel(f"zero{stage}"))
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match="none with 1"):
        refuse_other_checkpoint(checkpoint, Parallel())


def test_a_checkpoint_of_another_way_is_not_read_by_deepspeed(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for way in ("ddp", "fsdp"):
        refuse_other_checkpoint(tmp_path, Parallel(way))
    with pytest.raises(UserError, match="not saved by DeepSpeed"):
        refuse_other_checkpoint(tmp_path, Parallel("zero2"))
