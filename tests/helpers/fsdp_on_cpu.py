"""`finetune` with FSDP2 on the CPU: `-m torch.distributed.run ... tests/helpers/fsdp_on_cpu.py RECIPE ...`.

Accelerate has a list of the kinds of devices on which it applies FSDP, and the CPU is not among them, though PyTorch's
FSDP2 runs over gloo. Here it is added to the list, in Accelerate's source, before anything imports it. The toolkit
itself refuses to train by FSDP where Accelerate does not apply it.
"""

import importlib.machinery
import importlib.util
import runpy
import sys
from pathlib import Path

FIRST = "DistributedType.MULTI_GPU,"
LIST = f"{FIRST}\n                DistributedType.MULTI_MLU,"
"""The beginning of the list."""


def apply_fsdp_on_cpu() -> None:
    """Import Accelerate's state with the CPU in its list; before Accelerate is imported."""
    assert "accelerate" not in sys.modules
    package = importlib.util.find_spec("accelerate")
    sys.meta_path.insert(0, _WithCpu(Path(package.submodule_search_locations[0]) / "state.py"))


class _WithCpu:
    """Finds `accelerate.state`, changed."""

    def __init__(self, path: Path):
        self.path = path

    def find_spec(self, name, path=None, target=None):
        if name != "accelerate.state":
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=_Loader(name, str(self.path)))


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        source = self.get_data(self.path).decode()
        assert source.count(LIST) == 1, "Accelerate's list has changed"
        longer = LIST.replace(FIRST, f"DistributedType.MULTI_CPU, {FIRST}")
        return compile(source.replace(LIST, longer), self.path, "exec")


if __name__ == "__main__":
    apply_fsdp_on_cpu()
    sys.argv[0] = "finetune"
    sys.path.insert(0, str(Path.cwd()))
    runpy.run_module("finetune", run_name="__main__", alter_sys=True)
