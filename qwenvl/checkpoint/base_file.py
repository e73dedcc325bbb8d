"""`base.json`: which base an adapter, or a 4-bit folder, was made from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenvl.checkpoint.checkpoint_files import find_file, read_json
from qwenvl.checkpoint.identity import BaseIdentity, identity_from_json, identity_to_json
from qwenvl.errors import InputError

# Written beside adapter_config.json when an adapter is saved, and in a 4-bit folder made from a 16-bit base.
BASE_FILE = "base.json"


@dataclass(frozen=True)
class BaseNote:
    """The content of `BASE_FILE`; see `write_base`.

    Attributes:
        own_sampled: `sampled_fingerprint` of a 4-bit folder from before `own_weights` was noted.
    """

    base: str
    identity: BaseIdentity
    quantize: tuple[str, ...]
    own_weights: str | None
    own_sampled: str | None


def write_base(
    folder: str | Path,
    base: str,
    identity: BaseIdentity,
    *,
    quantize: Sequence[str] = (),
    own_weights: str | None = None,
) -> None:
    """Write `BASE_FILE`.

    Args:
        folder: of the adapter, or the 4-bit folder.
        base: hub id or folder.
        identity: of the base.
        quantize: the parts in 4 bits (see `quantization.PARTS`) while the adapter was trained, or in the folder.
        own_weights: of a 4-bit folder, the fingerprint of its own tensors (`weights_fingerprint`).
    """
    content: dict[str, Any] = {
        "base": base,
        "fingerprint": identity.sampled,
        "identity": identity_to_json(identity),
    }
    if quantize:
        content |= {"quantization": "nf4", "quantize": list(quantize)}
    if own_weights is not None:
        content["own_weights"] = own_weights
    (Path(folder) / BASE_FILE).write_text(json.dumps(content, indent=2) + "\n")


def read_base(folder: str | Path) -> BaseNote | None:
    """Read `BASE_FILE` of a folder or hub id; None where it has none.

    Raises:
        InputError: it is damaged.
    """
    file = find_file(folder, BASE_FILE)
    if file is None:
        return None
    match read_json(file):
        case {"base": str(base), "fingerprint": str(fingerprint), **others}:
            identity = identity_from_json(others.get("identity", fingerprint), file)
            quantize = tuple(others.get("quantize", ()))
            return BaseNote(base, identity, quantize, others.get("own_weights"), others.get("own_fingerprint"))
    raise InputError(f"{file} does not name a base and its fingerprint: restore it, or delete it")


def trained_parts(adapter: str | Path) -> tuple[str, ...]:
    """The parts of its base that were in 4 bits when an adapter was trained; none if it does not say so."""
    noted = read_base(adapter)
    return () if noted is None else noted.quantize
