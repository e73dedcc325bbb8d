"""A token embedding table that stays in host memory: 1.2 GB less on the GPU, for a copy of what is looked up."""

from collections.abc import Callable

import torch
from torch import nn

from qwenvl.checkpoint.checkpoint_files import locate_tensors
from qwenvl.model.configuration import QwenVLConfig
from qwenvl.model.modeling import QwenVLForConditionalGeneration

TABLE = "transformer.wte.weight"


class HostEmbedding(nn.Embedding):
    """Looks ids up on the CPU and gives the rows to the device the ids came from."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: ids, (batch, length) -> (batch, length, hidden) on the same device."""
        return super().forward(input.to(self.weight.device)).to(input.device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        # What `model.to(device)` and the like call: the type may change, the place not.
        return super()._apply(lambda tensor: fn(tensor).cpu(), recurse)


class WithoutEmbeddings(QwenVLForConditionalGeneration):
    """The model while its weights are read, with an empty place for the embeddings: `read_embeddings` fills it.

    On their way through the GPU they would be the last to come there, and take 1.2 GB when it is fullest.
    """

    _keys_to_ignore_on_load_unexpected = (TABLE.replace(".", r"\."),)

    def __init__(self, config: QwenVLConfig):
        super().__init__(config)
        self.transformer.wte = nn.Identity()


def read_embeddings(model: WithoutEmbeddings, path: str):
    """Read the token embeddings of a checkpoint into host memory, which makes the model an ordinary one.

    Args:
        model: changed in place; they get its type.
        path: folder or hub id.

    Raises:
        ValueError: the checkpoint has none.
    """
    stored = locate_tensors(path).get(TABLE)
    if stored is None:
        raise ValueError(f"{path}: there is no {TABLE} in this checkpoint, which every model needs")
    _put_table(model, stored.read().to(model.dtype))
    model.__class__ = QwenVLForConditionalGeneration


def keep_embeddings_on_cpu(model: QwenVLForConditionalGeneration):
    """Move the token embeddings of a model that is there into host memory, for good."""
    table = model.transformer.wte.weight
    _put_table(model, table.data.cpu()).requires_grad_(table.requires_grad)


def _put_table(model: nn.Module, values: torch.Tensor) -> nn.Parameter:
    # Behind the other modules: Transformers takes the device of a model's first parameter for the model's.
    del model.transformer.wte
    model.transformer.wte = HostEmbedding(*values.shape, _weight=values, _freeze=False)
    return model.transformer.wte.weight
