"""Random states of a checkpoint, for a run that goes on with another number of processes.

Each process stores its own. With as many processes each finds it again, and goes on bit for bit. With another number
each takes one that is there: dropout then zeroes other inputs than it would have, which no number of processes can
avoid, as it draws for the samples that the process has.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

OF_ONE = "rng_state.pth"
OF_SEVERAL = re.compile(r"rng_state_(\d+)\.pth")


@contextmanager
def own_random_state(checkpoint: Path, process: int, processes: int) -> Iterator[Path]:
    """A folder in which Transformers finds the random state of a process: the checkpoint, or a temporary one.

    Args:
        process: the number of this process.
        processes: of the run that goes on.
    """
    name = OF_ONE if processes == 1 else f"rng_state_{process}.pth"
    numbered = {int(match[1]): file for file in checkpoint.iterdir() if (match := OF_SEVERAL.fullmatch(file.name))}
    if (checkpoint / name).is_file() or not (numbered or (checkpoint / OF_ONE).is_file()):
        yield checkpoint
        return
    source = sorted(numbered)[process % len(numbered)] if numbered else 0
    file = numbered.get(source, checkpoint / OF_ONE)
    # Plain containers, numbers and tensors, and NumPy's state, which `weights_only` takes by this list.
    with torch.serialization.safe_globals(_numpy_globals()):
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    if "cuda" in state:
        devices = state["cuda"]
        own = devices[source % len(devices)] if isinstance(devices, list) else devices
        state["cuda"] = own if processes == 1 else [own] * torch.cuda.device_count()
    with TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / name)
        yield Path(folder)


def _numpy_globals() -> list[Any]:
    import numpy as np

    reconstruct = getattr(np, "_core", None) or np.core
    return [reconstruct.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
