"""The model of a run: loaded, with the adapter on it or its parts unfrozen."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from transformers import set_seed

from finetune.data.checks.checked import Checked
from finetune.data.reading import views_of
from finetune.memory.switches import Switches
from finetune.model.adapters import TrainableModel, without_adapter
from finetune.model.base import Base, build_without_weights, make_trainable, refuse_text_only_samples
from finetune.model.components import Count, count_parameters, table_of_parameters
from finetune.model.computing import ComputeBackends, is_random, own_device, quantization_arguments
from finetune.model.masters import MASTER
from finetune.recipe import Recipe
from finetune.terminal import Say
from finetune.training.parallel import Parallel
from finetune.training.sharded_model import load_once
from qwenvl import load_model
from qwenvl.checkpoint.record import ModelRecord
from qwenvl.model.generation import reply_as_trained
from qwenvl.model.kernels import use_kernels

RANDOM_WEIGHTS = "The checkpoint's weights are random: it can show that training works, not that it reads."


@dataclass(frozen=True)
class TrainedModel:
    """A model ready for training.

    Attributes:
        model: what is trained requires gradients.
        parameters: trained and all, by component.
        computes_in: dtype of frozen weights and activations.
        notes: what a reader of the run has to know about the checkpoint.
    """

    model: TrainableModel
    parameters: Mapping[str, Count]
    notes: tuple[str, ...]
    computes_in: torch.dtype

    @property
    def trained_parameters(self) -> int:
        return sum(count.trained for count in self.parameters.values())

    @property
    def has_masters(self) -> bool:
        """Whether float32 masters are trained, and computed in 16 bits: see `finetune.model.masters`."""
        return self.computes_in.itemsize < MASTER.itemsize and not isinstance(self.model, PeftModel)


def load_trained_model(
    recipe: Recipe,
    base: Base,
    computing: ComputeBackends,
    computes_in: torch.dtype,
    switches: Switches,
    checked: Checked,
    parallel: Parallel,
    say: Say,
    *,
    is_main: bool,
) -> TrainedModel:
    """Load a recipe's checkpoint and prepare it for training.

    Args:
        computes_in: what it is loaded in (`computing.computing_dtype`).
        checked: the training data.
        parallel: where it shares the model by FSDP2, only the main process reads the checkpoint.

    Raises:
        InputError: what the recipe wants trained cannot be, or the checkpoint is damaged.
    """
    set_seed(recipe.seed)
    if parallel.way == "fsdp":
        read = partial(_load, recipe, computing, computes_in, base)
        model = load_once(read, partial(_shape, recipe, computing, base), is_main=is_main)
    else:
        model = _load(recipe, computing, computes_in, base)
    notes = (*((RANDOM_WEIGHTS,) if is_random(without_adapter(model)) else ()), *base.notes(views_of(recipe)))
    # What is trained here is ChatML, and saved as such, whatever the base was.
    reply_as_trained(model.generation_config, without_adapter(model).config, ModelRecord(chat_format="chatml"))
    switches.prepare(model, recipe.train)
    refuse_text_only_samples(model, checked)
    parameters = count_parameters(model)
    for number, line in enumerate(table_of_parameters(parameters)):
        say("trained" if number == 0 else "", line)
    for note in notes:
        say("note", note)
    return TrainedModel(model, parameters, notes, computes_in)


def _load(recipe: Recipe, computing: ComputeBackends, computes_in: torch.dtype, base: Base) -> TrainableModel:
    """The model with its weights and its adapter."""
    loaded = load_model(
        recipe.model.path,
        dtype=computes_in,
        device_map=own_device() if base.quantized else None,
        embeddings_on_cpu=recipe.model.embeddings_on_cpu,
        **quantization_arguments(recipe.model),
    )
    loaded.set_attn_implementation(computing.attention)
    use_kernels(loaded, computing.kernels)
    assert not isinstance(loaded, PeftModel), "find_base refuses adapters"
    return make_trainable(loaded, recipe)


def _shape(recipe: Recipe, computing: ComputeBackends, base: Base) -> TrainableModel:
    """The same model without its weights, on the meta device."""
    model = build_without_weights(recipe, base)
    inner = without_adapter(model)
    inner.set_attn_implementation(computing.attention)
    use_kernels(inner, computing.kernels)
    inner.eval()
    return model
