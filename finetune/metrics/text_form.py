"""One form of Unicode for two texts that are compared: the same word may be written in different code points.

macOS, and much Vietnamese and Korean data, has `é` as `e` and an accent (NFD), while the tokenizer writes NFC. If they
were compared as they are, a right reply would be wrong.
"""

import unicodedata
from typing import Literal

LONGEST_RUN = 256
"""Combining marks in a row; no language has more than a few. Normalisation sorts each run, in quadratic time."""
_MARK_PAIRS = "\u0f73\u0f75\u0f81"  # count as letters, and decompose into two marks each


def composed(text: str, form: Literal["NFC", "NFKC"] = "NFC") -> str:
    """The text in normalisation form C; unchanged where it has a run of more than `LONGEST_RUN` combining marks.

    Args:
        text: any string.
        form: "NFKC" also gives full-width letters and digits, and other compatible forms, their plain ones.

    Source: Unicode Standard Annex #15.
    """
    if text.isascii() or _longest_run(text) > LONGEST_RUN:
        return text
    return unicodedata.normalize(form, text)


def _longest_run(text: str) -> int:
    """The most combining marks in a row."""
    longest = run = 0
    for character in text:
        run = run + 1 if unicodedata.combining(character) or character in _MARK_PAIRS else 0
        longest = max(longest, run)
    return longest
