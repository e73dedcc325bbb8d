"""DeepSpeed's configuration: made here from the recipe, so that a recipe needs no file of DeepSpeed's."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UserError

RECIPE_KEYS = {
    "train_batch_size": "train.per_device_train_batch_size and train.gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optim, train.learning_rate and train.weight_decay",
    "scheduler": "train.lr_scheduler_type and train.warmup_ratio",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
}
"""Keys of DeepSpeed's that the recipe's own keys decide."""

TAKEN = frozenset(
    {
        *("communication_data_type", "comms_logger", "dump_state", "flops_profiler", "memory_breakdown"),
        *("steps_per_print", "wall_clock_breakdown"),
        *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    }
)
"""Keys of DeepSpeed's that are taken as they are: how it communicates, and what it prints."""

TAKEN_OF_ZERO = frozenset(
    {
        *("allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "overlap_comm"),
        *("reduce_bucket_size", "reduce_scatter", "round_robin_gradients", "stage", "sub_group_size"),
        *("stage3_gather_16bit_weights_on_model_save", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
        *("stage3_param_persistence_threshold", "stage3_prefetch_bucket_size"),
    }
)
"""Keys of its `zero_optimization` that are taken: sizes of buffers, and what overlaps."""

OFFLOADING = ("offload_optimizer", "offload_param")


def read_config(given: Mapping[str, Any] | str) -> dict[str, Any]:
    """A recipe's `train.deepspeed`, which is a mapping or a JSON file.

    Raises:
        UserError: the file cannot be read as JSON, or is no mapping.
    """
    config: Any = given
    if isinstance(given, str):
        try:
            config = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"train.deepspeed: {given} cannot be read as JSON ({error})") from None
    if not isinstance(config, Mapping):
        raise UserError(f"train.deepspeed: {given} is a {type(config).__name__}: it has to be a mapping of keys")
    return dict(config)


def zero_stage(given: Mapping[str, Any] | str) -> int:
    """The ZeRO stage of a recipe's `train.deepspeed`.

    Raises:
        UserError: it is a file that cannot be read, or it says none.
    """
    config = read_config(given)
    try:
        return int(config["zero_optimization"]["stage"])
    except (KeyError, TypeError, ValueError):
        raise UserError("train.deepspeed has no zero_optimization.stage: give it, or train.parallel: zero2") from None


def refuse_config(given: Mapping[str, Any] | str, stage: int) -> None:
    """Refuse what contradicts the recipe, or what this trainer does not follow.

    Args:
        given: a recipe's `train.deepspeed`.
        stage: of ZeRO, as the run is shared out.

    Raises:
        UserError: all of it, with the recipe's keys for it.
    """
    problems = list(_problems(read_config(given), stage))
    if problems:
        raise UserError(f"train.deepspeed: {'; '.join(problems)}")


def _problems(config: Mapping[str, Any], stage: int) -> Iterator[str]:
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        yield "zero_optimization is not a mapping"
        zero = {}
    if zero.get("stage", stage) != stage:
        yield f"zero_optimization.stage is {zero['stage']}, and train.parallel is zero{stage}: take one of them out"
    for key in config:
        if key in RECIPE_KEYS and not _is_auto(config[key]):
            yield f"{key} is decided by {RECIPE_KEYS[key]}: take it out, or write auto"
        elif key not in RECIPE_KEYS and key not in TAKEN and key != "zero_optimization":
            yield f"{key} is not followed here: take it out"
    for key in zero:
        if key in OFFLOADING and not _is_nowhere(zero[key]):
            yield (
                f"zero_optimization.{key} is not supported: weights and optimizer stay on the GPUs. Take it out, and "
                "use more processes or an adapter"
            )
        elif key not in TAKEN_OF_ZERO and key not in OFFLOADING:
            yield f"zero_optimization.{key} is not followed here: take it out"


def _is_auto(value: Any) -> bool:
    """Whether a key leaves the choice to the recipe: `auto`, or a section like `{"enabled": "auto"}`."""
    if isinstance(value, Mapping):
        return all(_is_auto(one) for one in value.values())
    return value == "auto"


def _is_nowhere(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and value.get("device", "none") in (None, "none"))


def zero_config(
    stage: int, given: Mapping[str, Any] | str | None = None, *, has_adapter: bool = False
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run. What is "auto" in it Transformers fills in from the trainer's arguments.

    Args:
        stage: of ZeRO.
        given: a recipe's `train.deepspeed`; what it says about communication goes before what is decided here.
        has_adapter: whether what is trained is an adapter, in float32 beside a base that may be in 16 bits.
    """
    own = {} if given is None else read_config(given)
    zero: dict[str, Any] = {"overlap_comm": True, "contiguous_gradients": True}
    if stage == 3:
        # DeepSpeed gathers small parameters that it keeps whole in buffers of one dtype: none must be kept where there
        # are two.
        zero["stage3_param_persistence_threshold"] = 0 if has_adapter else "auto"
    zero |= {key: value for key, value in own.get("zero_optimization", {}).items() if key not in OFFLOADING}
    return {
        # Gradients of several packs are summed, and averaged over processes, in float32.
        "communication_data_type": "fp32",
        # No line of DeepSpeed's own every ten steps.
        "steps_per_print": 2**31,
        **{key: value for key, value in own.items() if key in TAKEN},
        "zero_optimization": {**zero, "stage": stage},
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        # The trainer says which backward is the last of a step: packs make more of them than there are batches.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }
