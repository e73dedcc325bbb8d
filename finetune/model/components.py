"""Components of the model, identified by parameter names: vision, resampler, language, embeddings, adapter."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

COMPONENTS = ("vision", "resampler", "language", "embeddings", "adapter")

# Prefix and infixes that PEFT adds to parameter names; the latter for modules that it trains a copy of.
_PEFT_PREFIX = "base_model.model."
_PEFT_COPIES = (".modules_to_save.default", ".original_module")


def published_name(parameter: str) -> str:
    """A parameter's name as in the checkpoint, without PEFT's additions."""
    parameter = parameter.removeprefix(_PEFT_PREFIX)
    for copy in _PEFT_COPIES:
        parameter = parameter.replace(copy, "")
    return parameter


def component_of(parameter: str) -> str:
    """Which of `COMPONENTS` a parameter belongs to, by its name in the model (with or without PEFT)."""
    if ".lora_" in parameter:
        return "adapter"
    name = published_name(parameter)
    if name.startswith("transformer.visual."):
        return "resampler" if name.startswith("transformer.visual.attn_pool.") else "vision"
    return "embeddings" if name.startswith(("transformer.wte.", "lm_head.")) else "language"


@dataclass(frozen=True)
class Count:
    """Parameters of a component: all of them, and those that are trained."""

    trained: int
    total: int


def count_parameters(model: nn.Module) -> dict[str, Count]:
    """Parameters per component, in the order of `COMPONENTS`; components that the model lacks are left out.

    PEFT's untouched originals of modules it trains a copy of are not counted: they are not used.
    """
    counts = dict.fromkeys(COMPONENTS, Count(0, 0))
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        component, so_far = component_of(name), counts[component_of(name)]
        size = parameter.numel()
        # A 4-bit weight holds two values a byte.
        size = size * 2 if type(parameter).__name__ == "Params4bit" else size
        counts[component] = Count(so_far.trained + size * parameter.requires_grad, so_far.total + size)
    return {component: count for component, count in counts.items() if count.total}


def table_of_parameters(counts: dict[str, Count]) -> Iterable[str]:
    """One line for each component: its name, trained parameters, all parameters."""
    for component, count in counts.items():
        state = f"{count.trained:>15,} trained" if count.trained else f"{'frozen':>15}        "
        yield f"{component:<11} {state} of {count.total:,}"
