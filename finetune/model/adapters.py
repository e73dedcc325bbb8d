"""Put a LoRA adapter on the model, or train components in full."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GenerationConfig

from finetune.errors import UserError
from finetune.files.atomic_writes import write_text
from finetune.model.components import component_of, published_name
from finetune.model.lora_products import multiply_in_16_bits
from finetune.model.lora_targets import (
    VISION,
    find_language_targets,
    find_targets,
    refuse_idle_patterns,
    shortest,
)
from finetune.model.masters import make_masters
from finetune.model.parameter_groups import COPIES
from finetune.model.trained_biases import compute_in_stored_type
from qwenvl import QwenVLForConditionalGeneration
from qwenvl.checkpoint.adapter_files import ADAPTER_CONFIG
from qwenvl.model.host_embedding import HostEmbedding
from qwenvl.model.nf4_weights import is_quantized

if TYPE_CHECKING:
    from finetune.recipe import Adapter, Freeze

EMBEDDINGS = ("wte", "lm_head")

# The keys of an adapter's configuration that PEFT 0.7 knows: src/peft/config.py and src/peft/tuners/lora/config.py of
# its release 0.7.1.
KEYS_OF_PEFT_0_7 = frozenset(
    {
        *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
        *("r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save"),
        *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
        *("megatron_config", "megatron_core", "loftq_config"),
    }
)
# Initialisations that leave the base as it is: what a saved adapter computes does not depend on them.
FORGOTTEN_INITS = ("gaussian", "orthogonal")

TrainableModel = QwenVLForConditionalGeneration | PeftModel
"""A model with or without an adapter around it."""


def without_adapter(model: TrainableModel) -> QwenVLForConditionalGeneration:
    """Return the model inside PEFT's wrapper. LoRA layers that PEFT put into it stay."""
    if not isinstance(model, PeftModel):
        return model
    base = model.get_base_model()
    assert isinstance(base, QwenVLForConditionalGeneration), "adapters are put on nothing else"
    return base


def trains_embeddings(setting: bool | str, generation_config: GenerationConfig | None) -> bool:
    """Whether embeddings and head are trained beside the adapter.

    "auto" trains them for a base model, which never saw the ChatML tokens: its rows for them are untrained. Base and
    chat models are told apart by `chat_format` ("raw" or "chatml") in the generation config, not by their path.

    Raises:
        UserError: "auto", and the checkpoint does not say.
    """
    if setting != "auto":
        return bool(setting)
    chat_format = getattr(generation_config, "chat_format", None)
    if chat_format not in ("raw", "chatml"):
        raise UserError(
            "adapter.train_embeddings: auto, but the checkpoint does not say whether it is a base or chat model (its "
            "generation_config.json has no chat_format). Set it: true for a base model, false for a chat model"
        )
    return chat_format == "raw"


def train_in_full(model: QwenVLForConditionalGeneration, freeze: "Freeze") -> QwenVLForConditionalGeneration:
    """Without an adapter: train the components that are not frozen, embeddings with the language model.

    All trained weights are float32 (see `finetune.model.masters`); frozen ones stay in what the base is stored in.

    Raises:
        UserError: everything is frozen.
    """
    frozen = {"vision": freeze.vision, "resampler": freeze.resampler, "language": freeze.language}
    if all(frozen.values()):
        raise UserError("nothing to train: there is no adapter, and freeze holds vision, resampler and language")
    frozen["embeddings"] = freeze.language
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen[component_of(name)])
    make_masters(model)
    return model


def put_lora(
    model: QwenVLForConditionalGeneration, adapter: "Adapter", freeze: "Freeze", *, embeddings: bool
) -> PeftModel:
    """Put a new LoRA adapter on the model. Components trained in full beside it are saved with the adapter.

    All trained weights are float32, whatever the base is stored in, 4 bits (Q-LoRA) included.

    Raises:
        UserError: a target or a pattern that matches nothing (the message lists what there is), a layer that is not
            there, a component trained both by LoRA and in full, embeddings to be trained that are in 4 bits or in host
            memory, or an initialisation that `adapter.r` does not go with.
    """
    if not freeze.language:
        raise UserError(
            "freeze.language: false trains the language model in full, but the adapter trains it by LoRA: set "
            "freeze.language: true, or adapter: null"
        )
    if adapter.vision_targets and not freeze.vision:
        raise UserError(
            "adapter.vision_targets trains the vision tower by LoRA, and freeze.vision: false in full: choose one"
        )
    ranks = {
        "adapter.r": adapter.r,
        **{f"adapter.rank_pattern.{key}": rank for key, rank in adapter.rank_pattern.items()},
    }
    for key, rank in ranks.items():
        if adapter.init == "orthogonal" and rank % 2:
            raise UserError(f"adapter.init: orthogonal needs an even {key}, not {rank}")
    targets = find_language_targets(model, adapter.targets, adapter.layers_to_transform)
    targets += find_targets(model, adapter.vision_targets, VISION, "adapter.vision_targets")
    refuse_idle_patterns(adapter.rank_pattern, targets, "adapter.rank_pattern")
    refuse_idle_patterns(adapter.alpha_pattern, targets, "adapter.alpha_pattern")
    if adapter.bias == "lora_only" and not any(_has_bias(model, name) for name in targets):
        raise UserError("adapter.bias: lora_only, but none of the layers with LoRA has a bias. Set bias: none")
    if embeddings:
        _refuse_untrainable_embeddings(model, adapter)
    beside = list(EMBEDDINGS) if embeddings else []
    if not freeze.vision:
        beside.append("visual")
    elif not freeze.resampler:
        beside.append("attn_pool")
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT declares int, and only divides it
        lora_dropout=adapter.dropout,
        # Layers by number are written out as names: see `find_language_targets`.
        target_modules=shortest(model, [*adapter.targets, *adapter.vision_targets], targets),
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
        bias=adapter.bias,
        modules_to_save=beside or None,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        init_lora_weights=True if adapter.init == "default" else adapter.init,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if freeze.resampler and component_of(name) == "resampler" and COPIES in name:
            # PEFT's trained copy of the vision side contains it.
            parameter.requires_grad_(False)
    if adapter.bias != "none":
        compute_in_stored_type(adapted)
    multiply_in_16_bits(adapted)
    # TRL casts all trained weights to bfloat16 where this is set; PEFT reads it from the base model instead.
    adapted.is_loaded_in_4bit = False  # type: ignore[assignment]  # torch: a Module's are Tensor | Module
    return adapted


def write_plain_config(folder: Path) -> None:
    """Write a saved adapter's `adapter_config.json` again, without the keys that say nothing.

    PEFT writes all its keys, and its versions before 0.14 refuse a file with one that they do not know. What is at
    PEFT's default is left out, except for the keys that 0.7 knows; and a base in a folder is named by its absolute
    path, so that PEFT's Auto class finds it from wherever it is called.
    """
    file = folder / ADAPTER_CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    defaults = LoraConfig().to_dict()
    plain = {key: value for key, value in config.items() if key in KEYS_OF_PEFT_0_7 or value != defaults[key]}
    if plain["init_lora_weights"] in FORGOTTEN_INITS:
        plain["init_lora_weights"] = True
    if isinstance(plain["target_modules"], list):  # PEFT's set, in another order in each process
        plain["target_modules"].sort()
    base = plain["base_model_name_or_path"]
    if base is not None and Path(base).is_dir():
        plain["base_model_name_or_path"] = str(Path(base).absolute())
    write_text(file, json.dumps(plain, indent=2, sort_keys=True) + "\n")


def _has_bias(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name).bias, nn.Parameter)


def _refuse_untrainable_embeddings(model: QwenVLForConditionalGeneration, adapter: "Adapter") -> None:
    reason = None
    if is_quantized(model.lm_head):
        reason = "the output head is in 4 bits (model.quantize: head), which cannot be trained in full"
    elif isinstance(model.get_input_embeddings(), HostEmbedding):
        reason = "the embeddings are to stay in host memory (model.embeddings_on_cpu)"
    if reason:
        auto = " (a base model: it never saw ChatML's tokens)" if adapter.train_embeddings == "auto" else ""
        raise UserError(
            f"adapter.train_embeddings: {str(adapter.train_embeddings).lower()} trains embeddings and head{auto}, but "
            f"{reason}. Take that out, or set adapter.train_embeddings: false"
        )


def trains_vision(model: nn.Module) -> bool:
    """Whether the vision side has trained parameters, LoRA included."""
    return any(published_name(name).startswith(VISION) for name in _trained(model))


def trains_vision_only(model: nn.Module) -> bool:
    """Whether all trained parameters, LoRA included, belong to the vision side: text alone gives them no gradient."""
    return all(published_name(name).startswith(VISION) for name in _trained(model))


def _trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
