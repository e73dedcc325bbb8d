"""Which base an adapter belongs to, told by the base's weights and not by its path."""

import hashlib
import json
from pathlib import Path

import torch

from qwenvl.checkpoint_files import stored_tensors

# Beside adapter_config.json, written when the adapter is saved.
BASE_FILE = "base.json"
SAMPLED = 64


def weights_fingerprint(path: str | Path, **hub) -> str:
    """A short name for a checkpoint's weights, the same for every file format and lossless type they are stored in.

    SHA-256 over each tensor's name, shape, and its first, middle and last 64 values as float32, in name order. Any
    training of the checkpoint moves some of them; only these are read, so the full 19 GB take seconds.

    Raises:
        FileNotFoundError: no weights at `path`.
    """
    parts = {name: _sample(tensor) for name, tensor in stored_tensors(path, **hub)}
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(f"{name} {parts[name][0]}\n".encode())
        digest.update(parts[name][1])
    return digest.hexdigest()[:32]


def write_base(adapter: str | Path, base: str, fingerprint: str):
    """Note an adapter's base beside it."""
    text = json.dumps({"base": base, "fingerprint": fingerprint}, indent=2)
    (Path(adapter) / BASE_FILE).write_text(text + "\n")


def check_base(adapter: str | Path, base: str | Path, **hub) -> bool:
    """Compare a base with the one that the adapter was trained on.

    Returns:
        False where the adapter does not say which it was (those of other programs do not).

    Raises:
        ValueError: another base.
    """
    file = Path(adapter) / BASE_FILE
    if not file.is_file():
        return False
    expected = json.loads(file.read_text())
    found = weights_fingerprint(base, **hub)
    if found != expected["fingerprint"]:
        raise ValueError(
            f"the adapter in {adapter} was trained on {expected['base']} (fingerprint {expected['fingerprint']}), but "
            f"{base} has other weights (fingerprint {found}). Give the right base with adapter=...: "
            f"load_model(<base>, adapter={str(adapter)!r})"
        )
    return True


def _sample(tensor: torch.Tensor) -> tuple[list[int], bytes]:
    flat = tensor.reshape(-1)
    middle = len(flat) // 2
    pieces = (flat[:SAMPLED], flat[middle : middle + SAMPLED], flat[-SAMPLED:])
    values = torch.cat([piece.to(torch.float32) for piece in pieces])
    return list(tensor.shape), values.numpy().tobytes()
