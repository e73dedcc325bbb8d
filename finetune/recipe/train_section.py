"""The `train` section: TRL's `SFTConfig` by its own names, without importing it, and a few keys of our own."""

import json
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from pydantic import AfterValidator, Field, create_model

from finetune.recipe.section import Finding, Section, Words, read_only

FIELDS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("train_fields.json").read_text())["fields"]
"""Every field of `SFTConfig`; `fields` writes the file."""

_TEXT_OF_THE_CHECKPOINT = "tokens and chat template are the checkpoint's own"
_PACKED = "conversations are packed without padding"
_NO_UPLOAD = "a run uploads nothing; when it is done, upload its adapter folder with `hf upload`"
_OWN_LOSS = "the loss is the cross-entropy over the supervised tokens of the whole step"
_OWN_EVALUATION = "evaluation measures the loss over all supervised tokens, and needs no such setting"
_OWN_EXCHANGE = "processes exchange gradients once a step, after its last backward, and nothing else"
_OWN_RESUME = "a run resumes exactly, or says why not"

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
    "parallelism_config": (None, "comes from the configuration of `accelerate launch`"),
    "push_to_hub": (None, _NO_UPLOAD),
    "hub_token": (None, f"{_NO_UPLOAD}. Write no token into a recipe"),
    "hub_private_repo": (None, _NO_UPLOAD),
    "hub_model_id": (None, _NO_UPLOAD),
    "hub_strategy": (None, _NO_UPLOAD),
    "hub_always_push": (None, _NO_UPLOAD),
    "hub_revision": (None, _NO_UPLOAD),
}
"""Fields of `SFTConfig` that a recipe does not take: the key that is used instead, if any, and why."""

DEFAULTS = {"learning_rate": (1e-5, "The default is the published LoRA script's; TRL's is 2e-5.")}
"""Where the default is not TRL's."""

MORE_CHOICES = {"optim": (("auto",), "auto is AdamW in float32, or in 8 bits and paged where only that fits the GPU.")}
"""What we take beside TRL's choices, and a sentence on it."""


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
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_offloading"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
)
"""Fields that `checkpointing` takes the place of."""

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
        warmup_steps: float
        optim: str
        logging_steps: float
        eval_strategy: Literal["no", "steps", "epoch"]
        eval_steps: float | None
        eval_on_start: bool
        save_strategy: Literal["no", "steps", "epoch", "best"]
        save_steps: float
        save_total_limit: int | None
        load_best_model_at_end: bool
        gradient_checkpointing: bool
        gradient_checkpointing_kwargs: Mapping[str, Any] | str | None
        activation_checkpointing: bool | None
        activation_checkpointing_kwargs: Mapping[str, Any] | str | None
        activation_offloading: bool
        dataloader_prefetch_factor: int | None
        dataloader_persistent_workers: bool
        dataloader_multiprocessing_context: str | None
        dataloader_drop_last: bool
        deepspeed: Mapping[str, Any] | str | None
        fsdp: bool | str | None

    learning_rates: LearningRates = Field(default_factory=LearningRates)
    """Learning rates of single components; what is null takes learning_rate."""
    vision_layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor on the learning rate from each layer of the vision transformer to the one below (the paper: 0.95)."""
    checkpointing: Literal["auto", "none", "selective", "full", "offload"] | None = None
    """Activations that backward recomputes; auto is the least that fits, null leaves the choice to TRL's keys."""

    save_minutes: Annotated[float, Field(gt=0)] | None = 10
    """Minutes between two checkpoints, beside those by step; put off while saves take over 5 % of the time."""

    def findings(self) -> Iterator[Finding]:
        if self.max_steps == 0:
            yield Finding(("max_steps",), "0 steps train nothing", "write -1 to go by num_train_epochs")
        for key in ("logging_steps", "eval_steps", "save_steps"):
            steps = getattr(self, key)
            if steps is not None and steps > 1 and steps != int(steps):
                yield Finding((key,), f"{steps} is neither a whole number of steps nor a share below 1")
        for key in TRL_CHECKPOINTING if self.checkpointing is not None else ():
            if key in self.model_fields_set:
                yield Finding((key, "checkpointing"), "both say what is kept for backward", "remove one of them")
        for key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            if isinstance(getattr(self, key), dict) and "selective" in getattr(self, key):
                reason = "TRL's selective does not reach the layers, or stops the run, with recent Transformers"
                yield Finding((key,), reason, "remove it, and set checkpointing: selective")
        if self.deepspeed is not None and self.fsdp:
            yield Finding(("deepspeed", "fsdp"), "both shard the model", "choose one of them")

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
    return reduce(or_, (kinds[kind] for kind in kinds if kind in about["types"]))


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
