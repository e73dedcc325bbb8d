"""Bytes of what a run holds throughout: weights, what is trained, gradients, optimizer states. Exact, by shapes."""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from transformers import GenerationConfig

from finetune.memory.optimizer import StateBytes, optimizer_states
from finetune.model.adapters import trains_embeddings
from finetune.model.base import shape_model
from finetune.model.components import component_of, published_name
from finetune.recipe import Recipe
from qwenvl import QwenVLConfig
from qwenvl.loading import DTYPES
from qwenvl.model.host_embedding import HostEmbedding
from qwenvl.model.nf4_weights import is_quantized
from qwenvl.model.quantization import quantized_parts


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model.

    Attributes:
        device: by component (`components.COMPONENTS`), on the device.
        host: that stay in host memory.
        gradients: of all that is trained.
        staged: of the largest weight that comes in 16 bits and is then made 4-bit, the head apart; 0 where none is.
        largest: of the largest tensor.
    """

    device: Counter[str]
    host: int
    gradients: int
    staged: int
    largest: int


def weights_dtype(recipe: Recipe, config: QwenVLConfig, device_type: str) -> torch.dtype:
    """What weights are loaded in: as `model_choices.choose_dtype`, and bfloat16 on any CUDA device."""
    if recipe.model.dtype != "auto":
        return DTYPES[recipe.model.dtype]
    if device_type == "cuda":
        return torch.bfloat16
    return getattr(torch, str(config.dtype).removeprefix("torch.")) if config.dtype is not None else torch.float32


def settle_embeddings(recipe: Recipe, generation_config: GenerationConfig | None) -> Recipe:
    """The recipe with what its `adapter.train_embeddings: auto` comes to; where the checkpoint does not say: false."""
    if recipe.adapter is None or recipe.adapter.train_embeddings != "auto":
        return recipe
    holder = nn.Module()
    holder.generation_config = generation_config
    try:
        trained = trains_embeddings("auto", holder)
    except ValueError:
        trained = False
    return recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"train_embeddings": trained})})


def model_of_shapes(recipe: Recipe, config: QwenVLConfig, device_type: str) -> nn.Module:
    """The model as it will be trained, on the meta device; one that was made before for the same is given again.

    Raises:
        ValueError: what is to be trained cannot be.
    """
    recipe = settle_embeddings(recipe, None)
    parts = quantized_parts(config) or (recipe.model.quantize if recipe.model.quantization == "nf4" else ())
    dtype = weights_dtype(recipe, config, device_type)
    key = (recipe.model.embeddings_on_cpu, recipe.adapter, recipe.freeze, parts, dtype, config.to_json_string())
    return _model_of_shapes(_Key(key, recipe, config))


@dataclass(frozen=True)
class _Key:
    """What decides a model's shapes, and what it is made of."""

    key: tuple
    recipe: Recipe
    config: QwenVLConfig

    def __eq__(self, other) -> bool:
        return self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(maxsize=8)
def _model_of_shapes(wanted: _Key) -> nn.Module:
    _, _, _, parts, dtype, _ = wanted.key
    # A config of its own: which attention computes is set there.
    config = QwenVLConfig.from_dict(wanted.config.to_dict())
    return shape_model(wanted.recipe, config, tuple(parts), dtype=dtype)


def weight_bytes(model: nn.Module) -> WeightBytes:
    """Bytes of a model as it is trained, real or of shapes; each storage once.

    4-bit weights with all that bitsandbytes holds beside their codes: the blocks' magnitudes, in 8 bits, with those
    of their own blocks, and three small tables.
    """
    device: Counter[str] = Counter()
    host = gradients = staged = largest = 0
    on_host = {id(module.weight) for module in model.modules() if isinstance(module, HostEmbedding)}
    seen: set[int] = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        largest = max(largest, tensor.nbytes)
        if id(tensor) in on_host:
            host += tensor.nbytes
            continue
        device[_component(name)] += tensor.nbytes
        if tensor.requires_grad:
            gradients += tensor.nbytes
    for name, module in model.named_modules():
        if is_quantized(module) and id(module) not in seen:
            seen.add(id(module))
            state = module.weight.quant_state
            device[_component(f"{name}.weight")] += _bytes_of_state(state)
            if published_name(name) != "lm_head":  # the first that is read, when there is nothing else yet
                staged = max(staged, state.shape.numel() * state.dtype.itemsize)
    return WeightBytes(device, host, gradients, staged, largest)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def state_bytes(model: nn.Module, optim: str, device_type: str) -> StateBytes:
    """Of the optimizer over all that is trained."""
    return optimizer_states(optim, trained_parameters(model), device_type)


def _component(name: str) -> str:
    component = component_of(name)
    return "head" if component == "embeddings" and published_name(name).startswith("lm_head.") else component


def _bytes_of_state(state) -> int:
    tensors = [state.absmax, state.code, state.offset]
    nested = _bytes_of_state(state.state2) if state.state2 is not None else 0
    return nested + sum(tensor.nbytes for tensor in tensors if tensor is not None)
