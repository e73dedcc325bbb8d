"""Which of a model's adapters computes."""

from operator import attrgetter

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

AdapterLayer = BaseTunerLayer | AuxiliaryTrainingWrapper


def activate(model: nn.Module, name: str | None) -> None:
    """Let one adapter compute, and no other.

    PEFT's own `set_adapter` takes no empty list where a module was trained in full, and disabling all adapters would
    disable them for rows of a batch that name theirs as well.

    Args:
        model: with or without adapters.
        name: as PEFT knows it; None is the model without any.
    """
    for module in adapter_layers(model):
        module.set_adapter([name] if name is not None and has_adapter(module, name) else [], inference_mode=True)


def adapter_layers(model: nn.Module) -> list[AdapterLayer]:
    """The modules of a model that compute adapters, and those that hold copies that were trained in full."""
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


def has_adapter(module: AdapterLayer, name: str) -> bool:
    """Whether a module has weights of an adapter."""
    return any(name in attrgetter(names)(module) for names in module.adapter_layer_names)
