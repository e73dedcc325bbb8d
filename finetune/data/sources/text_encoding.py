"""Text files as UTF-8: what a file is encoded in, and a UTF-8 copy of one that is packed or encoded otherwise.

A plain UTF-8 file is read where it lies. Of any other a copy is made once in the datasets library's cache, under the
digest of its bytes, and rows are found in the copy by their positions: line numbers stay what they are.

Only marks that cannot be mistaken are followed: the byte order marks, and the zero bytes of UTF-16 and UTF-32 around
the first characters. Everything else that is not UTF-8 is refused with what it would read as; the recipe then says the
encoding. A guess from few bytes is too often wrong, and what was guessed wrong would be trained as words.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, cast

from finetune.data.sample import DataError
from finetune.files.atomic_writes import writing_file
from finetune.files.path_errors import path_errors

PACKED = ".gz"
_UNPACKED = 1 << 28
_MOST_TIMES = 200
"""Bytes that a packed file may have, and times its own size where that is more: ten times what data usually has."""
_CHUNK = 1 << 20  # bytes
_SAMPLE = 1 << 16  # bytes before and after a place that is not UTF-8
_SHOWN = 24  # characters of what such a place would read as
_GUESSES = ("gb18030", "big5", "cp932", "euc_jp", "cp949", "cp1252", "cp1251", "cp1250", "cp1254", "cp1253", "cp1256")
"""Encodings that files without a mark are commonly in; characters have several bytes in the first `_SEVERAL_BYTES`."""
_SEVERAL_BYTES = 5


def kind_of_file(path: Path) -> str:
    """The file's ending in lower case, without that of the packing: `.jsonl` for `rows.jsonl.gz`."""
    return Path(path.stem if path.suffix.lower() == PACKED else path.name).suffix.lower()


def text_file(path: Path, name: str, encoding: str | None = None) -> Path:
    """A file with the text of `path` in UTF-8: itself, or a copy in the datasets cache.

    Args:
        path, name: of the file, which may be packed (`.gz`).
        encoding: that it is in; None is UTF-8 or what its marks say.

    Raises:
        DataError: the text is not in that encoding, the file says another one itself, or the packing is damaged.
        PathError: the copy cannot be written.
    """
    with _opened(path, name) as file:
        marked = json.detect_encoding(file.read(4))
    wanted = marked if encoding is None else _agreed(name, encoding, marked)
    if wanted in ("utf-8", "utf-8-sig") and path.suffix.lower() != PACKED:
        return path
    return _copy(path, name, "utf-8" if wanted == "utf-8-sig" else wanted, encoding)


def not_utf8(path: Path, name: str, place: int) -> DataError:
    """The error for a file that is not UTF-8 at byte `place`, with the encodings that it may be in.

    What a short text is in can only be guessed, so each guess comes with what it makes of the text there.
    """
    start = max(place - _SAMPLE, 0)
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(place - start + _SAMPLE)
    # From the beginning of a line on, so that no character of several bytes is cut.
    line = data.rfind(b"\n", 0, place - start) + 1
    readings = [f"{guess} reads {shown!r} there" for guess, shown in _readings(data, line, place - start - line)]
    guesses = f" ({'; '.join(readings)})" if readings else ""
    return DataError(
        f"{name}: byte {place} is not UTF-8; give the file's encoding with `encoding`{guesses}, or save it as UTF-8"
    )


def _readings(data: bytes, line: int, place: int) -> Iterator[tuple[str, str]]:
    """The likeliest encodings, at most two, and what the text from `place` bytes after `line` on is in them."""
    from charset_normalizer import from_bytes

    # Its first lines as a whole, but not half a character at the end.
    sample = data[line:]
    sample = sample[: sample.rfind(b"\n") + 1] or sample
    found = sorted(
        from_bytes(sample, cp_isolation=list(_GUESSES)),
        key=lambda match: (match.chaos, -match.coherence, _GUESSES.index(match.encoding)),
    )
    # An encoding of several bytes that fits is hardly chance; those of one byte all fit.
    several = bool(found) and found[0].encoding in _GUESSES[:_SEVERAL_BYTES]
    for match in found[: 1 if several else 2]:
        # Of encodings that give the same text the most common one.
        encoding = min({match.encoding, *match.could_be_from_charset} & set(_GUESSES), key=_GUESSES.index)
        text = sample.decode(encoding, errors="replace")
        before = len(sample[:place].decode(encoding, errors="replace"))
        yield encoding, text[before:].split("\n")[0][:_SHOWN]


def _agreed(name: str, encoding: str, marked: str) -> str:
    """The codec for an encoding that the recipe names, where the file's own mark does not say another."""
    codec = codecs.lookup(encoding).name
    if marked == "utf-8" or codec == marked or (marked == "utf-8-sig" and codec == "utf-8"):
        return codec
    if marked != "utf-8-sig" and marked.startswith(codec[:6]):  # utf-16 for utf-16-le
        return marked
    mark = marked.removesuffix("-sig").upper()
    raise DataError(f"{name}: begins as a {mark} file does, and encoding says {encoding}; remove encoding")


@contextmanager
def _opened(path: Path, name: str) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked.

    Raises:
        DataError: the packing is damaged.
    """
    with path.open("rb") as raw:
        if path.suffix.lower() != PACKED:
            yield raw
            return
        try:
            with gzip.open(raw) as unpacked:
                yield cast(BinaryIO, unpacked)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{name}: cannot be unpacked ({error}); make or fetch the file again") from error


def _copy(path: Path, name: str, codec: str, encoding: str | None) -> Path:
    digest = sha256(f"{codec} {path.suffix.lower() == PACKED} ".encode())
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            digest.update(data)
    with copy_of(f"{digest.hexdigest()[:40]}.txt") as (copy, is_there):
        if not is_there:
            size = path.stat().st_size if path.suffix.lower() == PACKED else None
            with _opened(path, name) as file, writing_file(copy) as partial, partial.open("wb") as written:
                for text in _decoded(file, name, codec, is_given=encoding is not None):
                    written.write(text.encode())
                    if size is not None:
                        refuse_swelling(name, size, file.tell())
    return copy


def refuse_swelling(name: str, size: int, unpacked: int) -> None:
    """Refuse a packed file that would fill the disk or the memory.

    Args:
        size, unpacked: bytes of the file, and of what is in it.

    Raises:
        DataError: it has far more in it than data packs to.
    """
    if unpacked > max(_UNPACKED, _MOST_TIMES * size):
        raise DataError(
            f"{name}: unpacks to more than {_MOST_TIMES} times its {size:,} bytes, which no data does; if it is right "
            "all the same, unpack it yourself"
        )


@contextmanager
def copy_of(name: str) -> Iterator[tuple[Path, bool]]:
    """The path of a copy in the datasets cache, and whether it is there; if not, the caller writes it. Of several
    processes one writes, and the others wait.

    Raises:
        PathError: nothing can be written there.
    """
    import datasets
    from filelock import FileLock

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "texts"
    with path_errors(folder, "keep the text as UTF-8 in", "Make room there, or set HF_HOME to a folder elsewhere"):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"):
            yield folder / name, (folder / name).is_file()


def _decoded(file: BinaryIO, name: str, codec: str, *, is_given: bool) -> Iterator[str]:
    """The text of a file, in parts.

    Raises:
        DataError: it is not in this encoding, or it is UTF-8 although another one is given.
    """
    decoder = codecs.getincrementaldecoder(codec)()
    utf8 = codecs.getincrementaldecoder("utf-8")() if is_given and codec != "utf-8" else None
    is_ascii, taken = True, 0
    while True:
        data = file.read(_CHUNK)
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            place = taken - (len(error.object) - len(data)) + error.start
            raise DataError(
                f"{name}: byte {place} is not {codec}; give the encoding that the file was saved in with `encoding`"
            ) from error
        except UnicodeError as error:  # a codec of the standard library that has no place to tell
            raise DataError(f"{name}: is not {codec} ({str(error)[:200]})") from error
        yield text.removeprefix("\ufeff") if not taken else text
        is_ascii, taken = is_ascii and data.isascii(), taken + len(data)
        try:
            if utf8 is not None:
                utf8.decode(data, final=not data)
        except UnicodeDecodeError:
            utf8 = None
        if not data:
            break
    if utf8 is not None and not is_ascii:
        raise DataError(
            f"{name}: is UTF-8, and encoding says {codec}, in which it would read as something else; remove encoding "
            "(or, if that is right all the same, save the file as UTF-8)"
        )
