"""`finetune` with DeepSpeed on the CPU: `-m torch.distributed.run ... tests/helpers/zero_on_cpu.py RECIPE ...`.

Accelerate makes DeepSpeed's process group on GPUs only, and on a CPU forgets that it was asked for; DeepSpeed itself
runs over gloo. Here Accelerate is told that a CPU is a device like others. The toolkit itself refuses to train by ZeRO
where Accelerate does not apply it.
"""

import os
import runpy
import sys
from pathlib import Path


def apply_zero_on_cpu() -> None:
    """Make Accelerate's state as on a GPU; before it is made."""
    # Nothing of DeepSpeed's is compiled.
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    from accelerate.state import DistributedType, PartialState

    make = PartialState.__init__

    def __init__(self, cpu=False, **arguments):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        try:
            make(self, False, **arguments)
        finally:
            del os.environ["ACCELERATE_USE_DEEPSPEED"]

    def _prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
        return "gloo", DistributedType.MULTI_CPU

    PartialState.__init__, PartialState._prepare_backend = __init__, _prepare_backend


if __name__ == "__main__":
    sys.argv[0] = "finetune"
    sys.path.insert(0, str(Path.cwd()))
    apply_zero_on_cpu()
    runpy.run_module("finetune", run_name="__main__", alter_sys=True)
