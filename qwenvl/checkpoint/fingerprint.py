"""Fingerprints of a checkpoint's weights and vocabulary, the same for every format that they are stored in.

The fingerprint of the weights is of every value. All tensors are cut into pieces of `PIECE_VALUES` values, and each
piece is hashed as float32: the upper 16 bits of its values, and apart from them the lower 16 bits, unless all of these
are zero. So bfloat16 is hashed as it is stored, not converted, and float32 that came from bfloat16 has the same hash.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch

from qwenvl.checkpoint.checkpoint_files import StoredTensor, find_file, locate_tensors
from qwenvl.checkpoint.direct_reading import SLACK
from qwenvl.errors import InputError

VOCABULARY = "qwen.tiktoken"

PIECE_VALUES = 1 << 23
"""Values hashed at once: part of the definition of the fingerprint."""

SAMPLED = 64

# Each needs a piece and its halves, 64 MB at most. One more than there are cores, as reading waits for the disk.
THREADS = min(8, (os.cpu_count() or 1) + 1)

DIGITS = 32
"""Hexadecimal digits of a fingerprint."""


def weights_fingerprint(
    path: str | Path, progress: Callable[[int], None] | None = None, *, page_cache: bool = False
) -> str:
    """Compute a short identifier of all values of a checkpoint's weights.

    SHA-256, cut to 32 hexadecimal digits, over the names, shapes and values of all tensors, in name order. Floating-
    point values count as float32, bit by bit: -0.0 is not 0.0, and one NaN is not another. So a checkpoint in bfloat16
    or float16 has the fingerprint of its copy in float32, in files of any kind. What float32 cannot hold (other values
    of float64) counts as it is stored, and so do integers, such as 4-bit codes, with the name of their type.

    Args:
        path: folder or hub id.
        progress: called with the number of bytes just hashed, `stored_bytes` in all.
        page_cache: read by way of the system's page cache, as the weights are loaded next, or were just now.

    Raises:
        MissingFileError: no weights at `path`.
        InputError: a file at `path` is damaged.
    """
    return hash_tensors(locate_tensors(path), progress, page_cache=page_cache)


def hash_tensors(
    tensors: Mapping[str, StoredTensor],
    progress: Callable[[int], None] | None = None,
    *,
    page_cache: bool = False,
) -> str:
    """As `weights_fingerprint`, of the tensors that `locate_tensors` finds."""
    ordered = [tensors[name] for name in sorted(tensors)]
    jobs = [(tensor, starts) for tensor in ordered for starts in _jobs(tensor)]
    hashes: dict[str, list[str]] = {tensor.name: [] for tensor in ordered}
    read = partial(_hash, memory=threading.local(), page_cache=page_cache)
    threads = ThreadPoolExecutor(THREADS)
    try:
        results = threads.map(lambda job: read(*job), jobs)
        for (tensor, _), (found, count) in zip(jobs, results, strict=True):
            hashes[tensor.name] += found
            if progress is not None:
                progress(count)
    finally:
        threads.shutdown(cancel_futures=True)  # after an error the rest need not be read
    digest = hashlib.sha256()
    for tensor in ordered:
        kind = "float" if tensor.dtype.is_floating_point else str(tensor.dtype)
        digest.update(f"{tensor.name} {list(tensor.shape)} {kind} {' '.join(hashes[tensor.name])}\n".encode())
    return digest.hexdigest()[:DIGITS]


def stored_bytes(path: str | Path) -> int:
    """Bytes of a checkpoint's weights.

    Raises:
        MissingFileError, InputError: as `weights_fingerprint`.
    """
    return sum(tensor.nbytes for tensor in locate_tensors(path).values())


def sampled_fingerprint(path: str | Path) -> str:
    """Compute the identifier that adapters and runs noted before there was `weights_fingerprint`.

    SHA-256 over each tensor's name, shape, and its first, middle and last 64 values as float32, in name order: most
    changes of single values are not in it.

    Raises:
        MissingFileError, InputError: as `weights_fingerprint`.
    """
    return sample_tensors(locate_tensors(path))


def sample_tensors(tensors: Mapping[str, StoredTensor]) -> str:
    """As `sampled_fingerprint`, of the tensors that `locate_tensors` finds."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        shape, values = _sample(tensors[name])
        digest.update(f"{name} {shape}\n".encode())
        digest.update(values)
    return digest.hexdigest()[:DIGITS]


def vocabulary_fingerprint(path: str | Path) -> str | None:
    """SHA-256, cut to 32 hexadecimal digits, of the lines of `qwen.tiktoken`, whatever ends them; None without one.

    Args:
        path: folder or hub id.

    Raises:
        InputError: the file cannot be read.
    """
    file = find_file(path, VOCABULARY)
    if file is None:
        return None
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): check its permissions") from error
    content = b"\n".join(b" ".join(line.split()) for line in lines if line.strip())
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def _jobs(tensor: StoredTensor) -> Iterable[list[int]]:
    """The beginnings of the pieces that are hashed in one go."""
    starts = list(range(0, prod(tensor.shape), PIECE_VALUES))
    return [starts] if tensor.strided and starts else [[start] for start in starts]


def _hash(
    tensor: StoredTensor, starts: list[int], *, memory: threading.local, page_cache: bool
) -> tuple[list[str], int]:
    """The hashes of pieces, and the bytes that were read for them."""
    if tensor.strided:  # its values do not lie in order: it is read once, whole
        values = tensor.read().reshape(-1)
        return [_hash_piece(values[start : start + PIECE_VALUES]) for start in starts], tensor.nbytes
    size = min(PIECE_VALUES, prod(tensor.shape)) * tensor.dtype.itemsize + SLACK
    if not hasattr(memory, "buffer") or len(memory.buffer) < size:
        memory.buffer = torch.empty(size, dtype=torch.uint8)
    pieces = [tensor.flat(start, start + PIECE_VALUES, memory.buffer, page_cache=page_cache) for start in starts]
    return [_hash_piece(piece) for piece in pieces], sum(piece.nbytes for piece in pieces)


def _hash_piece(values: torch.Tensor) -> str:
    """`UPPER`, `UPPER:LOWER` or `UPPER:LOWER:STORED`; of numbers that are no floating-point ones, `STORED`.

    Args:
        values: (n,), contiguous.
    """
    if not values.is_floating_point():
        return _sha256(values.view(torch.uint8).numpy())
    if values.dtype == torch.bfloat16:
        return _sha256(values.view(torch.int16).numpy())
    halves = _as_float32(values).view(np.uint16)  # little-endian: the lower half comes first
    hashes = [_sha256(halves[1::2].copy())]
    lower = halves[0::2].copy()
    exact = values.dtype != torch.float64 or _is_float32(values.numpy())
    if lower.any() or not exact:
        hashes.append(_sha256(lower))
    if not exact:
        hashes.append(_sha256(values.numpy()))
    return ":".join(hashes)


def _as_float32(values: torch.Tensor) -> np.ndarray:
    if values.dtype == torch.float32:
        return values.numpy()
    if values.dtype == torch.float64:
        with np.errstate(over="ignore", invalid="ignore"):
            return values.numpy().astype(np.float32)
    if values.dtype != torch.float16:
        return values.float().numpy()
    codes = values.view(torch.int16).numpy().view(np.uint16)
    bits = codes.view(np.float16).astype(np.float32).view(np.uint32)
    nan = (codes & 0x7FFF) > 0x7C00
    if nan.any():  # processors change signalling NaNs when they convert them
        code = codes[nan].astype(np.uint32)
        bits[nan] = (code & 0x8000) << 16 | 0x7F800000 | (code & 0x03FF) << 13
    return bits.view(np.float32)


def _is_float32(values: np.ndarray) -> bool:
    """Whether float32 holds each of these float64, bit by bit."""
    with np.errstate(over="ignore", invalid="ignore"):
        back = values.astype(np.float32).astype(np.float64)
    return np.array_equal(back.view(np.int64), values.view(np.int64))


def _sha256(content: np.ndarray) -> str:
    return hashlib.sha256(content.data).hexdigest()


def _sample(tensor: StoredTensor) -> tuple[list[int], bytes]:
    count = prod(tensor.shape)
    starts = (0, count // 2, max(count - SAMPLED, 0))
    values = torch.cat([tensor.flat(start, start + SAMPLED).to(torch.float32) for start in starts])
    return list(tensor.shape), values.numpy().tobytes()
