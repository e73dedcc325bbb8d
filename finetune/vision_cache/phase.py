"""The phase of a run that encodes its images before training, where the recipe has a vision cache.

It needs device memory and sets some free: trained parameters wait in host memory while images are encoded, and the
vision side is removed afterwards if nothing needs it any more.
"""

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping

import torch
from peft import PeftModel
from torch import nn

from finetune.data.checks.checked import Checked
from finetune.data.reading import DataPart, rules_of
from finetune.data.samples import Samples
from finetune.errors import Failed, UserError
from finetune.evaluation.task_evaluation import TaskEvaluation
from finetune.memory.free_memory import device_type
from finetune.memory.weights import weights_dtype
from finetune.model.adapters import TrainableModel, trains_vision, without_adapter
from finetune.quantities import format_bytes
from finetune.recipe import Recipe
from finetune.run.left_out import LeftOut
from finetune.terminal import Say, say
from finetune.vision_cache.cache import ImageHandles, VisionCache, cache_folder, preprocessing_of
from finetune.vision_cache.encoding import encode_images
from finetune.vision_cache.run_images import drawn_in_run, find_images, images_of_run
from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration, QwenVLProcessor


def cache_images(
    recipe: Recipe,
    model: TrainableModel,
    processor: QwenVLProcessor,
    samples: Mapping[str, Samples],
    checked: Mapping[str, Checked],
    task: TaskEvaluation | None,
    left_out: LeftOut | None = None,
    say: Say = say,
) -> VisionCache | None:
    """Encode the images of a run, and remove the vision side from the model if nothing needs it any more.

    It stays if the cache's bound left images out, and if the model is trained without an adapter: checkpoints then
    contain the vision side.

    Args:
        model: with what shall be trained requiring gradients.
        samples, checked: for "train" and, if the recipe evaluates, "eval".
        task: asks about images of its own, which are encoded too.
        left_out: notes samples whose images cannot be decoded, where the recipe skips them; None refuses them.
        say: prints a labelled line.

    Returns:
        The cache; None if the recipe has none, or there are no images.

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
    with trained_parameters_on_host(model) if isinstance(model, PeftModel) else contextlib.nullcontext():
        cache = encode_images(base, images, processor.image_processor, recipe.data, say, left_out)
        if note := _note_unused_samples(recipe, checked["train"]):
            say("", note)
        if cache.complete and isinstance(model, PeftModel):
            remove_vision_tower(base)
            say("", "the vision side was removed from the model, which frees its memory")
    return cache


def describe_phase(
    recipe: Recipe,
    config: QwenVLConfig,
    processor: QwenVLProcessor,
    parts: Mapping[str, DataPart],
    task: TaskEvaluation | None,
    processes: int | None = None,
) -> str | None:
    """What `finetune check` prints about the phase, without loading weights; None if there is no such phase.

    Args:
        parts: "train" and, if the recipe evaluates, "eval"; all without errors.
        processes: see `checking.look_at`.
    """
    if recipe.data.vision_cache == "off" or config.visual is None:
        return None
    samples: dict[str, Samples] = {}
    checked: dict[str, Checked] = {}
    for name, part in parts.items():
        assert part.samples is not None and part.checked is not None, "data without errors has both"
        samples[name], checked[name] = part.samples, part.checked
    images = images_of_run(
        recipe, rules_of(recipe, processor), samples, checked, () if task is None else task.questions
    )
    handles = ImageHandles(preprocessing_of(processor.image_processor), "")
    count = len(find_images(images, handles, processes=processes))
    size = count * config.n_queries * config.hidden_size * weights_dtype(recipe, config, device_type()).itemsize
    where = "memory" if recipe.data.vision_cache == "memory" else f"{cache_folder()}, less what is there already"
    bound = recipe.data.vision_cache_gb
    bounded = "" if bound is None else f", at most {format_bytes(bound * 1e9)} of them"
    note = _note_unused_samples(recipe, checked["train"])
    return (
        f"{count:,} images to encode before training, {format_bytes(size)} into {where}{bounded}; the run says how "
        "long that takes" + (f". {note}" if note else "")
    )


def _note_unused_samples(recipe: Recipe, training: Checked) -> str | None:
    """A note for a run whose `max_steps` end it before it has trained on all samples."""
    train, samples = recipe.train, len(drawn_in_run(recipe, training))
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps
    seen = train.max_steps * batch * int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 < seen < samples:
        return None
    return f"Note: the run trains on {seen:,} of its {samples:,} samples, and encodes the images of all"


@contextlib.contextmanager
def trained_parameters_on_host(model: nn.Module) -> Iterator[None]:
    """Inside, trained parameters are in host memory; afterwards, back on their device. The objects stay the same.

    Those of the published adapter take 0.45 GB, as much as encoding images does.
    """
    devices = {parameter: parameter.device for parameter in model.parameters() if parameter.requires_grad}
    for parameter in devices:
        parameter.data = parameter.data.cpu()
    try:
        yield
    finally:
        for parameter, device in devices.items():
            parameter.data = parameter.data.to(device)


class RemovedVisionTower(nn.Module):
    """Takes the place of a vision transformer and resampler that were removed."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Raises:
        Failed: always.
        """
        raise Failed(
            f"{len(pixels)} image(s) would have to be encoded, but the vision side was removed from the model: this "
            "run's images were all encoded before it trained. Set data.vision_cache: off to keep it"
        )


def remove_vision_tower(model: QwenVLForConditionalGeneration) -> None:
    """Remove the vision transformer and resampler from a model, for good. Adapters can still be saved."""
    model.transformer.register_module("visual", RemovedVisionTower())
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
