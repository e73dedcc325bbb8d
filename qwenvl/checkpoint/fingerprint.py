"""The fingerprint of a checkpoint's weights: to which base an adapter belongs, wherever the base is stored."""

import hashlib
from math import prod
from pathlib import Path

import torch

from qwenvl.checkpoint.checkpoint_files import StoredTensor, locate_tensors
from qwenvl.checkpoint.record import read_record
from qwenvl.errors import InputError

SAMPLED = 64


def weights_fingerprint(path: str | Path) -> str:
    """Compute a short identifier of a checkpoint's weights, the same for every file format and lossless type.

    SHA-256 over each tensor's name, shape, and its first, middle and last 64 values as float32, in name order. Any
    training of the checkpoint changes some of them; as only these are read, the full 19 GB take seconds.

    A 4-bit folder that was exported from a 16-bit checkpoint and has not changed since has that checkpoint's
    fingerprint: an adapter trained on the one belongs to the other too.

    Raises:
        MissingFileError: no weights at `path`.
        InputError: a file at `path` is damaged.
    """
    own = own_fingerprint(path)
    record = read_record(path)
    if record is None or record.base is None or record.own_fingerprint != own:
        return own
    return record.base.fingerprint


def own_fingerprint(path: str | Path) -> str:
    """Compute the fingerprint of the tensors at `path` themselves, whether they are 4-bit codes or not."""
    parts = {name: _sample(tensor) for name, tensor in locate_tensors(path).items()}
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(f"{name} {parts[name][0]}\n".encode())
        digest.update(parts[name][1])
    return digest.hexdigest()[:32]


def check_base(adapter: str | Path, base: str | Path) -> bool:
    """Compare a base with the one that the adapter was trained on.

    Returns:
        False if the adapter does not say which it was (adapters of other programs do not).

    Raises:
        InputError: another base.
    """
    record = read_record(adapter)
    if record is None or record.base is None:
        return False
    found = weights_fingerprint(base)
    if found != record.base.fingerprint:
        raise InputError(
            f"the adapter in {adapter} was trained on {record.base.path} (fingerprint {record.base.fingerprint}), but "
            f"{base} has other weights (fingerprint {found}). Give the right base: --base BASE, or "
            f"load_model(BASE, adapter={str(adapter)!r})"
        )
    return True


def _sample(tensor: StoredTensor) -> tuple[list[int], bytes]:
    count = prod(tensor.shape)
    starts = (0, count // 2, max(count - SAMPLED, 0))
    values = torch.cat([tensor.flat(start, start + SAMPLED).to(torch.float32) for start in starts])
    return list(tensor.shape), values.numpy().tobytes()
