"""In which numbers the nano computes matrix products: bfloat16 where the device has it, which is the faster one."""

import torch

BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")
"""What CPUs call it, of Intel, AMD and ARM. Where it is missing, bfloat16 is made up at a fortieth of the speed."""

_CAPABILITIES = torch.cpu.get_capabilities()
CPU_DTYPE = torch.bfloat16 if any(_CAPABILITIES.get(unit) for unit in BFLOAT16_UNITS) else torch.float32


def matrix_dtype(device: torch.device) -> torch.dtype:
    """Of matrix products on this device."""
    return CPU_DTYPE if device.type == "cpu" else torch.bfloat16


def autocast(device: torch.device) -> torch.autocast:
    """Matrix products in `matrix_dtype`; weights stay float32.

    Without autocast's cache: it keeps the bfloat16 copies of weights until the context ends, and a whole training
    within one would go on with those of its first step.
    """
    dtype = matrix_dtype(device)
    enabled = dtype == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)
