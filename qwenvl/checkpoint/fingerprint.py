"""Which base an adapter belongs to, told by the base's weights and not by its path."""

import hashlib
import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from qwenvl.checkpoint.checkpoint_files import StoredTensor, locate_tensors

# Beside adapter_config.json, written when the adapter is saved; and in a 4-bit folder, made from a 16-bit base.
BASE_FILE = "base.json"
SAMPLED = 64


def weights_fingerprint(path: str | Path, **hub) -> str:
    """A short name for a checkpoint's weights, the same for every file format and lossless type they are stored in.

    SHA-256 over each tensor's name, shape, and its first, middle and last 64 values as float32, in name order. Any
    training of the checkpoint moves some of them; only these are read, so the full 19 GB take seconds.

    A 4-bit folder that was exported from a 16-bit checkpoint, and is as it was then, has that one's fingerprint: an
    adapter trained on the one belongs to the other too.

    Raises:
        FileNotFoundError: no weights at `path`.
    """
    own = own_fingerprint(path, **hub)
    noted = _read_base(path, **hub)
    return noted["fingerprint"] if own == noted.get("own_fingerprint") else own


def own_fingerprint(path: str | Path, **hub) -> str:
    """As `weights_fingerprint`, of the very tensors at `path`, 4-bit codes or not."""
    parts = {name: _sample(tensor) for name, tensor in locate_tensors(path, **hub).items()}
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
):
    """Note which base an adapter, or a 4-bit folder, was made from.

    Args:
        folder: of the adapter, or the 4-bit folder.
        base: hub id or folder.
        fingerprint: of the base (`weights_fingerprint`).
        quantize: the parts in 4 bits (see `quantization.PARTS`) while the adapter was trained, or in the folder.
        own_fingerprint: of a 4-bit folder (`own_fingerprint`).
    """
    content = {"base": base, "fingerprint": fingerprint}
    if quantize:
        content |= {"quantization": "nf4", "quantize": list(quantize)}
    if own_fingerprint is not None:
        content["own_fingerprint"] = own_fingerprint
    (Path(folder) / BASE_FILE).write_text(json.dumps(content, indent=2) + "\n")


def check_base(adapter: str | Path, base: str | Path, **hub) -> bool:
    """Compare a base with the one that the adapter was trained on.

    Returns:
        False where the adapter does not say which it was (those of other programs do not).

    Raises:
        ValueError: another base.
    """
    expected = _read_base(adapter)
    if not expected:
        return False
    found = weights_fingerprint(base, **hub)
    if found != expected["fingerprint"]:
        raise ValueError(
            f"the adapter in {adapter} was trained on {expected['base']} (fingerprint {expected['fingerprint']}), but "
            f"{base} has other weights (fingerprint {found}). Give the right base with adapter=...: "
            f"load_model(<base>, adapter={str(adapter)!r})"
        )
    return True


def trained_parts(adapter: str | Path) -> tuple[str, ...]:
    """The parts of its base that were in 4 bits when an adapter was trained; none where it does not say so."""
    return tuple(_read_base(adapter).get("quantize", ()))


def _read_base(folder: str | Path, **hub) -> dict[str, Any]:
    file = cached_file(
        str(folder),
        BASE_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    return json.loads(Path(file).read_text()) if file else {}


def _sample(tensor: StoredTensor) -> tuple[list[int], bytes]:
    count = prod(tensor.shape)
    starts = (0, count // 2, max(count - SAMPLED, 0))
    values = torch.cat([tensor.flat(start, start + SAMPLED).to(torch.float32) for start in starts])
    return list(tensor.shape), values.numpy().tobytes()
