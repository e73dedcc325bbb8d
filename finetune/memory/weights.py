"""Exact bytes of weights, gradients and optimizer states, from the shapes of the model as it is trained."""

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import GenerationConfig

from finetune.errors import UserError
from finetune.memory.optimizer import StateBytes, optimizer_states
from finetune.model.adapters import TrainableModel, trains_embeddings
from finetune.model.base import shape_model
from finetune.model.components import component_of, published_name
from finetune.model.lora_products import multiply_as_peft
from finetune.recipe import Adapter, Freeze, Recipe
from qwenvl import QwenVLConfig
from qwenvl.loading import DTYPES
from qwenvl.model.host_embedding import HostEmbedding
from qwenvl.model.nf4_weights import is_quantized, quant_state
from qwenvl.model.quantization import quantized_parts

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model.

    Attributes:
        device: on the device, by component (`components.COMPONENTS`, with the head apart).
        host: of embeddings that stay in host memory.
        gradients: of all trained parameters.
        staged: of the largest weight that is read in 16 bits and quantised on the device, the head apart; 0 for none.
        largest: of the largest tensor.
    """

    device: Counter[str]
    host: int
    gradients: int
    staged: int
    largest: int


def weights_dtype(recipe: Recipe, config: QwenVLConfig, device_type: str) -> torch.dtype:
    """The dtype that weights are loaded in: as `computing.choose_dtype`, but bfloat16 on every CUDA device."""
    if recipe.model.dtype != "auto":
        return DTYPES[recipe.model.dtype]
    if device_type == "cuda":
        return torch.bfloat16
    return getattr(torch, str(config.dtype).removeprefix("torch.")) if config.dtype is not None else torch.float32


def settle_embeddings(recipe: Recipe, generation_config: GenerationConfig | None) -> Recipe:
    """Settle `adapter.train_embeddings: auto`; false if the generation config does not say."""
    if recipe.adapter is None or recipe.adapter.train_embeddings != "auto":
        return recipe
    try:
        trained = trains_embeddings("auto", generation_config)
    except UserError:
        trained = False
    return recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"train_embeddings": trained})})


def model_of_shapes(
    recipe: Recipe, config: QwenVLConfig, device_type: str, *, as_peft: bool = False
) -> TrainableModel:
    """The model as it will be trained, on the meta device. Models are cached by what decides their shapes.

    Args:
        as_peft: its adapters multiply as PEFT does it: see `model.lora_products`.

    Raises:
        UserError: the model cannot be trained as the recipe says.
    """
    recipe = settle_embeddings(recipe, None)
    parts = quantized_parts(config) or (recipe.model.quantize if recipe.model.quantization == "nf4" else ())
    dtype = weights_dtype(recipe, config, device_type)
    embeddings_on_cpu, config_json = recipe.model.embeddings_on_cpu, config.to_json_string()
    return _model_of_shapes(
        _Wanted(
            embeddings_on_cpu, recipe.adapter, recipe.freeze, tuple(parts), dtype, config_json, as_peft, recipe, config
        )
    )


@dataclass(frozen=True)
class _Wanted:
    """What decides a model's shapes, and `recipe` and `config` to make it from."""

    embeddings_on_cpu: bool
    adapter: Adapter | None
    freeze: Freeze
    parts: tuple[str, ...]
    dtype: torch.dtype
    config_json: str
    as_peft: bool
    recipe: Recipe = field(compare=False)
    config: QwenVLConfig = field(compare=False)


@lru_cache(maxsize=8)
def _model_of_shapes(wanted: _Wanted) -> TrainableModel:
    # A copy: the plan sets the attention implementation in it.
    config = QwenVLConfig.from_dict(wanted.config.to_dict())
    model = shape_model(wanted.recipe, config, wanted.parts, dtype=wanted.dtype)
    if wanted.as_peft:
        multiply_as_peft(model)
    return model


def weight_bytes(model: nn.Module) -> WeightBytes:
    """Bytes of a model as it is trained, with values or on the meta device. Shared tensors count once.

    4-bit weights count with bitsandbytes' quantisation state: the 8-bit magnitudes of blocks, the magnitudes of blocks
    of these, and three small tables.
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
        device[component_with_head(name)] += tensor.nbytes
        if tensor.requires_grad:
            gradients += tensor.nbytes
    for name, module in model.named_modules():
        if is_quantized(module) and id(module) not in seen:
            seen.add(id(module))
            state = quant_state(module)
            device[component_with_head(f"{name}.weight")] += _bytes_of_state(state)
            if published_name(name) != "lm_head":  # it is read first, when nothing else is on the device yet
                staged = max(staged, state.shape.numel() * state.dtype.itemsize)
    return WeightBytes(device, host, gradients, staged, largest)


def state_bytes(model: nn.Module, optim: str, device_type: str) -> StateBytes:
    """Bytes of the optimizer over all trained parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return optimizer_states(optim, trained, device_type)


def component_with_head(name: str) -> str:
    """The component of a parameter (`components.COMPONENTS`), with the head apart from the embeddings."""
    component = component_of(name)
    return "head" if component == "embeddings" and published_name(name).startswith("lm_head.") else component


def _bytes_of_state(state: "QuantState") -> int:
    tensors = [state.absmax, state.code, state.offset]
    nested = _bytes_of_state(state.state2) if state.state2 is not None else 0
    return nested + sum(tensor.nbytes for tensor in tensors if tensor is not None)
