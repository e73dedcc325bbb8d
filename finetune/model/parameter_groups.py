"""What is trained, grouped by learning rate."""

from typing import Any

from torch import nn

from finetune.model.components import component_of, published_name

COPIES = ".modules_to_save."
"""In the names of parameters of modules that PEFT trains a copy of, in full."""


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    learning_rates: dict[str, float | None],
    vision_layer_decay: float | None,
    weight_decay: float,
    no_decay: set[str],
    loraplus_lr_ratio: float | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups: one for each learning rate, with and without weight decay, named for logs.

    Args:
        model: its trainable parameters are grouped.
        learning_rate: of every component that `learning_rates` leaves out.
        learning_rates: per component (see `components.COMPONENTS`).
        vision_layer_decay: factor from each vision layer to the one below it (the paper: 0.95 in its first two
            stages). What follows the last layer has the full rate, the patch embedding the lowest.
        weight_decay: of the parameters that are not in `no_decay`.
        no_decay: names of parameters without weight decay (norms, biases).
        loraplus_lr_ratio: factor on the rate of LoRA's B, see `is_faster_in_loraplus`.

    Returns:
        `{"params", "lr", "weight_decay", "component"}` for each group.
    """
    layers = _vision_layers(model)
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        component = component_of(name)
        rate = learning_rates.get(component) or learning_rate
        if vision_layer_decay is not None and component == "vision":
            rate *= vision_layer_decay ** (layers - _vision_layer(name, layers))
        if loraplus_lr_ratio is not None and is_faster_in_loraplus(name, parameter):
            rate *= loraplus_lr_ratio
        groups.setdefault((component, rate, 0.0 if name in no_decay else weight_decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay, "component": component}
        for (component, rate, decay), parameters in groups.items()
    ]


def is_faster_in_loraplus(name: str, parameter: nn.Parameter) -> bool:
    """Whether LoRA+ (Hayou et al. 2024, arXiv 2402.12354) gives a trained parameter the larger rate.

    As in `peft.optimizers.create_loraplus_optimizer`, it does so to matrices B and to vectors (magnitudes of DoRA,
    biases); but not to the vectors of modules that are trained in full beside LoRA, which the method says nothing of.
    """
    return ".lora_B." in name or (parameter.ndim == 1 and COPIES not in name)


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
