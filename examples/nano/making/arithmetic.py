"""The precision of the nano's matrix products: bfloat16 if the device computes in it, else float32."""

import torch

BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")
"""Names of bfloat16 units in CPUs of Intel, AMD and ARM. Without one, bfloat16 is emulated, 40 times slower."""

_CAPABILITIES = torch.cpu.get_capabilities()
CPU_DTYPE = torch.bfloat16 if any(_CAPABILITIES.get(unit) for unit in BFLOAT16_UNITS) else torch.float32


def matrix_dtype(device: torch.device) -> torch.dtype:
    """The dtype of matrix products on this device."""
    return CPU_DTYPE if device.type == "cpu" else torch.bfloat16


def autocast(device: torch.device) -> torch.autocast:
    """Compute matrix products in `matrix_dtype`; weights stay float32.

    Autocast's cache is off: it keeps bfloat16 copies of weights until the context ends, so a training within one
    context would compute with the weights of its first step.
    """
    dtype = matrix_dtype(device)
    enabled = dtype == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)
