import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from finetune.model.adapters import put_lora
from finetune.model.parameter_groups import parameter_groups
from finetune.recipe import Adapter, Freeze


def freeze(**changes):
    return Freeze(**changes)


def groups_of(model, **changes):
    arguments = {
        "learning_rate": 1e-4,
        "learning_rates": {},
        "vision_layer_decay": None,
        "weight_decay": 0.1,
        "no_decay": {name for name, parameter in model.named_parameters() if parameter.ndim == 1},
    }
    return parameter_groups(model, **{**arguments, **changes})


def rate_of(model, groups, name) -> float:
    wanted = dict(model.named_parameters())[name]
    return next(group["lr"] for group in groups if any(wanted is parameter for parameter in group["params"]))


def test_every_trained_parameter_is_in_one_group(tiny_model):
    groups = groups_of(tiny_model, learning_rates={"vision": 1e-5}, vision_layer_decay=0.9)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in tiny_model.parameters())
    for group in groups:
        assert all((parameter.ndim == 1) == (group["weight_decay"] == 0) for parameter in group["params"])


def test_a_learning_rate_for_each_component(tiny_model):
    rates = {"vision": 1e-6, "resampler": 2e-6, "language": 3e-6, "embeddings": None}
    groups = groups_of(tiny_model, learning_rates=rates)
    assert {group["component"]: group["lr"] for group in groups} == {**rates, "embeddings": 1e-4}


def test_layer_wise_decay_of_the_vision_tower(tiny_model):
    """0.95 a layer, as the paper has it: what comes after the blocks has the full rate, the patches the lowest."""
    groups = groups_of(tiny_model, vision_layer_decay=0.95)
    visual = "transformer.visual."
    expected = {
        "conv1.weight": 3,
        "positional_embedding": 3,
        "ln_pre.weight": 3,
        "transformer.resblocks.0.attn.in_proj.weight": 2,
        "transformer.resblocks.1.mlp.c_fc.bias": 1,
        "ln_post.weight": 0,
        "proj": 0,
        "attn_pool.query": 0,
    }
    for name, power in expected.items():
        assert rate_of(tiny_model, groups, visual + name) == pytest.approx(1e-4 * 0.95**power), name
    assert rate_of(tiny_model, groups, "transformer.h.0.mlp.w1.weight") == 1e-4


@pytest.mark.parametrize(
    ("settings", "embeddings"),
    [({}, False), ({"dora": True}, False), ({"bias": "lora_only"}, False), ({"bias": "all"}, True)],
)
def test_loraplus_has_the_rates_of_pefts_own_optimizer(tiny_model, settings, embeddings):
    model = put_lora(
        tiny_model, Adapter(r=4, vision_targets=("in_proj",), **settings), Freeze(), embeddings=embeddings
    )
    ours = groups_of(model, learning_rate=1e-3, loraplus_lr_ratio=16.0)
    peft = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0).param_groups
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name: rate_of(model, ours, name) for name in names} == {name: rate_of(model, peft, name) for name in names}
    assert {rate_of(model, ours, name) for name in names if ".lora_B." in name} == {16e-3}
    assert {rate_of(model, ours, name) for name in names if ".lora_A." in name} == {1e-3}


def test_loraplus_leaves_what_is_trained_in_full_at_its_rate(tiny_model):
    model = put_lora(tiny_model, Adapter(r=4), Freeze(resampler=False), embeddings=False)
    groups = groups_of(model, learning_rate=1e-3, loraplus_lr_ratio=16.0)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "attn_pool" in name]
    assert len(names) == 10 and {rate_of(model, groups, name) for name in names} == {1e-3}
