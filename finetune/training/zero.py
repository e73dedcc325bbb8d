"""A model that processes share by DeepSpeed's ZeRO: shared out, gathered to be saved, and its checkpoints.

Stage 2 leaves all weights on every process, and shares gradients and optimizer; stage 3 shares the weights too. Either
reduces gradients while they are computed, so that every process runs the same forwards and backwards.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import nn
from transformers.integrations.deepspeed import deepspeed_config, set_hf_deepspeed_config, unset_hf_deepspeed_config
from trl import SFTConfig

from finetune.errors import UserError
from finetune.model.adapters import TrainableModel, without_adapter
from finetune.run.launch import launched_processes
from finetune.training.parallel import Parallel
from finetune.training.sharded_model import BESIDE_ADAPTER

STATES = "global_step*/*_optim_states.pt"
"""DeepSpeed's optimizer states in a checkpoint: a file of each process that saved it."""


@contextlib.contextmanager
def loading_whole(arguments: SFTConfig) -> Iterator[None]:
    """Inside, models are loaded as without ZeRO-3. Where Transformers knows of it, which it does as soon as the
    trainer's configuration is made, loading is collective: every process reads the whole checkpoint."""
    if deepspeed_config() is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(arguments.hf_deepspeed_config)


def share_by_zero(
    accelerator: Accelerator, model: TrainableModel, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Share a model out, with the first process's values; a collective call.

    Args:
        accelerator: with a plugin of DeepSpeed's.
        model: on all processes; for stage 3, those of the others need no values.
        optimizer: of its parameters.

    Returns:
        DeepSpeed's engine, whose `module` is the model, and the optimizer as Accelerate wraps it.
    """
    # Twice for each layer and step: DeepSpeed calls collectives by names that PyTorch has newer ones for.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    plugin: Any = accelerator.state.deepspeed_plugin
    if plugin.zero_stage == 3:
        _partition(model, plugin, accelerator.device)
    engine, wrapped = accelerator.prepare(model, optimizer)
    if plugin.zero_stage == 3:
        _gather_head_first(model)
    # When training begins, Transformers frees what Accelerate has, and with it takes the engine's hooks off the model.
    accelerator.deepspeed_engine_wrapped = None
    return engine, wrapped


def train_with(accelerator: Accelerator, engine: nn.Module) -> None:
    """Let Accelerate know of an engine again: it asks it for the norm of the gradients."""
    accelerator.deepspeed_engine_wrapped = DeepSpeedEngineWrapper(engine)


def _partition(model: TrainableModel, plugin: Any, device: torch.device) -> None:
    """Make each parameter a part of it, one after the other.

    The engine would do it too, after all of the model is on every GPU.
    """
    from deepspeed.runtime.zero import Init  # not installed everywhere

    config = plugin.deepspeed_config
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(name, {}).get("enabled") is True:
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                value = buffer.to(device).contiguous()
                dist.broadcast(value, src=0)
                module._buffers[name] = value
    Init(module=model, config_dict_or_path=_without_auto(config))


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what the engine's preparation fills in."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value != "auto"
    }


def _gather_head_first(model: TrainableModel) -> None:
    """Gather the head's matrix for the whole forward, as the loss uses it without calling the head.

    Called, it would be gathered for each piece of the supervised positions, of which processes have different numbers.
    """
    from deepspeed.runtime.zero import register_external_parameter

    weight = without_adapter(model).lm_head.weight
    assert isinstance(weight, nn.Parameter), "the head is a matrix, or PEFT's trained copy of one"
    register_external_parameter(model, weight)


def backward(engine: Any, loss: torch.Tensor, *, is_last: bool) -> None:
    """Backward of one pack. After the last one of a step, `engine.step()` clips, steps and empties the gradients.

    Args:
        loss: its share of the step's loss.
        is_last: whether it is the last pack of a step.
    """
    engine.set_gradient_accumulation_boundary(is_last)
    # The loss is divided by the tokens of the whole step, so not by the number of batches.
    engine.backward(loss, scale_wrt_gas=False)


def gather_from_zero(model: nn.Module, *, is_main: bool, trained_only: bool) -> dict[str, torch.Tensor] | None:
    """The tensors of a shared model, whole, in the first process's host memory; a collective call.

    One tensor at a time is on the devices.

    Args:
        trained_only: leave out what is frozen, as it is not saved with an adapter.

    Returns:
        By name; None in other processes.
    """
    from deepspeed.runtime.zero import GatheredParameters

    gathered: dict[str, torch.Tensor] = {}
    stored = set(model.state_dict()) if is_main else set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if trained_only and not (parameter.requires_grad or BESIDE_ADAPTER in name):
            continue
        # Does nothing with a parameter that is whole.
        with GatheredParameters([parameter]):
            if is_main:
                gathered[name] = parameter.detach().to("cpu", copy=True)
    if not is_main:
        return None
    for name, buffer in model.named_buffers():
        if name in stored and (not trained_only or BESIDE_ADAPTER in name):
            gathered[name] = buffer.detach().to("cpu", copy=True)
    return gathered


def saved_by(checkpoint: Path) -> int:
    """The number of processes whose optimizer states a checkpoint has by DeepSpeed; 0 where it has none."""
    return len(list(checkpoint.glob(STATES)))


def refuse_other_checkpoint(checkpoint: Path, parallel: Parallel) -> None:
    """Check that a run can go on from a checkpoint in the way that it is shared out now.

    Args:
        checkpoint: to go on from.
        parallel: how the run is shared out now.

    Raises:
        UserError: it is DeepSpeed's and the run is not, or the other way round; or of another number of processes.
    """
    way, processes = parallel.way, launched_processes()
    then = saved_by(checkpoint)
    if not then and not parallel.zero_stage:
        return
    if not then:
        raise UserError(
            f"{checkpoint} was not saved by DeepSpeed, and train.parallel: {way} can go on from nothing else. Set "
            "train.parallel as it was, or give another output"
        )
    stage = 3 if list(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt")) else 2
    if way == f"zero{stage}" and then == processes:
        return
    raise UserError(
        f"{checkpoint} was saved by {then} processes with train.parallel: zero{stage}, each with its part of the "
        f"optimizer, and this is train.parallel: {way} with {processes}. Start {then} processes with zero{stage}; or "
        f"make a model of it to train from: `finetune merge {checkpoint.parent.parent} --checkpoint {checkpoint.name}`"
    )
