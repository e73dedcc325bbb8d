"""What is trained: LoRA matrices, components in full, embeddings; and at which learning rates."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from finetune.model.components import component_of, published_name
from qwenvl import QwenVLForConditionalGeneration
from qwenvl.model.host_embedding import HostEmbedding
from qwenvl.model.nf4_weights import is_quantized

if TYPE_CHECKING:
    from finetune.recipe import Adapter, Freeze

LANGUAGE, VISION = "transformer.h.", "transformer.visual."
EMBEDDINGS = ("wte", "lm_head")


def trains_embeddings(setting: bool | str, model: QwenVLForConditionalGeneration) -> bool:
    """Whether embeddings and head are trained beside the adapter; "auto" reads it from the checkpoint.

    The base model never saw the ChatML tokens, so its rows for them mean nothing yet. Which of the two a checkpoint is
    stands in its generation config (`chat_format`: "raw" or "chatml"), not in its path.

    Raises:
        ValueError: "auto", and the checkpoint does not say.
    """
    if setting != "auto":
        return bool(setting)
    chat_format = getattr(model.generation_config, "chat_format", None)
    if chat_format not in ("raw", "chatml"):
        raise ValueError(
            "adapter.train_embeddings: auto, but the checkpoint does not say whether it is a base or chat model (its "
            "generation_config.json has no chat_format). Set it: true for a base model, false for a chat model"
        )
    return chat_format == "raw"


def train_in_full(model: QwenVLForConditionalGeneration, freeze: "Freeze") -> QwenVLForConditionalGeneration:
    """Without an adapter: train the components that are not frozen, embeddings with the language model.

    Raises:
        ValueError: everything is frozen.
    """
    frozen = {"vision": freeze.vision, "resampler": freeze.resampler, "language": freeze.language}
    if all(frozen.values()):
        raise ValueError("nothing to train: there is no adapter, and freeze holds vision, resampler and language")
    frozen["embeddings"] = freeze.language
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen[component_of(name)])
    return model


def put_lora(
    model: QwenVLForConditionalGeneration, adapter: "Adapter", freeze: "Freeze", *, embeddings: bool
) -> PeftModel:
    """Put a fresh LoRA adapter on the model; what is trained in full beside it is saved in the adapter too.

    Adapter weights and the components trained beside them are float32, whatever the base is in: 4 bits (Q-LoRA) too.

    Raises:
        ValueError: a target that matches nothing (with what there is), the language model trained twice, or
            embeddings to train that are in 4 bits or in host memory.
    """
    if not freeze.language:
        raise ValueError(
            "freeze.language: false trains the language model in full, but the adapter trains it by LoRA: set "
            "freeze.language: true, or adapter: null"
        )
    if adapter.vision_targets and not freeze.vision:
        raise ValueError(
            "adapter.vision_targets trains the vision tower by LoRA, and freeze.vision: false in full: choose one"
        )
    targets = find_targets(model, adapter.targets, LANGUAGE, "adapter.targets")
    targets += find_targets(model, adapter.vision_targets, VISION, "adapter.vision_targets")
    if embeddings:
        _refuse_frozen_embeddings(model, adapter)
    beside = list(EMBEDDINGS) if embeddings else []
    if not freeze.vision:
        beside.append("visual")
    elif not freeze.resampler:
        beside.append("attn_pool")
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=_shortest(model, [*adapter.targets, *adapter.vision_targets], targets),
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
        if freeze.resampler and component_of(name) == "resampler":
            # It is part of the copy of the vision side that PEFT trains and saves.
            parameter.requires_grad_(False)
    # By this TRL knows a 4-bit base, and would round to bfloat16 all that is trained. PEFT asks the base itself.
    adapted.is_loaded_in_4bit = False
    return adapted


def _refuse_frozen_embeddings(model: QwenVLForConditionalGeneration, adapter: "Adapter"):
    reason = None
    if is_quantized(model.lm_head):
        reason = "the output head is in 4 bits (model.quantize: head), which cannot be trained in full"
    elif isinstance(model.get_input_embeddings(), HostEmbedding):
        reason = "the embeddings are to stay in host memory (model.embeddings_on_cpu)"
    if reason:
        auto = " (a base model: it never saw ChatML's tokens)" if adapter.train_embeddings == "auto" else ""
        raise ValueError(
            f"adapter.train_embeddings: {str(adapter.train_embeddings).lower()} trains embeddings and head{auto}, but "
            f"{reason}. Take that out, or set adapter.train_embeddings: false"
        )


def trains_vision(model: nn.Module) -> bool:
    """Whether anything of the vision side is trained, LoRA included."""
    return any(published_name(name).startswith(VISION) for name in _trained(model))


def trains_vision_only(model: nn.Module) -> bool:
    """Whether all that is trained, LoRA included, belongs to the vision side: text alone gives it no gradient."""
    return all(published_name(name).startswith(VISION) for name in _trained(model))


def _trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def find_targets(model: nn.Module, targets: Sequence[str], inside: str, key: str) -> list[str]:
    """Names of the linears under `inside` that the targets match: a name's end, from a dot on.

    Raises:
        ValueError: a target that matches none; the error lists what there is.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linears = [name for name in linears if name.startswith(inside)]
    found: list[str] = []
    for target in targets:
        matched = [name for name in linears if _matches(name, target)]
        if not matched:
            there = sorted({".".join(name.split(".")[-2:]) for name in linears})
            raise ValueError(f"{key}: {target!r} matches nothing under {inside[:-1]}. There are: {', '.join(there)}")
        found += [name for name in matched if name not in found]
    return found


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    learning_rates: dict[str, float | None],
    vision_layer_decay: float | None,
    weight_decay: float,
    no_decay: set[str],
) -> list[dict]:
    """Optimizer groups: one for each learning rate, with and without weight decay, named for logs.

    Args:
        model: its trainable parameters are grouped.
        learning_rate: of every component that `learning_rates` does not name.
        learning_rates: per component (see `components.COMPONENTS`).
        vision_layer_decay: factor from each vision layer to the one below it (the paper: 0.95 in its first two
            stages); the last layer and what comes after it have the full rate, the patch embedding the lowest.
        weight_decay: of the parameters that are not in `no_decay`.
        no_decay: names of parameters without weight decay (norms, biases).

    Returns:
        `{"params", "lr", "weight_decay", "component"}` for each group.
    """
    layers = _vision_layers(model)
    groups: dict[tuple, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        component = component_of(name)
        rate = learning_rates.get(component) or learning_rate
        if vision_layer_decay is not None and component == "vision":
            rate *= vision_layer_decay ** (layers - _vision_layer(name, layers))
        groups.setdefault((component, rate, 0.0 if name in no_decay else weight_decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay, "component": component}
        for (component, rate, decay), parameters in groups.items()
    ]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _shortest(model: nn.Module, given: Sequence[str], wanted: list[str]) -> list[str]:
    """The targets as given where PEFT, which looks in the whole model, finds just the wanted ones; else full names."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    everywhere = {name for name in linears for target in given if _matches(name, target)}
    return list(given) if everywhere == set(wanted) else wanted


def _vision_layers(model: nn.Module) -> int:
    """Layers that the decay counts: the patch embedding, each block, and what comes after them."""
    numbers = [_block_number(name) for name, _ in model.named_parameters()]
    return max((number for number in numbers if number is not None), default=-1) + 2


def _vision_layer(name: str, layers: int) -> int:
    """0 for the patch embedding and positions, 1 .. for the blocks, `layers` for what comes after them."""
    number = _block_number(name)
    if number is not None:
        return number + 1
    first = ("transformer.visual.conv1", "transformer.visual.positional_embedding", "transformer.visual.ln_pre")
    return 0 if published_name(name).startswith(first) else layers


def _block_number(name: str) -> int | None:
    parts = published_name(name).split(".")
    return int(parts[parts.index("resblocks") + 1]) if "resblocks" in parts else None
