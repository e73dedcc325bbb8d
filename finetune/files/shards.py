"""Tensors that several processes stored, each its part: the files of PyTorch's `torch.distributed.checkpoint`.

Their index is a pickle. It is read by an unpickler that makes the objects of an index and nothing else.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from finetune.errors import UserError

SHARDS = "shards"
"""The folder of a checkpoint that has them."""

MODEL = "model."
"""What the names of weights begin with; the others are an optimizer's."""

INDEX = ".metadata"


class ShardReader(FileSystemReader):
    """Reads stored parts."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            UserError: it is damaged, or made to run code.
        """
        path = Path(self.path) / INDEX
        try:
            with path.open("rb") as file:
                metadata = _IndexUnpickler(file).load()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}): use another checkpoint") from error
        if not isinstance(metadata, Metadata):
            raise UserError(f"{path} is no index of stored tensors: use another checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    NAMES = {  # noqa: RUF012 (never changed)
        "torch.distributed.checkpoint.metadata": {
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata"),
            *("TensorProperties", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "pathlib": {"Path", "PosixPath", "WindowsPath"},
        "collections": {"OrderedDict"},
    }

    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_type and name not in self.NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of an index")
        return super().find_class(module, name)


def stored_forms(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shape (`size`) and type (`properties.dtype`) of each stored tensor by name.

    Args:
        folder: of a checkpoint.

    Raises:
        UserError: the index cannot be read.
    """
    index = ShardReader(folder / SHARDS).read_metadata().state_dict_metadata
    return {name: form for name, form in index.items() if isinstance(form, TensorStorageMetadata)}


def read_stored(folder: Path, tensors: dict[str, torch.Tensor], *, alone: bool) -> None:
    """Read stored tensors into these, in place.

    Args:
        folder: of a checkpoint.
        tensors: by name, of the stored shapes; of those that processes share, each reads its part.
        alone: whether this process reads by itself; else all call this together.

    Raises:
        UserError: a tensor is not there, or of another shape.
    """
    stored = stored_forms(folder)
    for name, tensor in tensors.items():
        if name not in stored or stored[name].size != tensor.shape:
            raise UserError(f"{folder} is a checkpoint of another model: {name} is not there, or of another shape")
    dcp.load(tensors, storage_reader=ShardReader(folder / SHARDS), no_dist=alone)
