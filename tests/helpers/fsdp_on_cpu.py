"""`finetune` with FSDP2 on the CPU: a program in place of `finetune`, for a launcher or `finetune_on`.

Accelerate has a list of the kinds of devices on which it applies FSDP, and the CPU is not among them, though PyTorch's
FSDP2 runs over gloo. Here it is added to the list, in the source of the method that has it. The toolkit itself refuses
to train by FSDP where Accelerate does not apply it.
"""

import inspect
import runpy
import sys
import textwrap
from pathlib import Path

from accelerate import state

FIRST = "DistributedType.MULTI_GPU,"
LIST = f"{FIRST}\n            DistributedType.MULTI_MLU,"
"""The beginning of the list."""


def apply_fsdp_on_cpu() -> None:
    """Put the CPU into Accelerate's list."""
    source = textwrap.dedent(inspect.getsource(state.AcceleratorState.__init__))
    assert source.count(LIST) == 1, "Accelerate's list has changed"
    longer = LIST.replace(FIRST, f"DistributedType.MULTI_CPU, {FIRST}")
    made = {}
    exec(compile(source.replace(LIST, longer), state.__file__, "exec"), vars(state), made)
    state.AcceleratorState.__init__ = made["__init__"]


if __name__ == "__main__":
    apply_fsdp_on_cpu()
    sys.argv[0] = "finetune"
    sys.path.insert(0, str(Path.cwd()))
    runpy.run_module("finetune", run_name="__main__", alter_sys=True)
