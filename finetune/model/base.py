"""The checkpoint that training starts from, and the model made trainable: with weights, or on the meta device."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from finetune.data.checks.checked import Checked
from finetune.errors import UserError
from finetune.model.adapters import TrainableModel, put_lora, train_in_full, trains_embeddings, trains_vision_only
from finetune.model.computing import quantization_arguments
from finetune.recipe import Model, Recipe
from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration, QwenVLProcessor
from qwenvl.checkpoint.record import ModelRecord, trained_as
from qwenvl.loading import find_adapter, find_parts, find_source, refuse_other_record
from qwenvl.model.generation import reply_as_trained, stored_generation_config
from qwenvl.model.gptq_checkpoint import is_gptq_checkpoint
from qwenvl.model.host_embedding import HostEmbedding
from qwenvl.model.nf4_weights import linear_4bit
from qwenvl.model.quantization import quantized_names
from qwenvl.model.whole import require_whole
from qwenvl.views import Views


@dataclass(frozen=True)
class Base:
    """A checkpoint to start from.

    Attributes:
        path: folder or hub id.
        quantized: parts that will be in 4 bits.
        processor: of the checkpoint.
        packed: the checkpoint is packed by GPTQ, and is read as the 16-bit weights that it stands for.
        record: what it was trained as.
        seq_length: tokens that it was made for, by its configuration.
        dtype: of its weights, by its configuration; None where that does not say.
    """

    path: str
    quantized: tuple[str, ...]
    processor: QwenVLProcessor
    packed: bool = False
    record: ModelRecord = field(default_factory=ModelRecord)
    seq_length: int = 2048
    dtype: torch.dtype | None = None

    @property
    def taken_for(self) -> str:
        """`, a chat model (qwenvl.json)`; empty where nothing says it."""
        return "" if self.record.style is None else f", a {self.record.style} model ({self.record.read_from})"

    def notes(self, views: Views | None) -> tuple[str, ...]:
        """What a reader of a run on it has to know.

        Args:
            views: what pictures an image is in the run.
        """
        notes = []
        if self.packed:
            then = "quantised anew, to NF4" if self.quantized else "take the memory of 16-bit ones"
            notes.append(
                f"The checkpoint is packed by GPTQ in 4 bits; its weights are read as 16-bit ones, and {then}."
            )
        if self.record.views is not None and self.record.views != views:
            now = "alone" if views is None else f"as {views}"
            notes.append(
                f"The checkpoint was trained on images as {self.record.views}; this run shows them {now} (data.views)."
            )
        return tuple(notes)


def find_base(model: Model) -> Base:
    """Find a recipe's checkpoint and load its processor.

    Raises:
        InputError: there is no checkpoint (`MissingFileError`), it is an adapter, or it is stored in 4 bits and the
            recipe says otherwise.
    """
    if find_adapter(model.path) is not None:
        raise UserError(
            f"model.path: {model.path} is an adapter. Training starts from a checkpoint: give its base here, and the "
            f"adapter as adapter.from: {model.path} to go on from it; or merge the adapter first"
        )
    source = find_source(model.path)
    if Path(source.base).is_dir():  # weights on the hub are fetched, and then examined, when training begins
        require_whole(source.base)
    quantized = find_parts(source.base, **quantization_arguments(model))
    if quantized and model.quantization == "none":
        raise UserError(
            f"model.quantization: none, but {model.path} holds 4-bit weights. Set model.quantization: nf4 and "
            f"model.quantize: [{', '.join(quantized)}], or give the 16-bit checkpoint it was made from"
        )
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    config = QwenVLConfig.from_pretrained(source.base)
    packed = is_gptq_checkpoint(source.base, config)
    record = trained_as(source.base)
    refuse_other_record(source, record)
    processor = QwenVLProcessor.from_pretrained(source.base)
    dtype = None if config.dtype is None else getattr(torch, str(config.dtype).removeprefix("torch."))
    return Base(source.base, quantized, processor, packed, record, config.seq_length, dtype)


def read_generation_config(base: str) -> GenerationConfig:
    """A checkpoint's generation config, with the `chat_format` that it was trained in; without settings where the
    checkpoint has none.

    Args:
        base: folder or hub id.
    """
    # A missing `chat_format` is refused where it matters: see `adapters.trains_embeddings`.
    settings = stored_generation_config(base) or GenerationConfig()
    return reply_as_trained(settings, QwenVLConfig.from_pretrained(base), trained_as(base))


def embeddings_by_auto(recipe: Recipe, base: Base) -> bool | None:
    """What `adapter.train_embeddings: auto` comes to on a base; None where the recipe says it, or has no adapter.

    Raises:
        UserError: nothing says whether the base is a chat model.
    """
    if recipe.adapter is None or recipe.adapter.train_embeddings != "auto":
        return None
    return trains_embeddings("auto", read_generation_config(base.path))


def make_trainable(model: QwenVLForConditionalGeneration, recipe: Recipe) -> TrainableModel:
    """Put the recipe's adapter on a model, or train components in full; freeze the rest.

    Raises:
        UserError: the model cannot be trained as the recipe says.
    """
    if recipe.adapter is None:
        return train_in_full(model, recipe.freeze)
    embeddings = trains_embeddings(recipe.adapter.train_embeddings, model.generation_config)
    return put_lora(model, recipe.adapter, recipe.freeze, embeddings=embeddings)


def refuse_text_only_samples(model: TrainableModel, checked: Checked) -> None:
    """Refuse samples without an image where only the vision side is trained: they give it no gradient.

    Args:
        checked: of the training data.

    Raises:
        UserError: there are such samples.
    """
    without_images = int((checked.images == 0).sum())
    if without_images and trains_vision_only(model):
        raise UserError(
            f"only the vision side is trained, and {without_images:,} of the samples have no image: they teach it "
            "nothing. Leave them out, or train the language model too"
        )


def build_without_weights(recipe: Recipe, base: Base, dtype: torch.dtype | None = None) -> TrainableModel:
    """The model as it will be trained, on the meta device: shapes without values.

    Args:
        dtype: see `shape_model`.

    Raises:
        UserError: the model cannot be trained as the recipe says.
    """
    config = QwenVLConfig.from_pretrained(base.path)
    return shape_model(recipe, config, base.quantized, read_generation_config(base.path), dtype)


def shape_model(
    recipe: Recipe,
    config: QwenVLConfig,
    quantized: tuple[str, ...],
    generation_config: GenerationConfig | None = None,
    dtype: torch.dtype | None = None,
) -> TrainableModel:
    """As `build_without_weights`, from any config.

    Args:
        quantized: parts in 4 bits.
        generation_config: settles `adapter.train_embeddings: auto`.
        dtype: of the frozen weights; with an adapter, trained weights are float32.

    Raises:
        UserError: the model cannot be trained as the recipe says.
    """
    with torch.device("meta"):
        model = QwenVLForConditionalGeneration(config)
        if recipe.model.embeddings_on_cpu:
            # After the other modules, in the order that `keep_embeddings_on_cpu` gives.
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
    # PEFT reads it to choose its layers.
    model.is_loaded_in_4bit = bool(quantized)  # type: ignore[assignment]  # torch: a Module's are Tensor | Module
    if generation_config is not None:
        model.generation_config = generation_config
    if recipe.adapter is not None:
        # Initialisation does not change sizes, and some kinds are computed from the weights.
        recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"init": "default"})})
    with torch.device("meta"):
        return make_trainable(model, recipe)
