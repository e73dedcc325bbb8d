"""The model of a run: loaded, with the adapter on it or its parts unfrozen."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from transformers import set_seed
from trl import SFTConfig

from finetune.data.reading import views_of
from finetune.memory.switches import Switches
from finetune.model.adapters import TrainableModel, without_adapter
from finetune.model.base import build_without_weights, make_trainable, refuse_text_only_samples
from finetune.model.components import Count, count_parameters, table_of_parameters
from finetune.model.computing import is_random, own_device, quantization_arguments
from finetune.model.given_adapter import load_given_weights
from finetune.model.lora_products import left_to_peft, multiply_as_peft
from finetune.model.masters import MASTER
from finetune.terminal import Say
from finetune.training.opened_run import OpenedRun
from finetune.training.sharded_model import load_once
from finetune.training.zero import loading_whole
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


def load_trained_model(opened: OpenedRun, switches: Switches, arguments: SFTConfig, say: Say) -> TrainedModel:
    """Load a run's checkpoint and prepare it for training.

    Where no process has all of the model, only the main one reads the checkpoint.

    Args:
        switches: recomputation and the like.
        arguments: the trainer's configuration.

    Raises:
        InputError: what the recipe wants trained cannot be, or the checkpoint is damaged.
    """
    recipe, base, given, checked = opened.recipe, opened.base, opened.given, opened.data.checked["train"]
    set_seed(recipe.seed)
    with loading_whole(arguments):
        if opened.parallel.shards:
            model = load_once(partial(_load, opened), partial(_shape, opened), is_main=opened.is_main)
        else:
            model = _load(opened)
    if opened.parallel.way == "zero3":  # the weights are there while their own module runs, and no longer
        multiply_as_peft(model)
    left = left_to_peft(model)
    if left and opened.computes_in.itemsize < MASTER.itemsize:
        say(
            "adapter", f"{len(left)} of its layers multiply in float32, as PEFT does it, which takes longer: {left[0]}"
        )
    notes = (*((RANDOM_WEIGHTS,) if is_random(without_adapter(model)) else ()), *base.notes(views_of(recipe)))
    if given is not None:
        say(
            "adapter",
            f"begins with the weights of {given.folder}, in float32; the optimizer and the learning rate's schedule "
            "begin anew",
        )
        notes += given.notes(recipe, base, views_of(recipe), checked.system)
    # What is trained here is ChatML, and saved as such, whatever the base was.
    reply_as_trained(model.generation_config, without_adapter(model).config, ModelRecord(chat_format="chatml"))
    switches.prepare(model, recipe.train)
    refuse_text_only_samples(model, checked)
    parameters = count_parameters(model)
    for number, line in enumerate(table_of_parameters(parameters)):
        say("trained" if number == 0 else "", line)
    for note in notes:
        say("note", note)
    return TrainedModel(model, parameters, notes, opened.computes_in)


def _load(opened: OpenedRun) -> TrainableModel:
    """The model with its weights and its adapter."""
    recipe, base = opened.recipe, opened.base
    loaded = load_model(
        recipe.model.path,
        dtype=opened.computes_in,
        device_map=own_device() if base.quantized else None,
        embeddings_on_cpu=recipe.model.embeddings_on_cpu,
        **quantization_arguments(recipe.model),
    )
    loaded.set_attn_implementation(opened.computing.attention)
    use_kernels(loaded, opened.computing.kernels)
    assert not isinstance(loaded, PeftModel), "find_base refuses adapters"
    model = make_trainable(loaded, recipe)
    if opened.given is not None:
        assert isinstance(model, PeftModel), "the recipe has an adapter"
        load_given_weights(model, opened.given)
    return model


def _shape(opened: OpenedRun) -> TrainableModel:
    """The same model without its weights, on the meta device."""
    # By their types, trained biases are computed in that of the weights beside them.
    model = build_without_weights(opened.recipe, opened.base, opened.computes_in)
    inner = without_adapter(model)
    inner.set_attn_implementation(opened.computing.attention)
    use_kernels(inner, opened.computing.kernels)
    inner.eval()
    return model
