"""What each of several cards has of a model that they share."""

import pytest
import torch
from plans_for_tests import recipe_of, tiny_config
from torch import nn

from finetune.memory.plan import GATHERED, plan_memory
from finetune.memory.several_cards import describe_several, fewest_cards
from finetune.memory.sharding import Sharding, sharding_of, shared_bytes
from finetune.memory.switches import Switches
from finetune.memory.weights import model_of_shapes, weight_bytes
from finetune.memory.workload import Workload
from qwenvl import QwenVLConfig

GB = 1_000_000_000
IN_FULL = ("model.dtype=bfloat16", "adapter=null", "freeze.language=false", "freeze.resampler=false")
PUBLISHED = QwenVLConfig()
PACK = Workload(2048, 512, 1, 4, 2048)
SWITCHES = Switches("varlen", "torch", "full", "adamw_torch_fused", "off")


@pytest.mark.parametrize("cards", [1, 2, 3, 8])
def test_parts_are_those_of_fsdp2(cards):
    """Whole rows, the last part filled up; gradients and moments of float32 masters."""
    model = nn.Module()
    model.trained = nn.Parameter(torch.empty(10, 3))
    model.frozen = nn.Parameter(torch.empty(7, 5, dtype=torch.bfloat16), requires_grad=False)
    shared = shared_bytes(model, Sharding("fsdp", cards), "adamw_torch", "cpu", torch.bfloat16)
    trained, frozen = -(-10 // cards) * 3, -(-7 // cards) * 5
    assert sum(shared.weights.values()) == 4 * trained + 2 * frozen
    assert shared.gradients == 4 * trained
    assert shared.states.device == 8 * trained + 4
    # Made whole: all of it, in 16 bits; its gradients in 16 bits, and in float32 to be summed.
    assert shared.gathered == 2 * 2 * (30 + 35)
    assert shared.exchanged == (2 + 4) * 30


def test_deepspeed_is_as_its_estimators_say():
    """16 and 18 bytes a weight are shared; whole are 4 bytes of each, and 4 of the largest layer's."""
    model = nn.Module()
    model.trained = nn.Parameter(torch.empty(800, 10))
    for way, shared_each, whole in (("zero2", 16, 4), ("zero3", 18, 0)):
        shared = shared_bytes(model, Sharding(way, 4), "adamw_torch_fused", "cuda", torch.bfloat16)
        held = sum(shared.weights.values()) + shared.gradients + shared.states.device
        assert held - 4 == 8000 * shared_each // 4 + 8000 * whole  # the step count is a float32
        assert shared.gathered == (4 * 8000 if way == "zero3" else 0)


@pytest.mark.parametrize("way", ["fsdp", "zero2", "zero3"])
def test_more_cards_need_less_each(way):
    recipe = recipe_of(*IN_FULL)
    plans = [
        plan_memory(recipe, PUBLISHED, PACK, switches=SWITCHES, sharding=Sharding(way, count) if count > 1 else None)
        for count in (1, 2, 4, 8, 16)
    ]
    peaks = [plan.peak for plan in plans]
    assert peaks == sorted(peaks, reverse=True)
    # Float32 masters, gradients and two moments of 7.8e9 weights, in 16 parts.
    weights = weight_bytes(model_of_shapes(recipe, PUBLISHED, "cuda")).gradients // 4
    assert peaks[-1] > 16 * weights / 16
    assert GATHERED in plans[-1]["train"].parts or way == "zero2"


def test_how_many_of_which_cards():
    fewest = fewest_cards(recipe_of(*IN_FULL), PUBLISHED, PACK)
    assert fewest[80] == 2 and fewest[180] == 1
    assert 16 not in fewest  # 16 of them are too few
    counts = [fewest[size] for size in sorted(fewest)]
    assert counts == sorted(counts, reverse=True)
    words = describe_several(fewest)
    assert words.startswith("fits 16 x ") and words.endswith("or 1 x 180 GB")
    assert describe_several({}) == "fits no 16 GPUs of up to 180 GB that share the model"
    tiny = fewest_cards(recipe_of(*IN_FULL), tiny_config(), Workload(300, 20, 1, 1, 300))
    assert set(tiny.values()) == {1} and describe_several(tiny) == "fits 1 x 6 GB"


def test_what_is_shared():
    assert sharding_of("", 8) is None and sharding_of("ddp", 8) is None
    assert sharding_of("fsdp", 1) is None
    assert sharding_of("fsdp", 8) == Sharding("fsdp", 8)
