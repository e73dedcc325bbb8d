"""The model that training starts from, and what of it is trained: with its weights, or from its config alone."""

from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from finetune.data.checking import Checked
from finetune.errors import UserError
from finetune.model.adapters import put_lora, train_in_full, trains_embeddings, trains_vision_only
from finetune.model.computing import quantization_arguments
from finetune.recipe import Model, Recipe
from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration, QwenVLProcessor
from qwenvl.loading import find_parts, find_source
from qwenvl.model.host_embedding import HostEmbedding
from qwenvl.model.nf4_weights import linear_4bit
from qwenvl.model.quantization import quantized_names


@dataclass(frozen=True)
class Base:
    """A checkpoint to start from.

    Attributes:
        path: folder or hub id.
        quantized: the parts that will be in 4 bits.
        processor: of the checkpoint.
    """

    path: str
    quantized: tuple[str, ...]
    processor: QwenVLProcessor


def find_base(model: Model) -> Base:
    """Find a recipe's checkpoint and load what it has beside weights.

    Raises:
        FileNotFoundError: there is none.
        UserError, ValueError: it is an adapter, or in 4 bits of which the recipe does not know.
    """
    source = find_source(model.path)
    if source.adapter is not None:
        raise UserError(
            f"model.path: {model.path} is an adapter. Training starts from a checkpoint: give its base "
            f"({source.base}), or merge the adapter first"
        )
    quantized = find_parts(source.base, **quantization_arguments(model))
    if quantized and model.quantization == "none":
        raise UserError(
            f"model.quantization: none, but {model.path} holds 4-bit weights. Set model.quantization: nf4 and "
            f"model.quantize: [{', '.join(quantized)}], or give the 16-bit checkpoint it was made from"
        )
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    return Base(source.base, quantized, QwenVLProcessor.from_pretrained(source.base))


def make_trainable(
    model: QwenVLForConditionalGeneration, recipe: Recipe
) -> QwenVLForConditionalGeneration | PeftModel:
    """Put the recipe's adapter on a model, or train its parts in full; the rest is frozen.

    Raises:
        ValueError: what is to be trained cannot be.
    """
    if recipe.adapter is None:
        return train_in_full(model, recipe.freeze)
    embeddings = trains_embeddings(recipe.adapter.train_embeddings, model)
    return put_lora(model, recipe.adapter, recipe.freeze, embeddings=embeddings)


def refuse_untaught(model: QwenVLForConditionalGeneration | PeftModel, checked: Checked):
    """Raises:
    UserError: only the vision side is trained, and samples have no image.
    """
    without_images = int((checked.images == 0).sum())
    if without_images and trains_vision_only(model):
        raise UserError(
            f"only the vision side is trained, and {without_images:,} of the samples have no image: they teach it "
            "nothing. Leave them out, or train the language model too"
        )


def build_without_weights(recipe: Recipe, base: Base) -> QwenVLForConditionalGeneration | PeftModel:
    """The model as it will be trained, of the right shapes and without values (on the meta device).

    Raises:
        ValueError: what is to be trained cannot be.
    """
    config = QwenVLConfig.from_pretrained(base.path)
    return shape_model(recipe, config, base.quantized, _generation_config(base.path))


def shape_model(
    recipe: Recipe,
    config: QwenVLConfig,
    quantized: tuple[str, ...],
    generation_config: GenerationConfig | None = None,
    dtype: torch.dtype | None = None,
) -> QwenVLForConditionalGeneration | PeftModel:
    """As `build_without_weights`, of any config.

    Args:
        quantized: the parts in 4 bits.
        generation_config: for what `adapter.train_embeddings: auto` comes to.
        dtype: of the weights that are loaded; what is trained beside an adapter is in float32 all the same.

    Raises:
        ValueError: what is to be trained cannot be.
    """
    with torch.device("meta"):
        model = QwenVLForConditionalGeneration(config)
        if recipe.model.embeddings_on_cpu:
            # Behind the other modules, as `keep_embeddings_on_cpu` puts it.
            del model.transformer.wte
            model.transformer.wte = HostEmbedding(config.vocab_size, config.hidden_size)
    if dtype is not None:
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.to(dtype)
    for name in sorted(quantized_names(config, quantized)):
        holder, _, name = name.removesuffix(".weight").rpartition(".")
        linear = linear_4bit(getattr(model.get_submodule(holder), name))
        linear.compute_dtype, linear.compute_type_is_set = dtype, dtype is not None
        setattr(model.get_submodule(holder), name, linear)
    model.is_loaded_in_4bit = bool(quantized)  # by which PEFT knows them
    if generation_config is not None:
        model.generation_config = generation_config
    if recipe.adapter is not None:
        # Where LoRA starts does not change its size, and some starts are computed from the weights.
        recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"init": "default"})})
    with torch.device("meta"):
        return make_trainable(model, recipe)


def _generation_config(base: str) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(base)
    except OSError:  # it has none: that is for who needs it to say
        return GenerationConfig()
