"""What is printed: labelled lines, in which no text of a file or a model can do anything to the terminal.

A control character could move the cursor, set the title or, in some terminals, type. A bidirectional override shows
characters in another order than they are in. Both become visible instead.
"""

from typing import Protocol

LABEL_WIDTH = 11

# Left and right embeddings and overrides, isolates, and what ends them; line and paragraph separators.
_REORDERING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029)
_SHOWN: dict[int, int | str] = {
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


class Say(Protocol):
    """Prints one line: a label and what is said about it. An empty label continues the line above."""

    def __call__(self, label: str, text: object = "", /) -> None: ...


def labelled(label: str, text: object = "") -> str:
    """The line that `say` prints: the label in a column of `LABEL_WIDTH` characters, then the text."""
    return terminal_text(f"{label:<{LABEL_WIDTH}} {text}".rstrip())


def say(label: str, text: object = "", /) -> None:
    """Print a labelled line."""
    print(labelled(label, text), flush=True)


def say_nothing(label: str, text: object = "", /) -> None:
    """In place of `say` on all processes of a run but the main one."""
