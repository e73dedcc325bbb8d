"""Bytes on each of several cards that share a model: what is sharded, and what is gathered of it at a time.

| | weights | gradients, masters, optimizer states |
|---|---|---|
| fsdp | a part of each; a layer and the next one are gathered in 16 bits | a part of each |
| zero2 | all, in 16 bits | all gradients in 16 bits; of the rest a part |
| zero3 | a part of each; a layer is gathered | a part of each |

Those of `zero2` and `zero3` follow DeepSpeed's estimators (`estimate_zero2_model_states_mem_needs`: 4 bytes a weight
and 16 shared; `estimate_zero3_model_states_mem_needs`: 18 shared, and 4 for each weight of the largest layer), with
the bytes of the optimizer in question. Those of `fsdp` are what PyTorch's FSDP2 allocates; they were not measured.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import nn

from finetune.memory.optimizer import StateBytes, optimizer_states
from finetune.memory.weights import component_with_head
from finetune.model.components import published_name
from finetune.model.masters import MASTER

WAYS = ("fsdp", "zero2", "zero3")


@dataclass(frozen=True)
class Sharding:
    """How cards share a model.

    Attributes:
        way: fsdp, zero2 or zero3.
        cards: one process each.
    """

    way: str
    cards: int


@dataclass(frozen=True)
class SharedBytes:
    """Bytes on each card.

    Attributes:
        weights: by component, float32 masters among them.
        gradients: of all trained weights.
        states: of the optimizer.
        gathered: what is made whole of weights at a time, at most.
        exchanged: gradients that are made beside it in backward, until each card has its part of them.
        largest: of the largest tensor, whole.
    """

    weights: Counter[str]
    gradients: int
    states: StateBytes
    gathered: int
    exchanged: int
    largest: int


def sharding_of(way: str, cards: int) -> Sharding | None:
    """How a run shares its model over this many cards; None where each has all of it.

    Args:
        way: `train.parallel`, settled.
    """
    return Sharding(way, cards) if cards > 1 and way in WAYS else None


def shared_bytes(
    model: nn.Module, sharding: Sharding, optim: str, device_type: str, rounds_to: torch.dtype | None
) -> SharedBytes:
    """What each card has of a model.

    Args:
        model: as it is trained, with values or on the meta device.
        optim: as in TRL's `SFTConfig`.
        device_type: cuda or cpu.
        rounds_to: of float32 masters.
    """
    cards, zero2 = sharding.cards, sharding.way == "zero2"
    weights: Counter[str] = Counter()
    groups: dict[str, _Group] = {}
    gradients = largest = 0
    shards = []
    for name, tensor in _tensors(model):
        computed = rounds_to.itemsize if rounds_to is not None and tensor.requires_grad else tensor.itemsize
        part = _part(tensor, cards)
        if not isinstance(tensor, nn.Parameter):
            weights[component_with_head(name)] += tensor.nbytes
            continue
        largest = max(largest, tensor.nbytes)
        if sharding.way == "fsdp":
            weights[component_with_head(name)] += part.nbytes
        else:
            # DeepSpeed keeps what computes beside the masters.
            weights[component_with_head(name)] += (tensor.numel() if zero2 else part.numel()) * computed
        group = groups.setdefault(_group_of(name), _Group())
        group.gathered += tensor.numel() * computed
        if tensor.requires_grad:
            shards.append(part)
            gradients += part.numel() * MASTER.itemsize
            group.exchanged += tensor.numel() * (computed + MASTER.itemsize)
            if sharding.way != "fsdp":
                weights["masters"] += part.numel() * MASTER.itemsize
            if zero2:
                gradients += tensor.numel() * computed
    states = optimizer_states(optim, shards, device_type)
    if sharding.way == "fsdp":
        fullest = max(groups.values(), key=lambda group: group.gathered + group.exchanged)
        # The next layer is gathered while one is computed. Neither the embeddings nor the head are next to the other.
        following = max((group.gathered for name, group in groups.items() if name not in ENDS), default=0)
        # A layer is gathered into a buffer, and copied from there.
        gathered = fullest.gathered + max(fullest.gathered, following)
        return SharedBytes(weights, gradients, states, gathered, fullest.exchanged, largest)
    layer = max(group.gathered for group in groups.values())
    gathered = 0 if zero2 else 2 * layer
    return SharedBytes(weights, gradients, states, gathered, 0, largest)


@dataclass
class _Group:
    """What is gathered together: bytes of weights in the computing dtype, and of their gradients in it and, for the
    exchange, in float32."""

    gathered: int = 0
    exchanged: int = 0


ENDS = ("embeddings", "head")
_LAYERS = ("transformer.h.", "transformer.visual.transformer.resblocks.")


def _group_of(name: str) -> str:
    """As `training.sharded_model.share` groups parameters: each block by itself, the resampler, the ends, the rest."""
    name = published_name(name)
    for layers in _LAYERS:
        if name.startswith(layers):
            return layers + name.removeprefix(layers).partition(".")[0]
    if name.startswith("transformer.visual.attn_pool."):
        return "resampler"
    if name.startswith("transformer.wte."):
        return "embeddings"
    return "head" if name.startswith(("lm_head.", "transformer.ln_f.")) else "rest"


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _part(tensor: torch.Tensor, cards: int) -> torch.Tensor:
    """A card's part, which is of whole rows."""
    if not tensor.ndim:
        return tensor.detach().to("meta")
    return torch.empty(ceil(tensor.shape[0] / cards), *tensor.shape[1:], dtype=tensor.dtype, device="meta")
