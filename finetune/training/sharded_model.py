"""A model that processes share by FSDP2: read once, shared out from the first process, and gathered to be saved.

Each process of a node reading a checkpoint of 19 GB would take eight times 19 GB of host memory. Here the first one
reads it; the others make a model of the same form, whose memory is never written to and therefore not used. Then each
layer becomes a shard on every process, and the values follow tensor by tensor.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from finetune.errors import Failed
from finetune.model.adapters import TrainableModel
from finetune.run.agreement import group_device
from qwenvl.model.pretrained import QwenVLPreTrainedModel

ROUNDS_TO = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Accelerate's names of what float32 masters are rounded to where they are gathered."""

BESIDE_ADAPTER = ".modules_to_save."
"""In the names of components that PEFT saves as a whole, with what is frozen in them."""

Forms = list[tuple[str, tuple[int, ...], torch.dtype, bool]]
"""Name, shape, type of each tensor of a model, and whether it is trained."""


def load_once(
    read: Callable[[], TrainableModel], shape: Callable[[], TrainableModel], *, is_main: bool
) -> TrainableModel:
    """Load a model in the first process, and make the other processes' ones of the same form; a collective call.

    Args:
        read: loads the model; called in the first process.
        shape: makes it on the meta device; called in the others.

    Raises:
        InputError: it cannot be loaded; in the first process.
        Failed: the same, in the others.
    """
    box: list[Any] = [None]
    if is_main:
        try:
            model = read()
            box = [_forms(model)]
        finally:
            # After a failure the others must not wait for it.
            dist.broadcast_object_list(box)
        return model
    model = shape()
    dist.broadcast_object_list(box)
    if box[0] is None:
        raise Failed("the first process could not load the model: it says why")
    return _without_values(model, box[0])


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name; a tensor that has two names comes once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _forms(model: nn.Module) -> Forms:
    return [(name, tuple(one.shape), one.dtype, one.requires_grad) for name, one in _tensors(model)]


def _without_values(model: TrainableModel, forms: Forms) -> TrainableModel:
    """A model on the meta device as one in host memory, of the given form, whose values are not set."""
    names = [name for name, _ in _tensors(model)]
    assert names == [name for name, *_ in forms], "all processes make the same model"
    model.to_empty(device="cpu")
    for (_, tensor), (_, shape, dtype, is_trained) in zip(_tensors(model), forms, strict=True):
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            tensor.data = torch.empty(shape, dtype=dtype)
        tensor.requires_grad_(is_trained)
    return model


def share(
    accelerator: Accelerator, model: TrainableModel, optimizer: torch.optim.Optimizer
) -> tuple[TrainableModel, torch.optim.Optimizer]:
    """Share a model out: each process gets its part of every tensor, with the first process's values.

    Groups that are gathered together are a block of the language model or of the vision transformer, the resampler,
    the embeddings, the final norm with the head (the loss uses the head's matrix without calling it, right after the
    norm), and the rest.

    Args:
        accelerator: with an FSDP plugin of version 2.
        model: as `load_once` gives it.
        optimizer: of its parameters.

    Returns:
        The same model, and the optimizer as Accelerate wraps it, of the shards.
    """
    values = {name: one.detach() for name, one in _tensors(model)} if accelerator.is_main_process else None
    there = {type(module).__name__ for module in model.modules()}
    layers = [name for name in QwenVLPreTrainedModel._no_split_modules or () if name in there]
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = layers
    # An adapter is computed in float32 beside a 16-bit base: each tensor is gathered as it is.
    rounds_to = None if isinstance(model, PeftModel) else ROUNDS_TO[accelerator.mixed_precision]
    # Not Accelerate's own: gradients are summed in float32, as in one process, and what the model computes in float32
    # (rotary positions, the loss) stays float32.
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=rounds_to, reduce_dtype=None if rounds_to is None else torch.float32, cast_forward_inputs=False
    )
    # The resampler's output is a view, on which nothing works in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPResampler\) returned a view tensor")
    model, optimizer = accelerator.prepare(model, optimizer)
    fill_from_main(model, values)
    register_fsdp_forward_method(model, "generate")
    return model, optimizer


@torch.no_grad()
def fill_from_main(model: nn.Module, values: Mapping[str, torch.Tensor] | None) -> None:
    """Set the shards of a model to the first process's values, one tensor at a time; a collective call.

    Args:
        values: all of the model's tensors by name, whole; None in other processes.
    """
    for name, tensor in _tensors(model):
        spread(None if values is None else values[name], tensor)


@torch.no_grad()
def spread(whole: torch.Tensor | None, into: torch.Tensor) -> None:
    """Set a tensor, shared or on each process, to the first process's values; a collective call.

    Args:
        whole: the values; None in other processes.
    """
    values = torch.empty(into.shape, dtype=into.dtype, device=group_device())
    if whole is not None:
        values.copy_(whole)
    if isinstance(into, DTensor):
        part = distribute_tensor(values, into.device_mesh, into.placements, src_data_rank=0)
        into.to_local().copy_(part.to_local())
    else:
        dist.broadcast(values, src=0)
        into.copy_(values)


def gather(
    model: nn.Module, *, is_main: bool, trained_only: bool, rounds_to: torch.dtype | None = None
) -> dict[str, torch.Tensor] | None:
    """The tensors of a shared model, whole, in the first process's host memory; a collective call.

    One tensor at a time is on the devices.

    Args:
        trained_only: leave out what is frozen, as it is not saved with an adapter.
        rounds_to: dtype of what is returned; None leaves each as it is.

    Returns:
        By name; None in other processes.
    """
    gathered: dict[str, torch.Tensor] = {}
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    for name, tensor in model.state_dict().items():
        if trained_only and not (name in trained or BESIDE_ADAPTER in name):
            continue
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_main:
            gathered[name] = whole.detach().to("cpu", rounds_to, copy=not isinstance(tensor, DTensor))
    return gathered if is_main else None
