"""A token embedding table that stays in host memory: saves 1.2 GB of GPU memory, and costs a copy of each lookup."""

from collections.abc import Callable
from typing import Self

import torch
from torch import nn

from qwenvl.checkpoint.checkpoint_files import locate_tensors
from qwenvl.errors import InputError
from qwenvl.model.configuration import QwenVLConfig
from qwenvl.model.modeling import QwenVLForConditionalGeneration

TABLE = "transformer.wte.weight"


class HostEmbedding(nn.Embedding):
    """Looks ids up on the CPU and copies the rows to the device of the ids."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: ids, (batch, length) -> (batch, length, hidden) on the same device."""
        return super().forward(input.to(self.weight.device)).to(input.device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # Called by `model.to(...)`, `model.cuda()` and the like: they may change the dtype, not the device.
        return super()._apply(lambda tensor: fn(tensor).cpu(), recurse)


class WithoutEmbeddings(QwenVLForConditionalGeneration):
    """The model while its weights are loaded, without its token embeddings; `read_embeddings` adds them.

    Loaded like the other weights, they would go through the GPU last, and take 1.2 GB when it is fullest.
    """

    _keys_to_ignore_on_load_unexpected = [TABLE.replace(".", r"\.")]  # noqa: RUF012 (the base class's type)

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.transformer.set_input_embeddings(nn.Identity())


def read_embeddings(model: QwenVLForConditionalGeneration, path: str) -> None:
    """Read the token embeddings of a checkpoint into host memory, and make the model an ordinary one.

    Args:
        model: a `WithoutEmbeddings`, changed in place; the embeddings get its dtype.
        path: folder or hub id.

    Raises:
        InputError: the checkpoint has none.
    """
    stored = locate_tensors(path).get(TABLE)
    if stored is None:
        raise InputError(f"{path}: there is no {TABLE} in this checkpoint, which every model needs")
    _put_table(model, stored.read().to(model.dtype))
    model.__class__ = QwenVLForConditionalGeneration


def keep_embeddings_on_cpu(model: QwenVLForConditionalGeneration) -> None:
    """Move the token embeddings of a loaded model to host memory, where they stay."""
    weight = model.transformer.wte.weight
    _put_table(model, weight.data.cpu()).weight.requires_grad_(weight.requires_grad)


def _put_table(model: QwenVLForConditionalGeneration, values: torch.Tensor) -> HostEmbedding:
    rows, width = values.shape
    table = HostEmbedding(rows, width, _weight=values, _freeze=False)
    # Deleted first, so that it comes after the other modules: Transformers takes the device of a model's first
    # parameter for the model's.
    del model.transformer.wte
    model.transformer.wte = table
    return table
