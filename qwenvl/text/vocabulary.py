"""The vocabulary of a `qwen.tiktoken` file: its ordinary tokens, and the control tokens numbered after them."""

from __future__ import annotations

import binascii
import itertools
import unicodedata
from collections.abc import Collection, Iterable
from functools import cache, cached_property, lru_cache

import tiktoken

from qwenvl.errors import InputError

END_OF_TEXT, IM_START, IM_END = CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EXTRA_TOKENS = tuple(f"<|extra_{i}|>" for i in range(205))
GROUNDING_TOKENS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMAGE_START, IMAGE_END, IMAGE_PAD = IMAGE_TOKENS = ("<img>", "</img>", "<imgpad>")
# In the order of their ids, which follow the last rank of the vocabulary.
CONTROL_TOKENS = CHATML_TOKENS + EXTRA_TOKENS + GROUNDING_TOKENS + IMAGE_TOKENS

# The GPT-4 split, except that digits stand alone and only contractions ignore case.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# An ordinary token is shown with one printable character per byte, as in GPT-2. If that spells a control token, a
# character outside the alphabet comes first, so that two ids never share a string.
_PRINTABLE_BYTES = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_spare_characters = itertools.count(0x100)
_BYTE_ALPHABET = {byte: byte if byte in _PRINTABLE_BYTES else next(_spare_characters) for byte in range(256)}
_ORDINARY = "␛"

_SHORT = 32  # characters of a text whose ids are remembered

MOST_MARKS = 256
"""Combining marks in a row. Normalisation sorts each run of them, in quadratic time. The Stream-Safe Text Format of
Unicode Standard Annex #15 allows 30; stacked Vietnamese, Hebrew or Tibetan signs, and most pranks, are below that."""


@cache
def _marks() -> frozenset[str]:
    """The characters that are, decomposed, nothing but combining marks.

    Among them are three signs of Tibetan that count as letters and decompose into two marks each.
    """
    decomposed = ((chr(code), unicodedata.normalize("NFD", chr(code))) for code in range(0x300, 0x20000))
    return frozenset(character for character, parts in decomposed if unicodedata.combining(parts[0]))


def long_run_of_marks(text: str) -> int | None:
    """Where a run of more than `MOST_MARKS` combining marks begins; None where there is none."""
    # Such a run has one of these characters.
    if len(text) <= MOST_MARKS or text.isascii() or (marks := _marks()).isdisjoint(text[::MOST_MARKS]):
        return None
    for place in range(0, len(text), MOST_MARKS):
        start = end = place
        while end < len(text) and end - start <= MOST_MARKS and text[end] in marks:
            end += 1
        while end > place and start > 0 and end - start <= MOST_MARKS and text[start - 1] in marks:
            start -= 1
        if end - start > MOST_MARKS:
            return start
    return None


class Vocabulary:
    """The tokens of one `qwen.tiktoken` file and the control tokens numbered after them. Immutable, and equal to
    another one of the same bytes.

    Args:
        source: the file's bytes, kept so that saving writes the same file.
        name: the file's name in errors.

    Raises:
        InputError: a line is not `base64(token) rank`, a token or rank is given twice, or a rank is missing.
    """

    def __init__(self, source: bytes, name: str = "qwen.tiktoken"):
        self.source = source
        ordinary = _read_ranks(source, name)
        self.control_tokens = {token: len(ordinary) + i for i, token in enumerate(CONTROL_TOKENS)}
        self.token_bytes = [*ordinary, *(token.encode() for token in CONTROL_TOKENS)]
        self.ordinary_size = len(ordinary)

        # tiktoken panics in Rust, which raises no Exception, on text with a byte that has no token of its own.
        # Placeholders with ids past the end do not change any merge, and are found in the result instead.
        ranks = {token: rank for rank, token in enumerate(ordinary)}
        self._missing_bytes = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]
        ranks |= {byte: len(self) + i for i, byte in enumerate(self._missing_bytes)}
        self._encoding = tiktoken.Encoding(
            "qwen-vl", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.control_tokens
        )
        self._encode_short = lru_cache(maxsize=1024)(self._encode)

    def __len__(self) -> int:
        return len(self.token_bytes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.source == other.source

    def __hash__(self) -> int:
        return hash(self.source)

    # Pickled as its source: small, and the same bytes in every process (datasets hashes them); tiktoken's cannot be.
    def __reduce__(self) -> tuple[type[Vocabulary], tuple[bytes]]:
        return Vocabulary, (self.source,)

    def __deepcopy__(self, memo: dict) -> Vocabulary:
        return self

    def encode(self, text: str, tokens: Collection[str]) -> list[int]:
        """Encode `text`; only the control tokens in `tokens` are recognised. See `QwenVLTokenizer.encode_text`."""
        # Most texts of a chat are the same few: roles, newlines, "Picture 1: ".
        return list(self._encode_short(text) if len(text) <= _SHORT and not tokens else self._encode(text, tokens))

    def _encode(self, text: str, tokens: Collection[str] = ()) -> list[int]:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"the text has half a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}, "
                    "which no encoding can write. Read its file as UTF-8, or repair it: "
                    "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
                ) from None
            if (run := long_run_of_marks(text)) is not None:
                raise InputError(
                    f"the text has more than {MOST_MARKS} combining marks in a row, near character {run}: no "
                    "writing has more than a few on a letter, and they would take minutes to sort. Remove them"
                )
            text = unicodedata.normalize("NFC", text)
        try:  # not encode_ordinary, which panics where this raises
            ids = self._encoding.encode(text, allowed_special=frozenset(tokens), disallowed_special=())
        except ValueError as error:
            raise InputError(
                f"the text ({len(text):,} characters) could not be split: tiktoken cannot handle a million white "
                "space characters in a row. Shorten such runs."
            ) from error
        if self._missing_bytes and max(ids, default=0) >= len(self):
            byte = self._missing_bytes[next(i for i in ids if i >= len(self)) - len(self)]
            raise InputError(
                f"the vocabulary has no token for the byte 0x{byte[0]:02x}, which this text needs: {text[:80]!r}. "
                "Use a vocabulary with all 256 single bytes, or leave such text out."
            )
        return ids

    def decode(self, ids: Iterable[int], errors: str) -> str:
        """Decode `ids`; an id without a token counts as one invalid byte, which `errors` decides about."""
        return b"".join(self.token_bytes[i] if 0 <= i < len(self) else b"\xff" for i in ids).decode("utf-8", errors)

    @cached_property
    def token_strings(self) -> list[str]:
        """The printable string of every id; no two are equal."""
        strings = [token.decode("latin-1").translate(_BYTE_ALPHABET) for token in self.token_bytes]
        for i, string in enumerate(strings[: self.ordinary_size]):
            if string in self.control_tokens:
                strings[i] = _ORDINARY + string
        return strings

    @cached_property
    def token_ids(self) -> dict[str, int]:
        """Printable string to id, the inverse of `token_strings`."""
        return {string: i for i, string in enumerate(self.token_strings)}


def _read_ranks(source: bytes, name: str) -> list[bytes]:
    """The tokens of a `qwen.tiktoken` file in the order of their ranks."""
    tokens: dict[int, bytes] = {}
    line_of_rank: dict[int, int] = {}
    line_of_token: dict[bytes, int] = {}
    for number, line in enumerate(source.splitlines(), start=1):  # bytes: splits at \n, \r\n and \r only
        if not line.strip():
            continue
        try:
            encoded, rank_digits = line.split()
            token = binascii.a2b_base64(encoded, strict_mode=True)
            if not rank_digits.isdigit():
                raise ValueError
            rank = int(rank_digits)
        except ValueError:
            remedy = "Download the file again"
            if line.startswith(b"version https://git-lfs"):
                remedy = "This is a Git LFS pointer, not the file: run `git lfs pull`, or download it"
            raise InputError(
                f"{name}, line {number}: expected `base64(token) rank`, found {line[:60]!r}. {remedy}."
            ) from None
        if rank in tokens:
            raise InputError(f"{name}, line {number}: rank {rank} was given already, in line {line_of_rank[rank]}.")
        if token in line_of_token:
            raise InputError(
                f"{name}, line {number}: token {token!r} was given already, in line {line_of_token[token]}."
            )
        tokens[rank], line_of_rank[rank], line_of_token[token] = token, number, number
    if not tokens:
        raise InputError(f"{name}, line 1: the file is empty. Download it again.")
    if max(tokens) >= len(tokens):
        missing = next(rank for rank in range(len(tokens)) if rank not in tokens)
        follower = min(rank for rank in tokens if rank > missing)
        raise InputError(
            f"{name}, line {line_of_rank[follower]}: rank {follower} is given, but rank {missing} is missing. "
            "Ranks run from 0 without a gap, since the control tokens are numbered after them."
        )
    return [tokens[rank] for rank in range(len(tokens))]
