"""Q-LoRA: its gradients are LoRA's on the dequantised base, its adapter is float32, a resumed run is the same run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from recipes_for_tests import TINY, write_recipe
from safetensors.torch import load_file
from said import collect

from finetune.errors import UserError
from finetune.model.adapters import put_lora
from finetune.model.components import count_parameters
from finetune.recipe import load_recipe
from finetune.recipe.sections import Adapter, Freeze
from finetune.terminal import say_nothing
from finetune.training.train import train
from qwenvl import load_model
from qwenvl.checkpoint.record import read_record
from qwenvl.model.nf4_weights import dequantized, is_quantized
from qwenvl.model.quantization import quantized_names
from tests.finetune.recipe.test_recipe_checks import refusal
from tests.finetune.training.test_trainer import make_trainer, samples, step  # noqa: F401 (fixtures)

ADAPTER = Adapter(r=4, alpha=8, dropout=0.0, targets=["c_attn", "attn.c_proj", "w1", "w2"])


def adapted(parts=("language",), *, quantized: bool, dtype="float32", adapter=ADAPTER, embeddings=False, **freeze):
    """An adapter with values on the 4-bit base, or on the plain model with the weights that 4 bits leave."""
    if quantized:
        model = load_model(TINY, quantization="nf4", quantize=parts, dtype=dtype)
    else:
        model = load_model(TINY, dtype=dtype)
        for name in quantized_names(model.config, parts):
            weight = model.get_parameter(name)
            weight.data = dequantized(weight.data, weight.dtype)
    torch.manual_seed(0)
    model = put_lora(model, adapter, Freeze(**freeze), embeddings=embeddings)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def assert_same(ours, theirs, tolerance=1e-5):
    assert ours[0] == pytest.approx(theirs[0], abs=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert gradient.abs().max() > 0, name
        assert (ours[1][name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


@pytest.mark.parametrize(("checkpointing", "dora"), [(False, False), (True, False), (False, True)])
def test_gradients_are_those_on_the_dequantized_base(make_trainer, checkpointing, dora):  # noqa: F811
    """With the resampler and the embeddings trained in full beside the adapter."""
    settings = {"adapter": ADAPTER.model_copy(update={"dora": dora}), "embeddings": True, "resampler": False}
    results = [
        step(make_trainer(model=adapted(quantized=quantized, **settings), gradient_checkpointing=checkpointing))
        for quantized in (True, False)
    ]
    assert_same(*results)
    names = results[0][1].keys()
    assert any("attn_pool" in name for name in names) and any("wte" in name for name in names)


def test_gradients_through_a_4_bit_head(make_trainer):  # noqa: F811
    """Logits only at supervised positions, as the trainer asks for them."""
    parts = ("language", "head")
    assert_same(*(step(make_trainer(model=adapted(parts, quantized=quantized))) for quantized in (True, False)))


def test_gradients_of_lora_on_the_vision_tower(make_trainer):  # noqa: F811
    settings = {"adapter": ADAPTER.model_copy(update={"vision_targets": ("in_proj", "c_fc")})}
    with torch.compiler.set_stance("force_eager"):  # an odd width sends bitsandbytes to a path that it compiles
        parts = ("language", "vision")
        models = [adapted(parts, quantized=quantized, **settings) for quantized in (True, False)]
        assert_same(*(step(make_trainer(model=model)) for model in models))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_trained_stays_float32(make_trainer, dtype):  # noqa: F811
    """TRL rounds to bfloat16 all that is trained on a 4-bit base; here nothing is, not for a moment."""
    model = adapted(quantized=True, dtype=dtype, embeddings=True, resampler=False)
    before = {name: tensor.clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    trainer = make_trainer(model=model)
    after = {name: tensor for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}
    assert after.keys() == before.keys()
    assert all(after[name].dtype == torch.float32 and torch.equal(after[name], before[name]) for name in before)
    linears = [module for module in trainer.model.modules() if is_quantized(module)]
    assert len(linears) == 10 and not any(module.support_avx512bf16_for_cpu for module in linears)
    loss, gradients = step(trainer)
    assert 0 < loss < 20 and all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_parameters_are_counted_as_if_not_quantized():
    counts = [count_parameters(adapted(("language", "vision", "head"), quantized=flag)) for flag in (True, False)]
    assert counts[0] == counts[1] and counts[0]["adapter"].trained == 20_480


def run(folder: Path, *overrides: str, **changes) -> Path:
    recipe = write_recipe(folder, model__quantization="nf4", **changes)
    return train(load_recipe(recipe, overrides), say=say_nothing)


def test_a_run_resumed_is_bit_identical(tmp_path):
    """Dropout on, bfloat16, embeddings and resampler trained too; as if killed after step 6 of 8."""
    settings = {
        "model__dtype": "bfloat16",
        "adapter": {"r": 4, "dropout": 0.1, "train_embeddings": True},
        "freeze": {"resampler": False},
        "train__gradient_checkpointing": True,
    }
    finished = run(tmp_path, **settings)
    result = (finished / "adapter" / "adapter_model.safetensors").read_bytes()
    description = json.loads((finished / "run.json").read_text())
    assert description["identity"]["recipe"]["model"]["quantization"] == "nf4"
    assert description["quantized"] == ["language"] and read_record(finished / "adapter").quantize == ("language",)
    kept = load_file(finished / "adapter" / "adapter_model.safetensors")
    types = {tensor.dtype for name, tensor in kept.items() if "pos_embed" not in name}
    assert types == {torch.float32}

    shutil.rmtree(finished / "adapter")
    shutil.rmtree(finished / "checkpoints" / "step-8")
    (finished / "run.json").write_text(json.dumps(description | {"status": "running"}))
    said = []
    train(load_recipe(tmp_path / "recipe.yaml"), say=collect(said))
    assert any("from step 6" in line for line in said)
    assert (finished / "adapter" / "adapter_model.safetensors").read_bytes() == result
    model = load_model(finished, quantization="nf4")
    assert len([module for module in model.modules() if is_quantized(module)]) == 10


def test_a_4_bit_folder_is_a_base(tmp_path):
    """It must be asked for as what it is, and what is in 4 bits there cannot be trained."""
    load_model(TINY, quantization="nf4", quantize=["language", "head"]).save_pretrained(tmp_path / "base")
    for file in ("qwen.tiktoken", "tokenizer_config.json"):
        shutil.copy(TINY / file, tmp_path / "base" / file)
    short = {"train__max_steps": 1, "train__save_strategy": "no", "model__path": str(tmp_path / "base")}
    with pytest.raises(UserError, match=r"holds 4-bit weights.* model\.quantize: \[language, head\]"):
        run(tmp_path / "none", "model.quantization=none", **short)
    with pytest.raises(ValueError, match=r"in 4 bits already: language, head"):
        run(tmp_path / "other", **short)
    with pytest.raises(UserError, match=r"train_embeddings: true .* output head is in 4 bits"):
        model = load_model(tmp_path / "base")
        put_lora(model, ADAPTER.model_copy(update={"train_embeddings": True}), Freeze(), embeddings=True)


def test_embeddings_in_host_memory_are_not_trained():
    model = load_model(TINY, quantization="nf4", embeddings_on_cpu=True)
    with pytest.raises(UserError, match=r"train_embeddings: auto .*never saw.* host memory"):
        put_lora(model, ADAPTER, Freeze(), embeddings=True)


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["adapter=null", "freeze.resampler=false"], ["model.quantization", "adapter"]),
        (["adapter.init=pissa"], ["adapter.init", "model.quantization"]),
        (["adapter.init=olora"], ["adapter.init", "model.quantization"]),
        (["adapter.init=orthogonal"], ["adapter.init", "model.quantization"]),
        (["model.quantize=[language,vision]", "freeze.vision=false"], ["freeze.vision", "model.quantize"]),
        (
            ["model.quantize=[language,head]", "adapter.train_embeddings=true"],
            ["adapter.train_embeddings", "model.quantize"],
        ),
        (
            ["model.embeddings_on_cpu=true", "adapter.train_embeddings=true"],
            ["adapter.train_embeddings", "model.embeddings_on_cpu"],
        ),
        (["model.quantize=[vision]"], ["model.quantize"]),
        (["model.quantize=[language,language]"], ["model.quantize"]),
        (["model.quantization=none", "model.quantize=[language,head]"], ["model.quantize", "model.quantization"]),
        (
            ["model.quantization=none", "model.embeddings_on_cpu=true", "adapter=null", "freeze.language=false"],
            ["freeze.language", "model.embeddings_on_cpu"],
        ),
    ],
)
def test_what_does_not_go_with_4_bits(overrides, keys):
    text = refusal("model.quantization=nf4", *overrides)
    assert all(key in text for key in keys), text
