"""The state of all random number generators that training may use."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from finetune.training.step_in_packs import RandomState


class RandomStates:
    """The states when this object was made: of PyTorch, on the host and on the device, of NumPy and of Python."""

    def __init__(self, device: torch.device):
        self._torch = RandomState(device)
        self._numpy = np.random.get_state()
        self._python = random.getstate()

    def restore(self) -> None:
        """Set the generators back to these states."""
        self._torch.restore()
        np.random.set_state(self._numpy)
        random.setstate(self._python)


@contextlib.contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """What is random inside changes nothing that is random afterwards."""
    before = RandomStates(device)
    try:
        yield
    finally:
        before.restore()
