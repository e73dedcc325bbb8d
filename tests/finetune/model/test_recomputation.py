import contextlib
from collections import Counter

import pytest
import torch
from plans_for_tests import KINDS, THREE, real_batch, real_model, recipe_of, tiny_config
from recipes_for_tests import write_recipe
from said import collect
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.memory.activations import batch_of_shapes
from finetune.model.recomputation import LEAST_FIRST, set_recomputation
from finetune.recipe import RecipeError, load_recipe
from finetune.training.train import train
from qwenvl.model.language import Block

ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def gradients(model, batch) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # dropout
    model.zero_grad()
    model.train()
    labels = batch["labels"]
    model(batch["input_ids"], pixel_values=batch["pixel_values"], labels=labels, use_cache=False).loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("kind", ["lora", "in full"])
def test_gradients_are_the_same(kind):
    model, batch = real_model(recipe_of(*KINDS[kind])), real_batch(THREE)
    expected = gradients(model, batch)
    for checkpointing in LEAST_FIRST[1:]:
        set_recomputation(model, checkpointing)
        found = gradients(model, batch)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], one) for name, one in expected.items()), checkpointing
    set_recomputation(model, "none")
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize(
    ("checkpointing", "attentions", "products"), [("none", 1, 1), ("selective", 1, 2), ("full", 2, 2)]
)
def test_what_is_computed_again(checkpointing, attentions, products):
    """Times that each language layer's attention and first product are computed in a step."""
    model = real_model(recipe_of("adapter.dropout=0"))
    model.config._attn_implementation = "sdpa"
    ids = torch.arange(40)[None]
    layers = model.config.num_hidden_layers
    set_recomputation(model, checkpointing)
    model.train()
    with Operations() as operations:
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert operations.counts[ATTENTION] == attentions * layers
    assert operations.counts["aten::silu"] == products * layers


def test_offloading_moves_each_layers_input_and_nothing_else():
    model, moved = real_model(recipe_of()), []

    @contextlib.contextmanager
    def to_host():
        pack = lambda tensor: moved.append(tuple(tensor.shape)) or tensor.clone()  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    set_recomputation(model, "offload", to_host)
    ids = torch.arange(40)[None]
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert moved == [(1, 40, model.config.hidden_size)] * model.config.num_hidden_layers


def test_layers_of_a_frozen_tower_are_left_alone():
    for kind, vision in (("lora", False), ("resampler", False), ("dora on vision", True), ("in full", True)):
        model = real_model(recipe_of(*KINDS[kind]))
        set_recomputation(model, "full")
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer) and module in set(model.modules()):
                expected = isinstance(module, Block) or vision
                assert module.gradient_checkpointing == expected, kind


def test_packs_keep_their_attention_too():
    """Attention of packs goes through its own operation, of which TRL's `selective` does not know."""
    model = real_model(recipe_of("adapter.dropout=0"))
    model.config._attn_implementation = "varlen"
    set_recomputation(model, "selective")
    batch = batch_of_shapes(tiny_config(), THREE) | {"pixel_values": real_batch(THREE)["pixel_values"]}
    model.train()
    with Operations() as operations:
        model(
            batch["input_ids"],
            position_ids=batch["position_ids"],
            pixel_values=batch["pixel_values"],
            labels=batch["labels"],
            use_cache=False,
        ).loss.backward()
    vision = model.config.visual["layers"] + 1  # and the resampler
    assert operations.counts[ATTENTION] == THREE.sequences * model.config.num_hidden_layers + vision


TRL_KEYS = {
    "gradient_checkpointing": "true",
    "gradient_checkpointing_kwargs": "{use_reentrant: false}",
    "activation_checkpointing": "false",
}


@pytest.mark.parametrize("key", TRL_KEYS)
def test_both_ways_of_saying_it_are_refused(key):
    with pytest.raises(RecipeError, match=rf"train\.{key}.*both say what is kept"):
        recipe_of("train.checkpointing=full", f"train.{key}={TRL_KEYS[key]}")
    recipe_of(f"train.{key}={TRL_KEYS[key]}")


def test_trls_selective_is_refused():
    with pytest.raises(RecipeError, match=r"set checkpointing: selective"):
        recipe_of("train.gradient_checkpointing_kwargs={selective: true}")


def test_the_trainer_leaves_the_layers_to_us():
    assert "gradient_checkpointing" not in recipe_of().train_arguments()
    for kind in ("auto", *LEAST_FIRST):
        arguments = recipe_of(f"train.checkpointing={kind}", "train.optim=auto").train_arguments()
        assert arguments["gradient_checkpointing"] is False
        assert "checkpointing" not in arguments
        assert "optim" not in arguments


def test_runs_compute_the_same(tmp_path):
    """Losses of whole runs: by TRL's key, and by ours."""
    losses = {}
    for kind in (None, "selective", "auto"):
        file = write_recipe(tmp_path / str(kind))
        text = file.read_text()
        lines = [line for line in text.splitlines() if "gradient_checkpointing" not in line]
        file.write_text("\n".join(lines) + "\n")
        overrides = [f"train.checkpointing={kind}"] if kind else ["train.gradient_checkpointing=true"]
        said = []
        run = train(load_recipe(file, ["train.max_steps=2", "evaluate=null", *overrides]), say=collect(said))
        metrics = (run / "metrics.jsonl").read_text().splitlines()
        losses[kind] = [line.split('"loss": ')[1].split(",")[0] for line in metrics if '"loss"' in line]
        if kind == "auto":
            assert any("auto is train.checkpointing none" in line for line in said), said
    assert len(losses[None]) == 2
    assert all(one == losses[None] for one in losses.values()), losses
