"""How the processes of a run share the work: settled from the recipe and the launcher before anything is loaded.

| `train.parallel` | of the model each GPU has |
|---|---|
| none | all of it; there is one process |
| ddp | all of it; gradients are averaged once a step |
| fsdp | a part of every weight, gradient and optimizer state (PyTorch's FSDP2); layers are gathered when they run |
| zero2 | all weights, a part of the gradients and optimizer states (DeepSpeed) |
| zero3 | as fsdp, by DeepSpeed |
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal, get_args

from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from trl import SFTConfig

from finetune.errors import UserError
from finetune.recipe import Recipe, Train
from finetune.recipe.checks import what_cannot_be_shared
from finetune.run.launch import launched_processes
from finetune.training.zero_config import refuse_config, zero_config, zero_stage

Way = Literal["none", "ddp", "fsdp", "zero2", "zero3"]

TORCHRUN = "start it with `torchrun --nproc-per-node N -m finetune RECIPE`"


@dataclass(frozen=True)
class Launch:
    """What started this process.

    Attributes:
        processes: of the run.
        plugin: what the configuration of `accelerate launch` asks for: fsdp, zero2, zero3 or something that is not
            supported; empty where it asks for nothing, or another launcher started the process.
        unsupported: settings of that configuration which this trainer does not follow, in words.
    """

    processes: int = 1
    plugin: str = ""
    unsupported: tuple[str, ...] = ()

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Launch":
        """As the launcher's variables in an environment say."""

        def says(name: str) -> bool:
            return environment.get(name, "").lower() in ("true", "1", "yes")

        processes = int(environment.get("WORLD_SIZE") or 1)
        if says("ACCELERATE_USE_FSDP"):
            version = environment.get("FSDP_VERSION") or "1"
            unsupported = [] if version == "2" else [f"fsdp_version: {version}"]
            unsupported += ["fsdp_offload_params: true"] if says("FSDP_OFFLOAD_PARAMS") else []
            unsupported += ["fsdp_activation_checkpointing: true"] if says("FSDP_ACTIVATION_CHECKPOINTING") else []
            return cls(processes, "fsdp", tuple(unsupported))
        if says("ACCELERATE_USE_DEEPSPEED"):
            stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") or "2"
            return cls(processes, f"zero{stage}")
        for name, words in (
            ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
            ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config"),
        ):
            if says(name):
                return cls(processes, words)
        return cls(processes)


@dataclass(frozen=True)
class Parallel:
    """How a run is shared out.

    Attributes:
        way: as the table above.
        note: what a reader of the recipe would not expect; empty if there is nothing.
    """

    way: Way = "none"
    note: str = ""

    @property
    def shards(self) -> bool:
        """Whether no process has the whole model, so that every forward and backward needs all processes."""
        return self.way in ("fsdp", "zero3")

    @property
    def zero_stage(self) -> int:
        """The stage of DeepSpeed's ZeRO; 0 without it."""
        return int(self.way.removeprefix("zero")) if self.way in ("zero2", "zero3") else 0


def settle_parallel(train: Train, launch: Launch) -> Parallel:
    """How the processes share the work.

    Raises:
        UserError: recipe and launcher disagree, or ask for what is not supported.
    """
    if launch.plugin and launch.plugin not in get_args(Way):
        raise UserError(
            f"the configuration of accelerate launch asks for {launch.plugin}, which training does not support: "
            f"{TORCHRUN}, and choose train.parallel: ddp, fsdp, zero2 or zero3"
        )
    if launch.unsupported:
        raise UserError(
            f"the configuration of accelerate launch says {', '.join(launch.unsupported)}, which training does not "
            f"follow: it shares the model by FSDP2, on the GPUs. Set fsdp_version: 2 there and take the rest out; or "
            f"{TORCHRUN} and train.parallel: fsdp"
        )
    wanted = asked_for(train) or launch.plugin or "ddp"
    if launch.plugin and wanted != launch.plugin:
        raise UserError(
            f"train.parallel is {wanted}, and the configuration of accelerate launch asks for {launch.plugin}: take "
            f"one of them out, or {TORCHRUN}"
        )
    if launch.processes == 1:
        if wanted in ("none", "ddp"):
            return Parallel()
        return Parallel("none", f"{wanted} has nothing to share in one process: this trains as on one card")
    if wanted == "none":
        raise UserError(
            f"train.parallel: none is for one process, and the launcher started {launch.processes}: start the command "
            "without a launcher, or set train.parallel: auto, ddp or fsdp"
        )
    assert wanted in get_args(Way)
    return Parallel(wanted)  # type: ignore[arg-type]  # one of them, as the line above says


def asked_for(train: Train) -> str:
    """What the recipe asks for; empty where it leaves it to the launcher."""
    if train.parallel != "auto":
        return train.parallel
    if train.fsdp:
        return "fsdp"
    return "" if train.deepspeed is None else f"zero{zero_stage(train.deepspeed)}"


def refuse_impossible(recipe: Recipe, parallel: Parallel) -> None:
    """Refuse what cannot be trained this way, before anything is loaded.

    Raises:
        UserError: with what to do instead.
    """
    way, train = parallel.way, recipe.train
    if way in ("zero2", "zero3") and find_spec("deepspeed") is None:
        raise UserError(
            f"train.parallel: {way} needs the package deepspeed, which is not installed: pip install deepspeed, or "
            "set train.parallel: fsdp, which needs nothing"
        )
    if parallel.zero_stage and train.deepspeed is not None:
        refuse_config(train.deepspeed, parallel.zero_stage)
    if way not in ("fsdp", "zero2", "zero3"):
        return
    for finding in what_cannot_be_shared(recipe.model, recipe.adapter, recipe.data, train, way):
        raise UserError(
            f"{finding.keys[0]} does not go with train.parallel: {way}: {finding.reason}. {finding.remedy}"
        )


def parallel_arguments(parallel: Parallel, given: Mapping[str, Any], *, has_adapter: bool = False) -> dict[str, Any]:
    """The fields of `SFTConfig` that follow.

    Args:
        given: those that the recipe sets.
        has_adapter: whether an adapter is trained.
    """
    rest = {name: value for name, value in given.items() if name not in ("fsdp", "fsdp_config", "deepspeed")}
    if parallel.way == "fsdp":
        config = {name.removeprefix("fsdp_"): value for name, value in (given.get("fsdp_config") or {}).items()}
        return {
            **rest,
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "reshard_after_forward": config.get("reshard_after_forward", True),
                "state_dict_type": "SHARDED_STATE_DICT",
                # Not Accelerate's own, which takes every buffer for a shard: see `sharded_model.fill_from_main`.
                "cpu_ram_efficient_loading": False,
            },
        }
    if parallel.way in ("zero2", "zero3"):
        config = zero_config(parallel.zero_stage, given.get("deepspeed"), has_adapter=has_adapter)
        return {**rest, "deepspeed": config}
    return rest


def require_applied(parallel: Parallel, arguments: SFTConfig) -> None:
    """Check that Accelerate applies what was asked for; for FSDP, on some devices, it does not, and says nothing.

    Makes Accelerate's state, which is one for the process: the trainer's Accelerator takes it over.

    Raises:
        UserError: it would train in another way.
    """
    if parallel.way == "fsdp":
        plugin = FullyShardedDataParallelPlugin(**(arguments.fsdp_plugin_args or {}))
        accelerator = Accelerator(mixed_precision=arguments.mixed_precision, fsdp_plugin=plugin)
        is_applied = accelerator.distributed_type == DistributedType.FSDP
    else:
        # The trainer's Accelerator may still say that it is, and then train without it.
        state = arguments.distributed_state
        is_applied = not parallel.zero_stage or state.distributed_type == DistributedType.DEEPSPEED
    if not is_applied:
        raise UserError(
            f"train.parallel: {parallel.way} is not applied by Accelerate on this kind of device "
            f"({arguments.device.type}), which would train by ddp. Use GPUs, or set train.parallel: ddp"
        )


def own_launch() -> Launch:
    """What started this process, by its environment."""
    # A lone WORLD_SIZE, which a check takes, starts no others.
    return replace(Launch.of(os.environ), processes=launched_processes())
