"""The `train` section: TRL's `SFTConfig` by its own names, without importing it, and a few keys of our own."""

import json
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from pydantic import AfterValidator, Field, create_model

from finetune.recipe.section import Finding, Section, Words, read_only
from finetune.recipe.train_checks import findings_of_train

FIELDS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("train_fields.json").read_text())["fields"]
"""Every field of `SFTConfig`; `fields` writes the file."""

_TEXT_OF_THE_CHECKPOINT = "tokens and chat template are the checkpoint's own"
_PACKED = "conversations are packed without padding"
_NO_UPLOAD = "a run uploads nothing; when it is done, upload its adapter folder with `hf upload`"
_OWN_LOSS = "the loss is the cross-entropy over the supervised tokens of the whole step"
_OWN_EVALUATION = "evaluation measures the loss over all supervised tokens, and needs no such setting"
_OWN_EXCHANGE = "processes exchange gradients once a step, after its last backward, and nothing else"
_OWN_RESUME = "a run resumes exactly, or says why not"
_NO_COMPILATION = "packs differ in shape from step to step, and each shape would be compiled anew"

OWNED: dict[str, tuple[str | None, str]] = {
    "output_dir": ("output", ""),
    "seed": ("seed", ""),
    "data_seed": ("seed", "one seed is for everything"),
    "bf16": ("model.dtype", ""),
    "fp16": ("model.dtype", ""),
    "bf16_full_eval": ("model.dtype", "evaluation computes as training does"),
    "fp16_full_eval": ("model.dtype", "evaluation computes as training does"),
    "max_length": ("data.max_length", ""),
    "truncation_mode": ("data.on_long", "no conversation is ever cut"),
    "packing": ("data.packing", ""),
    "packing_strategy": ("data.tokens_per_batch", "packs are filled up to this budget, and nothing is cut"),
    "eval_packing": ("data.packing", "evaluation packs as training does"),
    "padding_free": ("data.packing", _PACKED),
    "pad_to_multiple_of": ("data.packing", _PACKED),
    "assistant_only_loss": ("data.labels", ""),
    "completion_only_loss": ("data.labels", ""),
    "dataset_text_field": ("data.train.columns", ""),
    "dataset_kwargs": ("data.train", ""),
    "dataset_num_proc": ("data.workers", ""),
    "dataloader_num_workers": ("data.workers", ""),
    "shuffle_dataset": ("data.shuffle", ""),
    "train_sampling_strategy": ("data.shuffle", "packing already uses lengths"),
    "length_column_name": (None, "lengths are known without a column"),
    "remove_unused_columns": (None, "the collator decides what the model gets"),
    "label_names": (None, "the collator decides what the model gets"),
    "resume_from_checkpoint": ("resume", _OWN_RESUME),
    "ignore_data_skip": ("resume", _OWN_RESUME),
    "restore_callback_states_from_checkpoint": ("resume", _OWN_RESUME),
    "enable_jit_checkpoint": ("resume", "an interrupted run always saves"),
    "do_train": (None, "the command says what is done"),
    "do_eval": ("evaluate", ""),
    "do_predict": ("evaluate", ""),
    "prediction_loss_only": (None, _OWN_EVALUATION),
    "eval_do_concat_batches": (None, _OWN_EVALUATION),
    "eval_use_gather_object": (None, _OWN_EVALUATION),
    "eval_accumulation_steps": (None, _OWN_EVALUATION),
    "include_for_metrics": (None, _OWN_EVALUATION),
    "batch_eval_metrics": (None, _OWN_EVALUATION),
    "loss_type": (None, _OWN_LOSS),
    "label_smoothing_factor": (None, _OWN_LOSS),
    "average_tokens_across_devices": (None, _OWN_LOSS),
    "logging_nan_inf_filter": (None, "a loss that is not finite stops the run and names its rows"),
    "router_aux_loss_coef": (None, "the model has no experts"),
    "model_init_kwargs": ("model", ""),
    "use_cache": (None, "training needs no cache"),
    "use_cpu": (None, "a CUDA device is used where there is one; hide it with CUDA_VISIBLE_DEVICES="),
    "trust_remote_code": (None, "code from a checkpoint is never run"),
    "chat_template_path": (None, _TEXT_OF_THE_CHECKPOINT),
    "eos_token": (None, _TEXT_OF_THE_CHECKPOINT),
    "pad_token": (None, _TEXT_OF_THE_CHECKPOINT),
    "auto_find_batch_size": ("data.tokens_per_batch", "it bounds the memory of a step, whatever the batch size"),
    "torch_empty_cache_steps": ("data.tokens_per_batch", "it bounds the memory of a step"),
    "disable_tqdm": (None, "a run prints its own progress"),
    "ddp_find_unused_parameters": (None, _OWN_EXCHANGE),
    "ddp_bucket_cap_mb": (None, _OWN_EXCHANGE),
    "ddp_broadcast_buffers": (None, _OWN_EXCHANGE),
    "ddp_static_graph": (None, _OWN_EXCHANGE),
    "local_rank": (None, "comes from the launcher"),
    "parallelism_config": ("train.parallel", "tensors and sequences are not cut"),
    "push_to_hub": (None, _NO_UPLOAD),
    "hub_token": (None, f"{_NO_UPLOAD}. Write no token into a recipe"),
    "hub_private_repo": (None, _NO_UPLOAD),
    "hub_model_id": (None, _NO_UPLOAD),
    "hub_strategy": (None, _NO_UPLOAD),
    "hub_always_push": (None, _NO_UPLOAD),
    "hub_revision": (None, _NO_UPLOAD),
    "trackio_space_id": (None, _NO_UPLOAD),
    "trackio_bucket_id": (None, _NO_UPLOAD),
    "trackio_static_space_id": (None, _NO_UPLOAD),
    "save_only_model": (None, "a run could not go on without the rest; its result's folder has the model alone"),
    "save_on_each_node": (None, "one process writes the run's folder"),
    "log_on_each_node": (None, "one process prints and writes the run's folder"),
    "include_num_input_tokens_seen": (None, "tokens and their rate are always logged, without padding"),
    "skip_memory_metrics": (None, "the peak memory is always logged"),
    "debug": (None, "a loss that is not finite stops the run and names its rows"),
    "full_determinism": (None, "it comes too late: the model is on the device by then, and its libraries are set up"),
    "accelerator_config": (None, "how batches are shared out is part of what a resume repeats"),
    "dataloader_in_order": (None, "the order of batches is part of what a resume repeats"),
    "optim_target_modules": ("train.learning_rates", "only optimizers that are refused take it"),
    "torch_compile": ("model.kernels", _NO_COMPILATION),
    "torch_compile_backend": ("model.kernels", _NO_COMPILATION),
    "torch_compile_mode": ("model.kernels", _NO_COMPILATION),
    "use_liger_kernel": ("model.kernels", "liger, or auto, which takes them where they run"),
    "liger_kernel_config": ("model.kernels", ""),
    "activation_offloading": (
        "train.checkpointing",
        "offload keeps nothing on the device, and goes without a GPU too",
    ),
}
"""Fields of `SFTConfig` that a recipe does not take: the key that is used instead, if any, and why."""

DEFAULTS = {"learning_rate": (1e-5, "The default is the published LoRA script's; TRL's is 2e-5.")}
"""Where the default is not TRL's."""

MORE_CHOICES = {"optim": (("auto",), "auto is AdamW in float32, or in 8 bits and paged where only that fits the GPU.")}
"""What we take beside TRL's choices, and a sentence on it."""

NARROWER = {
    # A string would be read as JSON, or as the name of a file that nothing opens.
    "lr_scheduler_kwargs": ("null", "object"),
    "gradient_checkpointing_kwargs": ("null", "object"),
    "activation_checkpointing_kwargs": ("null", "object"),
    "report_to": ("array", "string"),  # null would be a tracker of that name
}
"""Kinds of values that we take, where TRL takes more."""


class Limits(TypedDict, total=False):
    """Bounds of a number, as pydantic's `Field` takes them."""

    gt: float
    ge: float
    lt: float
    le: float


LIMITS: dict[str, Limits] = {
    "learning_rate": {"gt": 0},
    "num_train_epochs": {"gt": 0},
    "per_device_train_batch_size": {"ge": 1},
    "per_device_eval_batch_size": {"ge": 1},
    "gradient_accumulation_steps": {"ge": 1},
    "max_steps": {"ge": -1},
    "warmup_steps": {"ge": 0},
    "weight_decay": {"ge": 0},
    "neftune_noise_alpha": {"gt": 0},
    "adam_beta1": {"ge": 0, "lt": 1},
    "adam_beta2": {"ge": 0, "lt": 1},
    "adam_epsilon": {"gt": 0},
    "max_grad_norm": {"ge": 0},
    "logging_steps": {"gt": 0},
    "eval_steps": {"gt": 0},
    "eval_delay": {"ge": 0},
    "save_steps": {"gt": 0},
    "save_total_limit": {"ge": 1},
    "dataloader_prefetch_factor": {"ge": 1},
    "ddp_timeout": {"ge": 1},
}
"""Bounds that `SFTConfig` does not state, and would let pass or fail on after the weights were loaded."""

DECIDING = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm"),
    *("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
)
"""Fields that decide the result of a run: always written out, so that a later TRL's defaults cannot change it."""

TRL_CHECKPOINTING = (
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
)
"""Fields that `checkpointing` takes the place of."""

FSDP_KEYS = ("reshard_after_forward", "version")
"""Keys of `fsdp_config` that are taken: layers are freed after forward, and gathered again for backward; and 2."""

Rate = Annotated[float, Field(gt=0)]


class LearningRates(Section):
    """Learning rates of single components; null takes train.learning_rate."""

    vision: Rate | None = None
    """Of the vision transformer, where it is trained in full."""
    resampler: Rate | None = None
    """Of the adapter between vision and language, where it is trained in full."""
    language: Rate | None = None
    """Of the language model without its embeddings, where it is trained in full."""
    embeddings: Rate | None = None
    """Of token embeddings and output head, where they are trained."""
    adapter: Rate | None = None
    """Of the LoRA matrices."""


class OwnTrainKeys(Section):
    """How it is trained: fields of TRL's SFTConfig by their own names, and keys that it lacks."""

    if TYPE_CHECKING:
        # `Train` takes every field of `FIELDS` that is not in `OWNED`; these are the types of those that are read.
        def __init__(self, **fields: Any) -> None: ...

        num_train_epochs: float
        max_steps: int
        per_device_train_batch_size: int
        per_device_eval_batch_size: int
        gradient_accumulation_steps: int
        learning_rate: float
        lr_scheduler_type: str
        lr_scheduler_kwargs: Mapping[str, Any] | None
        warmup_steps: float
        optim: str
        optim_args: str | None
        neftune_noise_alpha: float | None
        tf32: bool | None
        report_to: str | tuple[str, ...]
        logging_steps: float
        eval_strategy: Literal["no", "steps", "epoch"]
        eval_steps: float | None
        eval_delay: float
        eval_on_start: bool
        save_strategy: Literal["no", "steps", "epoch", "best"]
        save_steps: float
        save_total_limit: int | None
        load_best_model_at_end: bool
        metric_for_best_model: str | None
        greater_is_better: bool | None
        gradient_checkpointing: bool
        gradient_checkpointing_kwargs: Mapping[str, Any] | None
        activation_checkpointing: bool | None
        activation_checkpointing_kwargs: Mapping[str, Any] | None
        dataloader_prefetch_factor: int | None
        dataloader_persistent_workers: bool
        dataloader_multiprocessing_context: str | None
        dataloader_drop_last: bool
        deepspeed: Mapping[str, Any] | str | None
        fsdp: bool | str | None
        fsdp_config: Mapping[str, Any] | str | None

    learning_rates: LearningRates = Field(default_factory=LearningRates)
    """Learning rates of single components; what is null takes learning_rate."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """LoRA+: learning_rate times this is that of the LoRA matrices B and the vectors beside them; null is the same."""
    vision_layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor on the learning rate from each layer of the vision transformer to the one below (the paper: 0.95)."""
    parallel: Literal["auto", "none", "ddp", "fsdp", "zero2", "zero3"] = "auto"
    """How several processes share the work; auto is the plugin of `accelerate launch`, else ddp. ddp: a whole model
    each; fsdp: each has a part of it (FSDP2); zero2, zero3: DeepSpeed's."""
    checkpointing: Literal["auto", "none", "selective", "full", "offload"] | None = None
    """Activations that backward recomputes; auto is the least that fits, null leaves the choice to TRL's keys."""

    save_minutes: Annotated[float, Field(gt=0)] | None = 10
    """Minutes between two checkpoints, beside those by step; put off while saves take over 5 % of the time."""

    def findings(self) -> Iterator[Finding]:
        yield from findings_of_train(self)
        for key in TRL_CHECKPOINTING if self.checkpointing is not None else ():
            if key in self.model_fields_set:
                yield Finding((key, "checkpointing"), "both say what is kept for backward", "remove one of them")
        yield from self._parallel_findings()

    def _parallel_findings(self) -> Iterator[Finding]:
        if self.deepspeed is not None and self.fsdp:
            yield Finding(("deepspeed", "fsdp"), "both shard the model", "choose one of them")
        elif self.fsdp and self.parallel not in ("auto", "fsdp"):
            yield Finding(("fsdp", "parallel"), f"parallel is {self.parallel}, and this asks for fsdp", "take it out")
        elif self.deepspeed is not None and self.parallel not in ("auto", "zero2", "zero3"):
            reason = f"parallel is {self.parallel}, and this asks for DeepSpeed"
            yield Finding(("deepspeed", "parallel"), reason, "take it out")
        if isinstance(self.fsdp, str) and set(self.fsdp.split()) - {"full_shard", "auto_wrap", "true", "True"}:
            reason = f"{self.fsdp!r} is a way of the old FSDP; weights, gradients and optimizer are shared here"
            yield Finding(("fsdp",), reason, "take it out, and set parallel: fsdp")
        if self.fsdp_config is None:
            return
        if not self.fsdp and self.parallel != "fsdp":
            yield Finding(("fsdp_config", "parallel"), "has no effect without parallel: fsdp", "take it out")
        elif isinstance(self.fsdp_config, str):
            yield Finding(("fsdp_config",), "is a file", f"write its keys here; there are {', '.join(FSDP_KEYS)}")
        else:
            given = {name.removeprefix("fsdp_"): value for name, value in self.fsdp_config.items()}
            for name in sorted(given.keys() - set(FSDP_KEYS)):
                reason = f"{name}: what is wrapped, loaded and saved is decided here"
                yield Finding(("fsdp_config",), reason, f"take it out; there are {', '.join(FSDP_KEYS)}")
            if given.get("version", 2) != 2:
                yield Finding(("fsdp_config",), f"version {given['version']} is not supported", "write 2")
            if not isinstance(given.get("reshard_after_forward", True), bool):
                yield Finding(("fsdp_config",), "reshard_after_forward is true or false")

    def arguments(self) -> dict[str, Any]:
        """Arguments of `SFTConfig`: what the recipe sets, and what decides a run's result. The caller's to change."""
        wanted = (self.model_fields_set | set(DECIDING)) - set(OwnTrainKeys.model_fields)
        values = self.model_dump(mode="json")
        if self.checkpointing is not None:
            # The layers are set by `model.recomputation.set_recomputation`.
            wanted, values = wanted | {"gradient_checkpointing"}, values | {"gradient_checkpointing": False}
        return {name: values[name] for name in FIELDS if name in wanted and values[name] != "auto"}


def _annotation(name: str, about: dict[str, Any]) -> Any:
    limits = LIMITS.get(name)
    more, _ = MORE_CHOICES.get(name, ((), ""))
    integer: Any = int if limits is None else Annotated[int, Field(**limits)]
    real: Any = float if limits is None else Annotated[float, Field(**limits)]
    kinds: dict[str, Any] = {
        "integer": integer,
        # Whole numbers stay whole: TRL takes both where it says float.
        "number": integer | real,
        "boolean": bool,
        "string": Literal[(*about["choices"], *more)] if "choices" in about else str,
        "array": Words,
        "object": Annotated[dict[str, Any], AfterValidator(read_only)],
        "null": None,
    }
    taken = NARROWER.get(name, about["types"])
    return reduce(or_, (kinds[kind] for kind in kinds if kind in taken))


def _field(name: str, about: dict[str, Any]) -> tuple[Any, Any]:
    default, note = DEFAULTS.get(name, (about["default"], ""))
    _, more = MORE_CHOICES.get(name, ((), ""))
    description = " ".join(filter(None, (about["help"], note, more)))
    return _annotation(name, about), Field(default=read_only(default), description=description)


if TYPE_CHECKING:
    Train = OwnTrainKeys
else:
    Train = create_model(
        "Train",
        __base__=OwnTrainKeys,
        __doc__=OwnTrainKeys.__doc__,
        __module__=__name__,
        **{name: _field(name, about) for name, about in FIELDS.items() if name not in OWNED},
    )
