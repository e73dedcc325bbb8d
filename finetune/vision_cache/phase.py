"""The phase of a run in which its images are encoded, where the recipe has a vision cache."""

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn

from finetune.data.checking import Checked
from finetune.data.reading import DataPart, rules_of
from finetune.data.samples import Samples
from finetune.errors import Failed, UserError
from finetune.evaluation.task_evaluation import TaskEvaluation
from finetune.model.adapters import trains_vision
from finetune.model.computing import choose_dtype
from finetune.quantities import format_bytes
from finetune.recipe import Recipe
from finetune.replies.replies import without_adapter
from finetune.terminal import Say
from finetune.vision_cache.cache import ImageHandles, VisionCache, cache_folder, preprocessing_of
from finetune.vision_cache.encoding import encode_images
from finetune.vision_cache.run_images import find_images, images_of_run
from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration, QwenVLProcessor


def cache_images(
    recipe: Recipe,
    model: QwenVLForConditionalGeneration | PeftModel,
    processor: QwenVLProcessor,
    samples: Mapping[str, Samples],
    checked: Mapping[str, Checked],
    task: TaskEvaluation | None,
    say: Say,
) -> VisionCache | None:
    """Encode the images of a run, and let the vision side go if nothing needs it any more.

    It stays where images were left out for the cache's bound, and where the model is trained without an adapter: its
    weights are part of the checkpoints then.

    Args:
        model: with what shall be trained requiring gradients.
        samples, checked: for "train" and, where there is evaluation, "eval".
        task: gets the cache for its replies.

    Returns:
        The cache; None where the recipe has none, or there is nothing to encode.

    Raises:
        UserError: see `encoding.encode_images`; or the vision side is trained.
    """
    base = without_adapter(model)
    if recipe.data.vision_cache == "off" or base.config.visual is None:
        return None
    if trains_vision(model):
        raise UserError("data.vision_cache: the vision side is trained, and features change with it: set it to off")
    images = images_of_run(
        recipe, rules_of(recipe, processor), samples, checked, () if task is None else task.questions
    )
    if not len(images):
        return None
    with parked(model) if isinstance(model, PeftModel) else contextlib.nullcontext():
        cache = encode_images(base, images, processor.image_processor, recipe.data, say)
        if note := _never_trained_on(recipe, checked["train"]):
            say("", note)
        if task is not None:
            task.vision_cache = cache
        if cache.complete and isinstance(model, PeftModel):
            let_tower_go(base)
            say("", "the vision side has left the model, and its memory is free")
    return cache


def describe_phase(
    recipe: Recipe,
    config: QwenVLConfig,
    processor: QwenVLProcessor,
    parts: Mapping[str, DataPart],
    task: TaskEvaluation | None,
    processes: int | None = None,
) -> str | None:
    """What `finetune check` says of the phase, without weights; None where there is none.

    Args:
        parts: "train" and, where there is evaluation, "eval"; with nothing wrong in them.
        processes: see `checking.look_at`.
    """
    if recipe.data.vision_cache == "off" or config.visual is None:
        return None
    samples = {name: part.samples for name, part in parts.items()}
    checked = {name: part.checked for name, part in parts.items()}
    images = images_of_run(
        recipe, rules_of(recipe, processor), samples, checked, () if task is None else task.questions
    )
    handles = ImageHandles(preprocessing_of(processor.image_processor), "")
    count = len(find_images(images, handles, processes=processes))
    name = choose_dtype(recipe.model.dtype)
    dtype = (config.dtype or torch.float32) if name == "auto" else getattr(torch, name)
    size = count * config.n_queries * config.hidden_size * dtype.itemsize
    where = "memory" if recipe.data.vision_cache == "memory" else f"{cache_folder()}, less what is there already"
    bound = recipe.data.vision_cache_gb
    bounded = "" if bound is None else f", at most {format_bytes(bound * 1e9)} of them"
    note = _never_trained_on(recipe, checked["train"])
    return (
        f"{count:,} images to encode before training, {format_bytes(size)} into {where}{bounded}; the run says how "
        "long that takes" + (f". {note}" if note else "")
    )


def _never_trained_on(recipe: Recipe, training: Checked) -> str | None:
    """What is to be said where a run is over before it has come to all samples."""
    train, samples = recipe.train, len(training.weighted_indices(recipe.seed))
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps
    seen = train.max_steps * batch * int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 < seen < samples:
        return None
    return f"Note: the run trains on {seen:,} of its {samples:,} samples, and encodes the images of all"


@contextmanager
def parked(model: nn.Module) -> Iterator[None]:
    """Inside, the trained parameters are in host memory; afterwards they are back where they were, the same objects.

    The published adapter's take 0.45 GB, as much as encoding images does.
    """
    places = {parameter: parameter.device for parameter in model.parameters() if parameter.requires_grad}
    for parameter in places:
        parameter.data = parameter.data.cpu()
    try:
        yield
    finally:
        for parameter, device in places.items():
            parameter.data = parameter.data.to(device)


class AbsentTower(nn.Module):
    """Stands where the vision transformer and resampler were."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Raises:
        Failed: always.
        """
        raise Failed(
            f"{len(pixels)} image(s) would have to be encoded, but the vision side has left the model: this run's "
            "images were all encoded before it trained. Set data.vision_cache: off to keep it"
        )


def let_tower_go(model: QwenVLForConditionalGeneration):
    """Take the vision transformer and resampler out of a model, for good; adapters can still be saved."""
    model.transformer.visual = AbsentTower()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
