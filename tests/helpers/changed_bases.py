"""Changes of a checkpoint that no size and no time tells."""

import json
import os
from pathlib import Path
from typing import Any

from qwenvl.checkpoint.checkpoint_files import tensors_in

UNSAMPLED = "transformer.h.1.mlp.w2.weight"


def flip_a_bit(file: Path, tensor: str = UNSAMPLED) -> None:
    """Flip the lowest bit of a value far from the first, middle and last ones of a tensor; the file's time stays."""
    (place,) = [stored for stored in tensors_in(file) if stored.name == tensor]
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(place.offset + place.nbytes // 3 // place.dtype.itemsize * place.dtype.itemsize)
        (byte,) = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def edit_json(file: Path, *, visual: dict[str, Any] | None = None, **keys: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(file.read_text())
    content.update(keys)
    if visual is not None:
        content["visual"] |= visual
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
