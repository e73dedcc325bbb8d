"""Biases trained in float32 beside weights that are stored in 16 bits."""

from typing import Any

import torch
from torch import nn

from qwenvl.model.nf4_weights import is_quantized


def compute_in_stored_type(model: nn.Module) -> None:
    """Let modules whose trained biases are float32 and whose weights are in 16 or 4 bits compute in the weights' type.

    PyTorch's operations want one type, and bitsandbytes would round the parameter itself, for good. While such a
    module runs, its biases are seen in the type of its weights; gradients go to the float32 parameters.
    """
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        biases = tuple(name for name, parameter in own.items() if "bias" in name and parameter.requires_grad)
        types = {parameter.dtype for name, parameter in own.items() if name not in biases}
        if is_quantized(module):
            types = {module.compute_dtype}
        stored = [dtype for dtype in types if dtype in (torch.float16, torch.bfloat16)]
        if biases and stored:
            _SeenInType(module, biases, stored[0])


class _SeenInType:
    """Hooks of a module. An attribute of the object itself is found before its parameters."""

    def __init__(self, module: nn.Module, names: tuple[str, ...], dtype: torch.dtype):
        self.names, self.dtype = names, dtype
        module.register_forward_pre_hook(self._cast)
        module.register_forward_hook(self._restore, always_call=True)

    def _cast(self, module: nn.Module, _inputs: Any) -> None:
        for name in self.names:
            module.__dict__[name] = getattr(module, name).to(self.dtype)

    def _restore(self, module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        for name in self.names:
            module.__dict__.pop(name, None)
