"""Records of what a model was trained as, as the toolkit writes them beside an adapter or a 4-bit folder."""

from collections.abc import Sequence
from pathlib import Path

from qwenvl.checkpoint.identity import BaseIdentity
from qwenvl.checkpoint.record import BaseNote, ModelRecord, write_record


def note_base(
    folder: Path, base: str | Path, identity: BaseIdentity, *, quantize: Sequence[str] = (), own: str | None = None
) -> None:
    """Write the record of a chat model that was made from `base`."""
    write_record(
        folder,
        ModelRecord(
            base=BaseNote(str(base), identity), own_weights=own, quantize=tuple(quantize), chat_format="chatml"
        ),
    )
