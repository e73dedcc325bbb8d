"""What the bench measures: a model of the sizes of a recipe's checkpoint, as LoRA or Q-LoRA, without its weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig

from finetune.bench.random_model import make_random_model
from finetune.errors import UserError
from finetune.memory.free_memory import device_type
from finetune.model.adapters import TrainableModel, trains_embeddings
from finetune.model.base import make_trainable, read_generation_config
from finetune.model.computing import choose_dtype
from finetune.model.given_adapter import find_given_folder, settle
from finetune.recipe import Recipe
from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration
from qwenvl.loading import DTYPES, find_source
from qwenvl.model.quantization import quantized_parts

PUBLISHED_CHECKPOINTS = {"Qwen/Qwen-VL": "raw", "Qwen/Qwen-VL-Chat": "chatml"}
"""Checkpoints with their chat formats; their sizes are the defaults of `QwenVLConfig`, so nothing is downloaded."""

LORA, QLORA, FULL = "lora", "qlora", "full"


@dataclass(frozen=True)
class Subject:
    """A model without weights.

    Attributes:
        name: for the reader.
        config: its sizes.
        generation_config: tells base and chat models apart (`chat_format`).
        stored_dtype: of the checkpoint's weights.
    """

    name: str
    config: QwenVLConfig
    generation_config: GenerationConfig
    stored_dtype: torch.dtype

    def dtype(self, recipe: Recipe) -> torch.dtype:
        """The dtype that a run of the recipe computes in on this device."""
        chosen = choose_dtype(recipe.model.dtype)
        return self.stored_dtype if chosen == "auto" else DTYPES[chosen]

    def parameters(self) -> int:
        """The number of a checkpoint's parameters and buffers, trained or not."""
        with torch.device("meta"):
            model = QwenVLForConditionalGeneration(self.config)
        return sum(tensor.numel() for tensor in model.state_dict().values())

    def settled(self, recipe: Recipe) -> Recipe:
        """The recipe with `adapter.train_embeddings: auto` settled, and with the shapes of `adapter.from`.

        Raises:
            UserError: the checkpoint does not say whether it is a base or a chat model.
        """
        if recipe.adapter is None:
            return recipe
        if recipe.adapter.from_ is not None:
            return settle(recipe, find_given_folder(recipe.adapter.from_), self.config)
        trained = trains_embeddings(recipe.adapter.train_embeddings, self.generation_config)
        return recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"train_embeddings": trained})})

    def make_model(self, recipe: Recipe, device: torch.device) -> TrainableModel:
        """Make the model with random weights on the device, ready to be trained as the recipe says.

        Raises:
            UserError: the model cannot be trained as the recipe says.
        """
        parts = recipe.model.quantize if recipe.model.quantization == "nf4" else ()
        model = make_random_model(
            self.config,
            device=device,
            dtype=self.dtype(recipe),
            parts=parts,
            embeddings_on_cpu=recipe.model.embeddings_on_cpu,
            seed=recipe.seed,
        )
        model.generation_config = self.generation_config
        return make_trainable(model, recipe)


def find_subject(recipe: Recipe, size: str) -> Subject:
    """Find the config of a recipe's checkpoint; for the two published ones without a download.

    Args:
        size: "recipe", or "full" for the published sizes with any checkpoint.

    Raises:
        InputError: there is no such checkpoint (`MissingFileError`), or it is an adapter.
    """
    path = recipe.model.path
    if path in PUBLISHED_CHECKPOINTS and not Path(path).exists():
        settings = GenerationConfig(chat_format=PUBLISHED_CHECKPOINTS[path])
        return Subject(f"{path}'s sizes", QwenVLConfig(), settings, torch.bfloat16)
    source = find_source(path)
    if source.adapter is not None:
        raise UserError(f"model.path: {path} is an adapter. The bench takes a checkpoint: give its base {source.base}")
    settings = read_generation_config(source.base)
    if size == "full":
        return Subject("the published sizes", QwenVLConfig(), settings, torch.bfloat16)
    config = QwenVLConfig.from_pretrained(source.base)
    quantized_parts(config, source.base)  # refuses a checkpoint that cannot be loaded
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the random model gets its own
    stored = getattr(torch, str(config.dtype).removeprefix("torch.")) if config.dtype is not None else torch.bfloat16
    return Subject(f"{path}'s sizes", config, settings, stored)


def ways_to_train(recipe: Recipe, both: bool) -> Iterator[tuple[str, Recipe]]:
    """The recipe as it is; with `both`, its LoRA and its Q-LoRA.

    Yields:
        (`LORA`, `QLORA` or `FULL`, the recipe).

    Raises:
        UserError: `both`, and the recipe trains without an adapter.
    """
    if recipe.adapter is None:
        if both:
            raise UserError("--both measures LoRA and Q-LoRA, and this recipe has adapter: null")
        yield FULL, recipe
        return
    is_nf4 = recipe.model.quantization == "nf4"
    if both or not is_nf4:
        plain = {"quantization": "none", "quantize": ("language",), "embeddings_on_cpu": False}
        yield LORA, recipe.model_copy(update={"model": recipe.model.model_copy(update=plain)}) if is_nf4 else recipe
    if both or is_nf4:
        nf4 = recipe.model.model_copy(update={"quantization": "nf4"})
        yield QLORA, recipe if is_nf4 else recipe.model_copy(update={"model": nf4})


def own_torch_device() -> torch.device:
    """The device that the bench, like a run, computes on."""
    return torch.device(device_type(), 0) if device_type() == "cuda" else torch.device("cpu")
