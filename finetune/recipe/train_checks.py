"""Values of the `train` section that TRL's `SFTConfig` takes and that would do something else than they say.

What has to ask a library (packages, arguments of a schedule) is in `finetune.training.settings_check`: nothing heavy
is imported here.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from finetune.recipe.section import Finding

if TYPE_CHECKING:
    from finetune.recipe.train_section import OwnTrainKeys

_IN_PYTHON = "choose another, or give its object to finetune.training.train.train(recipe, optimizer=...)"
_ANOTHER = "choose another"
_LOW_RANK = "it projects the gradients of whole linear layers, and replaces the groups of train.learning_rates"
_DURING_BACKWARD = "it updates weights during the backward pass, when the loss of the step is not complete"
_TWO_WEIGHTS = "its weights differ in training and evaluation, and would be evaluated and saved in the wrong form"
_OTHER_DEVICE = "it needs a device that this toolkit does not train on"
_UNTESTED = "it comes from a package that this toolkit was never run with"

REFUSED_OPTIMIZERS: Mapping[str, str] = {
    "adamw_torch_xla": _OTHER_DEVICE,
    "adamw_torch_npu_fused": _OTHER_DEVICE,
    **dict.fromkeys(("adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "grokadamw"), _UNTESTED),
    "stable_adamw": _UNTESTED,
    **dict.fromkeys(("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw"), _LOW_RANK),
    **dict.fromkeys(("galore_adamw_layerwise", "galore_adamw_8bit_layerwise"), _DURING_BACKWARD),
    **dict.fromkeys(("galore_adafactor_layerwise", "apollo_adamw_layerwise", "lomo", "adalomo"), _DURING_BACKWARD),
    **dict.fromkeys(("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), _TWO_WEIGHTS),
}
"""Values of `optim` that are refused, and why."""

_ADEMAMIX = ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")
OPTIMIZER_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), _ADEMAMIX),
}
"""What `optim_args` may set; `weight_decay` is a key of its own, and other optimizers read nothing."""

_CONSTANT = ("constant", "constant_with_warmup")
_WITHOUT_WARMUP = {
    "constant": "set lr_scheduler_type: constant_with_warmup, or remove warmup_steps",
    "reduce_lr_on_plateau": "remove it, or choose another schedule",
}
BY_SCORE = ("reduce_lr_on_plateau",)
"""Schedules that follow the evaluations."""


def findings_of_train(train: "OwnTrainKeys") -> Iterator[Finding]:
    """Keys and values of a `train` section that are wrong whatever the rest of the recipe says."""
    yield from _optimizer(train)
    yield from _schedule(train)
    yield from _steps(train)
    yield from _recomputation(train)
    yield from _reporting(train)


def _optimizer(train: "OwnTrainKeys") -> Iterator[Finding]:
    optim = train.optim
    if optim in REFUSED_OPTIMIZERS:
        reason = REFUSED_OPTIMIZERS[optim]
        remedy = _IN_PYTHON if reason == _UNTESTED else _ANOTHER
        yield Finding(("optim",), f"{optim} cannot be used here: {reason}", remedy)
        return
    adam_like = "adamw" in optim or "ademamix" in optim or optim == "auto"
    unused = {
        "adam_beta1": not adam_like and "lion" not in optim,
        "adam_beta2": not adam_like and "lion" not in optim,
        "adam_epsilon": not adam_like,
    }
    for key, is_unused in unused.items():
        # A recipe that a run wrote states the defaults.
        if is_unused and getattr(train, key) != type(train).model_fields[key].default:
            yield Finding((key, "optim"), f"{optim} does not use it: no effect", "remove it")
    if train.optim_args is None:
        return
    taken = OPTIMIZER_ARGUMENTS.get(optim, ())
    for setting in filter(None, train.optim_args.replace(" ", "").split(",")):
        key, equals, value = setting.partition("=")
        if not equals or not key or not value or "=" in value:
            reason = f"{setting!r} is no setting"
            yield Finding(("optim_args",), reason, 'write "momentum=0.9,nesterov=true", say')
        elif key == "weight_decay":
            yield Finding(("optim_args",), "weight_decay is a key of its own", "use train.weight_decay")
        elif key not in taken:
            takes = f"it takes {', '.join(taken)}" if taken else "it takes none: remove optim_args"
            yield Finding(("optim_args", "optim"), f"{optim} takes no {key}", takes)


def _schedule(train: "OwnTrainKeys") -> Iterator[Finding]:
    name = train.lr_scheduler_type
    if name == "greedy":
        reason = "its bounds of the learning rate (min_lr 1e-3) are above those of fine-tuning: it would never fall"
        yield Finding(("lr_scheduler_type",), reason, "use reduce_lr_on_plateau")
    if name in _WITHOUT_WARMUP and train.warmup_steps:
        yield Finding(
            ("warmup_steps", "lr_scheduler_type"), f"{name} has no warm-up: no effect", _WITHOUT_WARMUP[name]
        )
    if name in _CONSTANT and train.lr_scheduler_kwargs:
        yield Finding(("lr_scheduler_kwargs", "lr_scheduler_type"), f"{name} takes none: no effect", "remove it")


def _steps(train: "OwnTrainKeys") -> Iterator[Finding]:
    if train.max_steps == 0:
        yield Finding(("max_steps",), "0 steps train nothing", "write -1 to go by num_train_epochs")
    for key in ("logging_steps", "eval_steps", "save_steps", "warmup_steps"):
        steps = getattr(train, key)
        if steps is not None and steps > 1 and steps != int(steps):
            yield Finding((key,), f"{steps} is neither a whole number of steps nor a share below 1")
    if train.eval_strategy == "steps" and 0 < train.max_steps < train.eval_delay:
        reason = f"no evaluation would take place: the run has {train.max_steps} steps"
        yield Finding(("eval_delay", "max_steps"), reason, "lower it")
    if train.eval_strategy != "steps" and train.max_steps < 0 and train.num_train_epochs < train.eval_delay:
        reason = f"no evaluation would take place: the run has {train.num_train_epochs:g} epochs"
        yield Finding(("eval_delay", "num_train_epochs"), reason, "lower it")


def _recomputation(train: "OwnTrainKeys") -> Iterator[Finding]:
    for key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        settings = getattr(train, key) or {}
        for name, value in settings.items():
            if name == "selective":
                reason = "TRL's selective does not reach the layers, or stops the run, with recent Transformers"
                yield Finding((key,), reason, "remove it, and set checkpointing: selective")
            elif name == "use_reentrant" and value is not False:
                reason = "use_reentrant gives a layer no gradients if its input needs none: most of a vision adapter"
                yield Finding((key,), reason, "write use_reentrant: false, or set checkpointing in its place")
            elif name != "use_reentrant":
                yield Finding((key,), f"{name} is not for a recipe to set", "set checkpointing in its place")
    old, new = train.gradient_checkpointing, train.activation_checkpointing
    if "gradient_checkpointing" in train.model_fields_set and new not in (None, old):
        reason = "two names of one field, with different values"
        yield Finding(
            ("activation_checkpointing", "gradient_checkpointing"), reason, "remove one, or set checkpointing"
        )


def _reporting(train: "OwnTrainKeys") -> Iterator[Finding]:
    wanted = train.report_to if isinstance(train.report_to, tuple) else (train.report_to,)
    several = len(wanted) > 1 and [name for name in ("none", "all") if name in wanted]
    if several:
        yield Finding(("report_to",), f"{several[0]} stands alone", f"remove {several[0]}, or all others")
