"""Text from a model or a file, made safe to print on a terminal.

A control character could move the cursor, set the title or, in some terminals, type. A bidirectional override shows
characters in another order than they are in. Both become visible instead.
"""

# Left and right embeddings and overrides, isolates, and what ends them; line and paragraph separators.
_REORDERING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029)
_SHOWN = {
    **{code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)},  # Unicode's pictures of them
    0x7F: 0x2421,
    **{code: f"<U+{code:04X}>" for code in (*range(0x80, 0xA0), *_REORDERING)},
}


def terminal_text(text: str) -> str:
    """The text with control characters made visible; newlines and tabs stay. Character by character: pieces of a text
    come out as the pieces of the whole."""
    return text.translate(_SHOWN)


def terminal_line(text: str) -> str:
    """`terminal_text` on one line."""
    return " ".join(terminal_text(text).split())
