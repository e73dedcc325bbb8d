"""The vision side with its weights in the file's mapping: a few hundred megabytes of memory instead of all of them.

The full-sized vision side has 3.9 GB of weights, and is idle while the language model writes. Its blocks run one after
the other, so the system may have each one's pages back once it has run. What the system keeps in its cache meanwhile
is read from there for the next image.
"""

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.errors import UserError
from qwenvl import QwenVLConfig
from qwenvl.checkpoint.checkpoint_files import tensors_in
from qwenvl.images.image_processor import normalize_pixels
from qwenvl.model.vision import VisionTransformer

_DONT_NEED = getattr(mmap, "MADV_DONTNEED", None)  # not on Windows


class VisionTower:
    """Encodes images on the CPU, in the type of its weights.

    Args:
        file: safetensors, with the names within `VisionTransformer`.
        config: of the model, which has a vision side.

    Raises:
        InputError: the file is damaged, or of another model.
    """

    def __init__(self, file: Path, config: QwenVLConfig) -> None:
        tensors = tensors_in(file)
        with file.open("rb") as opened:
            # Private: nothing is written to it, but PyTorch warns of memory that cannot be.
            self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        with torch.device("meta"):
            self._tower = VisionTransformer(config)
        expected = {name: tuple(tensor.shape) for name, tensor in self._tower.state_dict().items()}
        found = {tensor.name: tensor.shape for tensor in tensors}
        if wrong := sorted(name for name in expected.keys() | found if expected.get(name) != found.get(name)):
            raise UserError(
                f"{file}: {wrong[0]} is missing, too many, or of another shape than config.json says: it is of "
                "another model. Restore it, or export anew"
            )
        weights, self._ranges = {}, {}
        for tensor in tensors:
            count = tensor.nbytes // tensor.dtype.itemsize
            flat = torch.frombuffer(self._map, dtype=tensor.dtype, count=count, offset=tensor.offset)
            weights[tensor.name] = flat.view(tensor.shape)
            self._ranges[tensor.name] = (tensor.offset, tensor.nbytes)
        self._tower.load_state_dict(weights, assign=True)
        self._tower.eval().requires_grad_(False)
        for number, block in enumerate(self._tower.transformer.resblocks):
            block.register_forward_hook(self._release_after(f"transformer.resblocks.{number}."))

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode images, one after the other.

        Args:
            pixels: (images, 3, S, S) uint8.

        Returns:
            (images, n_queries, hidden) float32
        """
        return torch.cat([self._tower(normalize_pixels(one[None])).float() for one in pixels])

    def _release_after(self, prefix: str) -> Callable[[nn.Module, Any, Any], None]:
        own = [place for name, place in self._ranges.items() if name.startswith(prefix)]
        start, stop = min(offset for offset, _ in own), max(offset + size for offset, size in own)
        # Whole pages only; they hold nothing else, or are read again.
        start = start // mmap.PAGESIZE * mmap.PAGESIZE
        length = -(-(stop - start) // mmap.PAGESIZE) * mmap.PAGESIZE

        def release(module: nn.Module, given: Any, result: Any) -> None:
            if _DONT_NEED is not None:
                self._map.madvise(_DONT_NEED, start, min(length, len(self._map) - start))

        return release
