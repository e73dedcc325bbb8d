"""Keys of different sections that do not go together."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from finetune.recipe.section import Finding
from finetune.recipe.sections import Adapter, Data, Evaluate, Freeze, Model
from finetune.recipe.train_section import Train


def findings_across(sections: Mapping[str, Any]) -> Iterator[Finding]:
    """Every check whose sections are there.

    Args:
        sections: by name; a section that is wrong in itself is left out, and what needs it is not checked.
    """
    for check in CHECKS:
        names = inspect.signature(check).parameters
        if all(name in sections for name in names):
            yield from check(**{name: sections[name] for name in names})


def something_is_trained(adapter: Adapter | None, freeze: Freeze) -> Iterator[Finding]:
    if adapter is None and freeze.vision and freeze.resampler and freeze.language:
        yield Finding(
            ("adapter", "freeze.vision", "freeze.resampler", "freeze.language"),
            "nothing would be trained: there is no adapter, and everything is frozen",
            "set adapter, or one key of freeze to false",
        )


def nothing_is_trained_twice(adapter: Adapter | None, freeze: Freeze) -> Iterator[Finding]:
    if adapter is None:
        return
    if not freeze.language:
        yield Finding(
            ("freeze.language", "adapter"),
            "trains the language model in full, and the adapter trains it by LoRA",
            "set freeze.language: true or adapter: null",
        )
    if adapter.vision_targets and not freeze.vision:
        yield Finding(
            ("freeze.vision", "adapter.vision_targets"),
            "trains the vision tower in full, and adapter.vision_targets by LoRA",
            "choose one",
        )


def quantized_base_can_be_trained(model: Model, adapter: Adapter | None, freeze: Freeze) -> Iterator[Finding]:
    if model.quantization == "none":
        return
    if adapter is None:
        yield Finding(
            ("model.quantization", "adapter"),
            "4-bit weights cannot be trained in full",
            "set adapter, or model.quantization: none",
        )
        return
    if adapter.init not in ("default", "gaussian"):
        yield Finding(
            ("adapter.init", "model.quantization"),
            f"{adapter.init} starts from the base's weights or changes them, which does not go in 4 bits",
            "set adapter.init: default, or model.quantization: none",
        )
    if "vision" in model.quantize and not freeze.vision:
        yield Finding(
            ("freeze.vision", "model.quantize"),
            "trains the vision tower in full, which 4-bit weights cannot be",
            "set freeze.vision: true, or take vision out of model.quantize",
        )
    if adapter.train_embeddings is True and "head" in model.quantize:
        yield Finding(
            ("adapter.train_embeddings", "model.quantize"),
            "trains the output head in full, which 4-bit weights cannot be",
            "set it to false, or take head out of model.quantize",
        )


def host_embeddings_are_frozen(model: Model, adapter: Adapter | None, freeze: Freeze) -> Iterator[Finding]:
    if not model.embeddings_on_cpu:
        return
    if adapter is not None and adapter.train_embeddings is True:
        key = "adapter.train_embeddings"
    elif adapter is None and not freeze.language:
        key = "freeze.language"
    else:
        return
    reason = "trains the embeddings, which are to stay in host memory"
    yield Finding((key, "model.embeddings_on_cpu"), reason, "choose one")


def cached_vision_is_frozen(adapter: Adapter | None, freeze: Freeze, data: Data) -> Iterator[Finding]:
    if data.vision_cache == "off":
        return
    trained = {
        "freeze.vision": not freeze.vision,
        "freeze.resampler": not freeze.resampler,
        "adapter.vision_targets": adapter is not None and bool(adapter.vision_targets),
    }
    for key in (key for key, is_trained in trained.items() if is_trained):
        yield Finding(
            ("data.vision_cache", key),
            f"features of images are computed once, and {key} trains what computes them",
            "set data.vision_cache: off, or freeze vision and resampler and name no vision_targets",
        )


def attention_has_its_type(model: Model) -> Iterator[Finding]:
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield Finding(
            ("model.attention", "model.dtype"),
            "flash_attention_2 computes in 16 bits only",
            "set model.dtype: bfloat16, or model.attention: sdpa",
        )


def learning_rates_have_an_effect(adapter: Adapter | None, freeze: Freeze, train: Train) -> Iterator[Finding]:
    rates, needed = train.learning_rates, "set it to false, or remove the learning rate"
    for name in ("vision", "resampler", "language"):
        if getattr(rates, name) is not None and getattr(freeze, name):
            yield Finding(
                (f"train.learning_rates.{name}", f"freeze.{name}"), f"freeze.{name} is true: no effect", needed
            )
    if rates.adapter is not None and adapter is None:
        yield Finding(("train.learning_rates.adapter", "adapter"), "there is no adapter: no effect", "remove it")
    if rates.embeddings is not None and freeze.language and (adapter is None or adapter.train_embeddings is False):
        yield Finding(
            ("train.learning_rates.embeddings", "adapter.train_embeddings"),
            "embeddings are not trained: no effect",
            "set adapter.train_embeddings: true, or remove the learning rate",
        )
    if train.vision_layer_decay is not None and freeze.vision:
        yield Finding(
            ("train.vision_layer_decay", "freeze.vision"),
            "acts where the vision tower is trained in full: no effect",
            "set freeze.vision: false, or remove it",
        )


def evaluation_has_data(train: Train, evaluate: Evaluate | None) -> Iterator[Finding]:
    if evaluate is not None:
        return
    wishes = {
        "eval_strategy": train.eval_strategy != "no",
        "eval_on_start": train.eval_on_start,
        "load_best_model_at_end": train.load_best_model_at_end,
        "save_strategy": train.save_strategy == "best",
        "lr_scheduler_type": train.lr_scheduler_type == "reduce_lr_on_plateau",
    }
    for key, wished in wishes.items():
        if wished:
            value = getattr(train, key)
            yield Finding(
                (f"train.{key}", "evaluate"),
                f"{value if isinstance(value, str) else 'true'} needs an evaluation, and there is none",
                "give evaluate.data, or remove it",
            )


def evaluation_takes_place(train: Train, evaluate: Evaluate | None) -> Iterator[Finding]:
    if evaluate is None:
        return
    # With an evaluate section, evaluation is once an epoch unless the recipe says otherwise.
    when = train.eval_strategy if "eval_strategy" in train.model_fields_set else "epoch"
    if when == "no":
        wishes = {
            "evaluate.patience": evaluate.patience is not None,
            "train.load_best_model_at_end": train.load_best_model_at_end,
            "train.save_strategy": train.save_strategy == "best",
            "train.lr_scheduler_type": train.lr_scheduler_type == "reduce_lr_on_plateau",
        }
        for key, wished in wishes.items():
            if wished:
                reason = "needs evaluations during training, and train.eval_strategy is no"
                yield Finding((key, "train.eval_strategy"), reason, "set train.eval_strategy: epoch or steps")


def workers_have_work(data: Data, train: Train) -> Iterator[Finding]:
    if data.workers:
        return
    for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if getattr(train, key):
            yield Finding((f"train.{key}", "data.workers"), "there are no workers: no effect", "raise data.workers")


SHARED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Values of `train.optim` that work on a part of each tensor: PyTorch's own. Those of other packages take a tensor's
memory as a whole, or do not know tensors that are distributed."""


def model_can_be_shared(model: Model, data: Data, train: Train) -> Iterator[Finding]:
    if train.parallel in ("fsdp", "zero3") or (train.parallel == "auto" and train.fsdp):
        yield from what_cannot_be_shared(model, data, train)


def what_cannot_be_shared(model: Model, data: Data, train: Train) -> Iterator[Finding]:
    """What does not go with a model of which each process has a part."""
    other = "train.parallel"
    if model.quantization == "nf4":
        reason = "4-bit codes are not shared: every process would keep all of them"
        remedy = "set train.parallel: ddp, with one quantised base a GPU (some 6 GB), or model.quantization: none"
        yield Finding(("model.quantization", other), reason, remedy)
    if model.embeddings_on_cpu:
        yield Finding(("model.embeddings_on_cpu", other), "the processes share the embeddings too", "take it out")
    if data.vision_cache != "off":
        reason = "images are encoded before the processes share the model, when only the first one has it"
        yield Finding(("data.vision_cache", other), reason, "set it to off")
    if train.optim not in ("auto", *SHARED_OPTIMIZERS):
        reason = f"{train.optim} does not work on parts of tensors"
        yield Finding(("train.optim", other), reason, f"take one of {', '.join(SHARED_OPTIMIZERS)}")


CHECKS = (
    something_is_trained,
    nothing_is_trained_twice,
    quantized_base_can_be_trained,
    host_embeddings_are_frozen,
    cached_vision_is_frozen,
    attention_has_its_type,
    learning_rates_have_an_effect,
    evaluation_has_data,
    evaluation_takes_place,
    workers_have_work,
    model_can_be_shared,
)
"""Each takes the sections that its parameters name."""
