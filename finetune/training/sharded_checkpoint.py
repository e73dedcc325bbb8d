"""Checkpoints of a model that processes share: each writes its part, and any number of processes reads them.

    shards/                   weights and optimizer states, by PyTorch's `torch.distributed.checkpoint`
    optimizer_groups.json     the settings of the optimizer's groups, and which parameters are in each

That is for training in full. An adapter is small: its checkpoints are whole, in the files that one process writes
(adapter_model.safetensors, optimizer.pt). Either kind is read by a run of one process, of several that have the model
each, and of several that share it.

A tensor that is stored in parts has its name from here: `model.` and its name in the model, or `optimizer.`, the name
of the parameter, and the name of the state (`exp_avg`).
"""

import json
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from finetune.errors import Failed, UserError
from finetune.files.shards import MODEL, SHARDS, read_stored, stored_forms
from finetune.training.sharded_model import BESIDE_ADAPTER, spread

GROUPS = "optimizer_groups.json"
OPTIMIZER, ADAPTER = "optimizer.pt", "adapter_model.safetensors"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"

STATES = "optimizer."


def is_sharded(folder: str | Path) -> bool:
    """Whether a checkpoint is stored in parts."""
    return (Path(folder) / SHARDS).is_dir()


def save_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, is_main: bool) -> None:
    """Write weights and optimizer states, each process its part; a collective call.

    Args:
        folder: the checkpoint's, the same one for all processes.
    """
    # First, as it drops what an evaluation has left gathered: the model's parameters are the optimizer's again.
    tensors = {f"{MODEL}{name}": tensor for name, tensor in model.state_dict().items()}
    names = _names(model)
    for parameter, states in optimizer.state.items():
        tensors |= {f"{STATES}{names[parameter]}.{key}": state for key, state in _tensors_of(states)}
    dcp.save(tensors, storage_writer=FileSystemWriter(folder / SHARDS), no_dist=not dist.is_initialized())
    if is_main:
        groups = [
            {**group, "params": [names[parameter] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        (folder / GROUPS).write_text(json.dumps(groups, indent=1) + "\n", encoding="utf-8")


def load_sharded_weights(folder: Path, model: nn.Module) -> None:
    """Read weights that `save_shards` wrote, into a model that is shared or not; a collective call where there are
    several processes.

    Raises:
        UserError: the checkpoint is of another model, or damaged.
    """
    _load(folder, {f"{MODEL}{name}": tensor for name, tensor in model.state_dict().items()})


def load_sharded_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As `load_sharded_weights`, the optimizer's states and the settings of its groups.

    Args:
        optimizer: of the model's parameters, in the groups that it had.

    Raises:
        UserError: the checkpoint is of another model or optimizer, or damaged.
    """
    names = _names(model)
    groups = json.loads((folder / GROUPS).read_text(encoding="utf-8"))
    if [group["params"] for group in groups] != [[names[one] for one in g["params"]] for g in optimizer.param_groups]:
        raise UserError(f"{folder} is a checkpoint of another optimizer: its groups have other parameters")
    numbers = count()
    for group in groups:
        group |= {key: tuple(value) for key, value in group.items() if isinstance(value, list)}
        group["params"] = [next(numbers) for _ in group["params"]]
    forms = _stored_states(folder)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        number: {key: _room(parameter, form) for key, form in forms[names[parameter]].items()}
        for number, parameter in enumerate(parameters)
        if names[parameter] in forms
    }
    _load(
        folder,
        {
            f"{STATES}{names[parameters[number]]}.{key}": state
            for number, by_key in states.items()
            for key, state in by_key.items()
        },
    )
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _load(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    read_stored(folder, tensors, alone=not dist.is_initialized())


def _names(model: nn.Module) -> dict[torch.Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _tensors_of(states: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for key, state in states.items():
        if state is None:
            continue
        assert isinstance(state, torch.Tensor), f"an optimizer's {key} is no tensor"
        yield key, state


def _stored_states(folder: Path) -> dict[str, dict[str, TensorStorageMetadata]]:
    """Forms of the stored optimizer states, by parameter and state."""
    found: dict[str, dict[str, TensorStorageMetadata]] = {}
    for name, form in stored_forms(folder).items():
        if name.startswith(STATES):
            parameter, _, key = name.removeprefix(STATES).rpartition(".")
            found.setdefault(parameter, {})[key] = form
    return found


def _room(parameter: nn.Parameter, form: TensorStorageMetadata) -> torch.Tensor:
    """Memory for a state: shared like its parameter where it has that shape; whole if not, like a count of steps."""
    return _room_of(parameter, tuple(form.size), form.properties.dtype)


def _room_of(parameter: nn.Parameter, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if shape == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(shape, dtype=dtype)


# Whole checkpoints, of and into a model that processes share


def gather_optimizer(optimizer: torch.optim.Optimizer, *, is_main: bool) -> dict[str, Any] | None:
    """The optimizer's `state_dict` as it is in one process; a collective call.

    Returns:
        With tensors in host memory; None in other processes.
    """
    state = optimizer.state_dict()
    whole: dict[int, dict[str, Any]] = {}
    for number, states in state["state"].items():
        gathered = {}
        for key, one in states.items():
            full = one.full_tensor() if isinstance(one, DTensor) else one
            gathered[key] = full.cpu() if is_main and isinstance(full, torch.Tensor) else full
        if is_main:
            whole[number] = gathered
    return {**state, "state": whole} if is_main else None


@torch.no_grad()
def load_whole_weights(folder: Path, model: nn.Module, *, is_main: bool) -> None:
    """Read the weights that one process writes, in the main process, into a model that is shared; a collective call.

    Raises:
        UserError: they are of another model.
        Failed: they cannot be read, in other processes than the main one.
    """
    stored = _from_main(lambda: _read_weights(folder, model), is_main=is_main)
    forms = _from_main(lambda: [(name, tuple(one.shape)) for name, one in stored.items()], is_main=is_main, send=True)
    tensors = dict(model.state_dict())
    for name, shape in forms:
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape:
            raise UserError(f"{folder} is a checkpoint of another model: {name} is not in it, or of another shape")
        spread(stored[name] if is_main else None, tensor)


@torch.no_grad()
def load_whole_optimizer(folder: Path, optimizer: torch.optim.Optimizer, *, is_main: bool) -> None:
    """As `load_whole_weights`, the states of an optimizer.

    Raises:
        UserError: they are of another optimizer.
        Failed: they cannot be read, in other processes than the main one.
    """
    stored = _from_main(lambda: torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True), is_main=is_main)
    forms = _from_main(lambda: _forms_of(stored), is_main=is_main, send=True)
    if [len(group["params"]) for group in forms["groups"]] != [len(g["params"]) for g in optimizer.param_groups]:
        raise UserError(f"{folder} is a checkpoint of another optimizer: its groups have other parameters")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, torch.Tensor]] = {}
    for number, by_key in forms["states"].items():
        states[number] = {}
        for key, (shape, dtype) in by_key.items():
            states[number][key] = room = _room_of(parameters[number], shape, dtype)
            spread(stored["state"][number][key] if is_main else None, room)
    optimizer.load_state_dict({"state": states, "param_groups": forms["groups"]})


def _from_main(make: Any, *, is_main: bool, send: bool = False) -> Any:
    """What the main process makes, there; and in the others, with `send`. All fail where it does."""
    box: list[Any] = [None]
    made = None
    if is_main:
        try:
            made = make()
            box = [(made,) if send else ()]
        finally:
            dist.broadcast_object_list(box)
        return made
    dist.broadcast_object_list(box)
    if box[0] is None:
        raise Failed("the first process could not read the checkpoint: it says why")
    return box[0][0] if send else None


def _read_weights(folder: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """A checkpoint's weights, by the names that they have in the model."""
    if isinstance(model, PeftModel):
        # PEFT leaves the adapter's name out in its files.
        trained = {name for name, one in model.named_parameters() if one.requires_grad}
        named = {n: one for n, one in model.state_dict().items() if n in trained or BESIDE_ADAPTER in n}
        names = {id(one): name for name, one in named.items()}
        saved = get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)
        in_file = {key: names[id(one)] for key, one in saved.items()}
        read = load_file(folder / ADAPTER)
        if read.keys() != in_file.keys():
            raise UserError(f"{folder / ADAPTER} is of another adapter than the recipe's")
        return {in_file[key]: one for key, one in read.items()}
    if not (folder / WEIGHTS_INDEX).is_file():
        return load_file(folder / WEIGHTS)
    files = set(json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    return {name: one for file in sorted(files) for name, one in load_file(folder / file).items()}


def _forms_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    states = {
        number: {key: (tuple(one.shape), one.dtype) for key, one in states.items() if isinstance(one, torch.Tensor)}
        for number, states in stored["state"].items()
    }
    return {"groups": stored["param_groups"], "states": states}


def bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer without Accelerate's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
