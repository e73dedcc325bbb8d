"""The fingerprint of a checkpoint's weights: to which base an adapter belongs, wherever the base is stored."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from qwenvl.checkpoint.checkpoint_files import StoredTensor, find_file, locate_tensors, read_json
from qwenvl.errors import InputError

# Written beside adapter_config.json when an adapter is saved, and in a 4-bit folder made from a 16-bit base.
BASE_FILE = "base.json"
SAMPLED = 64


@dataclass(frozen=True)
class _Base:
    """The content of `BASE_FILE`; see `write_base`."""

    base: str
    fingerprint: str
    quantize: tuple[str, ...]
    own_fingerprint: str | None


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
    noted = _read_base(path)
    return noted.fingerprint if noted is not None and noted.own_fingerprint == own else own


def own_fingerprint(path: str | Path) -> str:
    """Compute the fingerprint of the tensors at `path` themselves, whether they are 4-bit codes or not."""
    parts = {name: _sample(tensor) for name, tensor in locate_tensors(path).items()}
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(f"{name} {parts[name][0]}\n".encode())
        digest.update(parts[name][1])
    return digest.hexdigest()[:32]


def write_base(
    folder: str | Path,
    base: str,
    fingerprint: str,
    *,
    quantize: Sequence[str] = (),
    own_fingerprint: str | None = None,
) -> None:
    """Write `BASE_FILE`: which base an adapter, or a 4-bit folder, was made from.

    Args:
        folder: of the adapter, or the 4-bit folder.
        base: hub id or folder.
        fingerprint: of the base (`weights_fingerprint`).
        quantize: the parts in 4 bits (see `quantization.PARTS`) while the adapter was trained, or in the folder.
        own_fingerprint: of a 4-bit folder (`own_fingerprint`).
    """
    content: dict[str, Any] = {"base": base, "fingerprint": fingerprint}
    if quantize:
        content |= {"quantization": "nf4", "quantize": list(quantize)}
    if own_fingerprint is not None:
        content["own_fingerprint"] = own_fingerprint
    (Path(folder) / BASE_FILE).write_text(json.dumps(content, indent=2) + "\n")


def check_base(adapter: str | Path, base: str | Path) -> bool:
    """Compare a base with the one that the adapter was trained on.

    Returns:
        False if the adapter does not say which it was (adapters of other programs do not).

    Raises:
        InputError: another base.
    """
    expected = _read_base(adapter)
    if expected is None:
        return False
    found = weights_fingerprint(base)
    if found != expected.fingerprint:
        raise InputError(
            f"the adapter in {adapter} was trained on {expected.base} (fingerprint {expected.fingerprint}), but "
            f"{base} has other weights (fingerprint {found}). Give the right base with adapter=...: "
            f"load_model(<base>, adapter={str(adapter)!r})"
        )
    return True


def noted_base(adapter: str | Path) -> str | None:
    """The base that an adapter notes, as the training was given it; None if it does not say so."""
    noted = _read_base(adapter)
    return None if noted is None else noted.base


def trained_parts(adapter: str | Path) -> tuple[str, ...]:
    """The parts of its base that were in 4 bits when an adapter was trained; none if it does not say so."""
    noted = _read_base(adapter)
    return () if noted is None else noted.quantize


def _read_base(folder: str | Path) -> _Base | None:
    file = find_file(folder, BASE_FILE)
    if file is None:
        return None
    match read_json(file):
        case {"base": str(base), "fingerprint": str(fingerprint), **others}:
            return _Base(base, fingerprint, tuple(others.get("quantize", ())), others.get("own_fingerprint"))
    raise InputError(f"{file} does not name a base and its fingerprint: restore it, or delete it")


def _sample(tensor: StoredTensor) -> tuple[list[int], bytes]:
    count = prod(tensor.shape)
    starts = (0, count // 2, max(count - SAMPLED, 0))
    values = torch.cat([tensor.flat(start, start + SAMPLED).to(torch.float32) for start in starts])
    return list(tensor.shape), values.numpy().tobytes()
