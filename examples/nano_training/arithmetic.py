"""In which numbers the nano's matrix products are computed: bfloat16 where the CPU has it, which is the faster one."""

import torch

BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")
"""What CPUs call it, of Intel, AMD and ARM. Where it is missing, bfloat16 is made up at a fortieth of the speed."""

_CAPABILITIES = torch.cpu.get_capabilities()
MATRIX_DTYPE = torch.bfloat16 if any(_CAPABILITIES.get(unit) for unit in BFLOAT16_UNITS) else torch.float32


def autocast() -> torch.autocast:
    """Matrix products in `MATRIX_DTYPE`; weights stay float32.

    Without autocast's cache: it keeps the bfloat16 copies of weights until the context ends, and a whole training
    within one would go on with those of its first step.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.bfloat16 == MATRIX_DTYPE, cache_enabled=False)
