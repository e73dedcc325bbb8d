"""The memory plan of steps on a GPU: against the allocator there, and against what was measured at the full size."""

import pytest
import torch
from plans_for_tests import recipe_of
from recipes_for_tests import ROOT

from finetune.bench.random_model import make_random_model
from finetune.bench.subject import find_subject, ways_to_train
from finetune.memory import plan
from finetune.memory.activations import batch_of_shapes, step_of_shapes
from finetune.memory.kernels import FUSED
from finetune.memory.plan import plan_memory
from finetune.memory.switches import Switches
from finetune.memory.weights import model_of_shapes
from finetune.memory.workload import Workload
from finetune.model.base import make_trainable
from finetune.model.recomputation import set_recomputation
from finetune.model.step_loss import forward_with_loss
from finetune.recipe import load_recipe
from qwenvl import QwenVLConfig
from qwenvl.model import kernels
from qwenvl.model.language import MLP, Attention, RMSNorm

PACK = Workload(tokens=4096, supervised=1016, sequences=8, images=8, sequence_length=512)

MEASURED = {"lora": 46.51e9, "qlora": 33.0e9}
"""Bytes at the most of a step of `PACK`, by weights: `finetune bench recipes/docvqa_qlora.yaml --size full --both
--lengths 512` on an H200 with PyTorch 2.11, Transformers 5.17, PEFT 0.21, liger-kernel 0.8.5 and bitsandbytes 0.50.2:
rank 64 with a dropout of 0.05, no checkpointing, liger's kernels, and adapters that multiplied as PEFT's do.
"""


@pytest.mark.parametrize("weights", MEASURED)
def test_the_plan_is_what_an_h200_took(weights, monkeypatch):
    monkeypatch.setattr(plan, "model_of_shapes", lambda *given, **_: model_of_shapes(*given, as_peft=True))
    recipe = load_recipe(ROOT / "recipes" / "docvqa_qlora.yaml")
    subject = find_subject(recipe, "full")
    recipe = subject.settled(dict(ways_to_train(recipe, True))[weights])
    switches = Switches("varlen", "liger", "none", "adamw_torch_fused", "off", device_type="cuda")
    planned = plan_memory(recipe, subject.config, PACK, switches=switches)["train"].total
    assert planned == pytest.approx(MEASURED[weights], rel=0.02)


def medium_config() -> QwenVLConfig:
    """Layers large enough that what CUDA's libraries take for themselves is little beside them."""
    config = QwenVLConfig()
    config.num_hidden_layers, config.visual["layers"] = 3, 2
    config.hidden_size = config.visual["output_dim"] = 2048
    config.num_attention_heads, config.intermediate_size = 16, 11008
    return config


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("own_kernels", ["torch", "liger"])
def test_a_step_takes_what_is_planned(own_kernels, checkpointing):
    """At the second step, as gradients are there."""
    recipe, config = recipe_of("model.dtype=bfloat16", "adapter.dropout=0.05"), medium_config()
    shapes = model_of_shapes(recipe, config, "cuda")
    shapes.config._attn_implementation = "varlen"
    planned = step_of_shapes(shapes, PACK, checkpointing, "cuda", kernels=own_kernels).peak().total
    model = make_trainable(make_random_model(config, device="cuda", dtype=torch.bfloat16), recipe).train()
    base = model.get_base_model()
    base.set_attn_implementation("varlen")
    kernels.use_kernels(base, own_kernels)
    set_recomputation(model, checkpointing)
    batch = batch_of_shapes(config, PACK)
    side = config.visual["image_size"]
    batch["pixel_values"] = torch.randint(0, 256, (PACK.images, 3, side, side), dtype=torch.uint8)
    batch = {name: value.cuda() for name, value in batch.items()}
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward_with_loss(model, model, batch, items=1).loss.backward()
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(planned, rel=0.03)


def test_shapes_stand_in_for_each_fused_kernel():
    assert FUSED.keys() == kernels.FUSED.keys() == {RMSNorm, Attention, MLP}


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_fused_kernels_keep_less_and_leave_the_model_as_it_was(checkpointing):
    """Without them a norm keeps its wide input and more, SwiGLU what it is multiplied from."""
    model = model_of_shapes(recipe_of("model.dtype=bfloat16"), medium_config(), "cuda")
    model.config._attn_implementation = "varlen"
    before = [type(module) for module in model.modules()]
    plain, fused = (
        step_of_shapes(model, PACK, checkpointing, "cuda", kernels=name).peak().total for name in ("torch", "liger")
    )
    assert fused < plain
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize(("device_type", "size"), [("cuda", 1), ("cpu", 4)])
def test_a_dropouts_mask_is_a_byte_on_a_gpu(device_type, size):
    """A value's mask, of the inputs of LoRA: four linears of each of three layers, in float32."""

    def made(dropout: float) -> int:
        recipe = recipe_of("model.dtype=bfloat16", f"adapter.dropout={dropout}")
        model = model_of_shapes(recipe, medium_config(), device_type, as_peft=True)
        model.config._attn_implementation = "varlen"
        return step_of_shapes(model, PACK, "none", device_type).peak().total

    assert made(0.05) - made(0.0) == pytest.approx(PACK.tokens * 2048 * 3 * 4 * size, rel=0.1)


def test_products_in_16_bits_keep_neither_masks_nor_wide_inputs():
    """Beside what PEFT keeps: for each of four linears of three layers the input in float32, and dropout's result."""

    def planned(dropout: float, *, as_peft: bool = False) -> int:
        recipe = recipe_of("model.dtype=bfloat16", f"adapter.dropout={dropout}")
        model = model_of_shapes(recipe, medium_config(), "cuda", as_peft=as_peft)
        model.config._attn_implementation = "varlen"
        return step_of_shapes(model, PACK, "none", "cuda").peak().total

    own = planned(0.05)
    assert own == pytest.approx(planned(0.0), rel=0.02)
    wide_inputs = PACK.tokens * 2048 * 4 * 3 * 3  # w1 and w2 share theirs
    assert planned(0.05, as_peft=True) - own > wide_inputs
