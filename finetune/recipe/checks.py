"""Keys of different sections that do not go together."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from finetune.recipe.best_score import (
    LOSS,
    evaluates_when,
    followed_score,
    follows_score,
    higher_is_better,
    keeps_best,
)
from finetune.recipe.section import Finding
from finetune.recipe.sections import Adapter, Data, Evaluate, Freeze, Model
from finetune.recipe.train_checks import BY_SCORE
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
    for key in ("vision", "resampler"):
        if adapter.bias == "all" and not getattr(freeze, key):
            yield Finding(
                (f"freeze.{key}", "adapter.bias"),
                f"trains the {key} in full, and its biases would be trained twice, in PEFT's copy and in the original",
                "set adapter.bias: lora_only, or freeze it",
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
        "adapter.bias": adapter is not None and adapter.bias == "all",
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
    if train.loraplus_lr_ratio is not None:
        if adapter is None:
            yield Finding(("train.loraplus_lr_ratio", "adapter"), "there is no adapter: no effect", "remove it")
        if any(rate is not None for rate in rates.model_dump().values()):
            yield Finding(
                ("train.loraplus_lr_ratio", "train.learning_rates"),
                "both say the learning rates of parts of the adapter",
                "remove one of them",
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
        "metric_for_best_model": train.metric_for_best_model is not None,
        "greater_is_better": train.greater_is_better is not None,
        "lr_scheduler_type": train.lr_scheduler_type in BY_SCORE,
    }
    for key, wished in wishes.items():
        if wished:
            value = getattr(train, key)
            yield Finding(
                (f"train.{key}", "evaluate"),
                f"{value if isinstance(value, str) else 'it'} needs an evaluation, and there is none",
                "give evaluate.data, or remove it",
            )


def evaluation_takes_place(train: Train, evaluate: Evaluate | None) -> Iterator[Finding]:
    if evaluate is None:
        return
    if train.eval_steps is not None and "eval_strategy" not in train.model_fields_set:
        reason = "evaluation is once an epoch where the recipe does not say otherwise: no effect"
        yield Finding(
            ("train.eval_steps", "train.eval_strategy"), reason, "set train.eval_strategy: steps, or remove it"
        )
    if evaluates_when(train, evaluate) == "no":
        wishes = {
            "evaluate.patience": evaluate.patience is not None,
            "train.load_best_model_at_end": train.load_best_model_at_end,
            "train.metric_for_best_model": train.metric_for_best_model is not None,
            "train.greater_is_better": train.greater_is_better is not None,
            "train.lr_scheduler_type": train.lr_scheduler_type in BY_SCORE,
        }
        for key, wished in wishes.items():
            if wished:
                reason = "needs evaluations during training, and train.eval_strategy is no"
                yield Finding((key, "train.eval_strategy"), reason, "set train.eval_strategy: epoch or steps")


def best_checkpoint_is_saved(train: Train, evaluate: Evaluate | None) -> Iterator[Finding]:
    if train.save_strategy == "best":
        reason = "the state of an interrupted run would be lost where its last step is not the best"
        remedy = "set train.load_best_model_at_end: true, which saves the best besides the others"
        yield Finding(("train.save_strategy",), reason, remedy)
    elif train.save_strategy == "no" and keeps_best(train, evaluate):
        reason = "no checkpoint is saved, and the best one is to be the result"
        remedy = "remove train.save_strategy, or set train.load_best_model_at_end: false to take the last step's"
        yield Finding(("train.save_strategy", "evaluate.task", "train.load_best_model_at_end"), reason, remedy)


def score_has_its_direction(train: Train, evaluate: Evaluate | None) -> Iterator[Finding]:
    if evaluate is None or evaluates_when(train, evaluate) == "no":
        return
    metric, greater = train.metric_for_best_model, train.greater_is_better
    score = followed_score(train, None if evaluate.task is None else "the task's score")
    if metric is not None and evaluate.task is None and score != LOSS:
        reason = f"{metric} is not measured: without a task there is the loss alone"
        yield Finding(
            ("train.metric_for_best_model", "evaluate.task"), reason, "set evaluate.task, or write eval_loss"
        )
        return
    if greater is not None and greater != higher_is_better(score):
        reason = f"{score} is better when it is {'higher' if higher_is_better(score) else 'lower'}: it keeps the worst"
        yield Finding(("train.greater_is_better", "train.metric_for_best_model"), reason, "remove it")
    mode = (train.lr_scheduler_kwargs or {}).get("mode")
    wanted = "max" if higher_is_better(score) else "min"
    if train.lr_scheduler_type in BY_SCORE and mode not in (None, wanted):
        reason = f"the learning rate would fall while {score} gets better"
        yield Finding(("train.lr_scheduler_kwargs", "train.lr_scheduler_type"), reason, f"write mode: {wanted}")
    if metric is not None and not follows_score(train, evaluate):
        reason = "nothing goes by it: no effect"
        yield Finding(("train.metric_for_best_model",), reason, "set train.load_best_model_at_end: true, or remove it")


def workers_have_work(data: Data, train: Train) -> Iterator[Finding]:
    if data.workers:
        return
    for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if getattr(train, key):
            yield Finding((f"train.{key}", "data.workers"), "there are no workers: no effect", "raise data.workers")


SHARED_OPTIMIZERS = {
    "fsdp": ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"),
    "zero2": ("adamw_torch", "adamw_torch_fused", "sgd"),
    "zero3": ("adamw_torch", "adamw_torch_fused", "sgd"),
}
"""Values of `train.optim` that work on a part of each tensor: PyTorch's own. Those of other packages take a tensor's
memory as a whole, or do not know tensors that are distributed."""


FLOAT16_BY_DEEPSPEED = "by DeepSpeed's own loss scaling it is not told which steps are skipped"


def model_can_be_shared(model: Model, adapter: Adapter | None, data: Data, train: Train) -> Iterator[Finding]:
    way = "fsdp" if train.parallel == "auto" and train.fsdp else train.parallel
    if way in SHARED_OPTIMIZERS:
        yield from what_cannot_be_shared(model, adapter, data, train, way)


def what_cannot_be_shared(
    model: Model, adapter: Adapter | None, data: Data, train: Train, way: str
) -> Iterator[Finding]:
    """What does not go with a way of training in which each process has a part of the model or of its optimizer.

    Args:
        way: one of `SHARED_OPTIMIZERS`.
    """
    other, optimizers, in_parts = "train.parallel", SHARED_OPTIMIZERS[way], way != "zero2"
    if model.quantization == "nf4" and in_parts:
        reason = "4-bit codes are not shared: every process would keep all of them"
        remedy = "set train.parallel: ddp, with one quantised base a GPU (some 6 GB), or model.quantization: none"
        yield Finding(("model.quantization", other), reason, remedy)
    if model.dtype == "float16" and way != "fsdp":
        yield Finding(
            ("model.dtype", other), FLOAT16_BY_DEEPSPEED, "set model.dtype: bfloat16, or train.parallel: fsdp"
        )
    if model.embeddings_on_cpu:
        yield Finding(("model.embeddings_on_cpu", other), "the processes share the embeddings too", "take it out")
    if data.vision_cache != "off" and in_parts:
        reason = "images are encoded before the processes share the model, when only the first one has it"
        yield Finding(("data.vision_cache", other), reason, "set it to off")
    if adapter is not None and adapter.bias != "none" and way == "zero3":
        reason = "biases are read in the type of the weights before DeepSpeed gathers them"
        yield Finding(("adapter.bias", other), reason, "set train.parallel: fsdp or zero2, or adapter.bias: none")
    if train.optim not in ("auto", *optimizers):
        reason = f"{train.optim} does not work on parts of tensors"
        yield Finding(("train.optim", other), reason, f"take one of {', '.join(optimizers)}")


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
    best_checkpoint_is_saved,
    score_has_its_direction,
    workers_have_work,
    model_can_be_shared,
)
"""Each takes the sections that its parameters name."""
