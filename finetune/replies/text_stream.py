"""The text of a reply while its tokens come: in whole characters, and without what may become a stop text."""

import codecs
from collections.abc import Sequence

from finetune.replies.reply_text import reply_text
from qwenvl import QwenVLTokenizer


class TokenBytes:
    """The bytes of tokens in the text of a reply: none of control tokens, grounding tags aside."""

    def __init__(self, tokenizer: QwenVLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        if token not in self._known:
            try:
                self._known[token] = reply_text(self._tokenizer, [token], errors="strict").encode()
            except UnicodeDecodeError as error:  # a part of a character
                self._known[token] = error.object
        return self._known[token]


class TextStream:
    """The text of one reply, token by token.

    Args:
        token_bytes: of the tokenizer.
        stops: texts that end it.
        stops_in_lead: whether a stop text may begin in white space at the beginning of the reply. It does not in
            evaluation, where replies that begin with a space or an empty line are read without it (`stop_place`).

    Attributes:
        text: so far, as `reply_text` gives it for all tokens, up to a stop text.
        stopped: whether it has come to a stop text.
    """

    def __init__(self, token_bytes: TokenBytes, stops: Sequence[str] = (), *, stops_in_lead: bool = False) -> None:
        self._bytes, self._stops, self._stops_in_lead = token_bytes, stops, stops_in_lead
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._given = 0
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The next token; returns the text that is now certain to be part of the reply's, and was not given yet."""
        return self._take(self._decoder.decode(self._bytes[token]))

    def end(self) -> str:
        """There are no more tokens; returns the rest of the text."""
        piece = self._take(self._decoder.decode(b"", final=True))
        rest, self._given = self.text[self._given :], len(self.text)
        return piece + rest

    def _take(self, piece: str) -> str:
        if self.stopped:
            return ""
        self.text += piece
        if self._stops and piece:
            longest = max(map(len, self._stops))
            begin = max(self._lead, len(self.text) - len(piece) - longest + 1)
            places = [place for stop in self._stops if (place := self.text.find(stop, begin)) >= 0]
            if places:
                self.text, self.stopped = self.text[: min(places)], True
        certain = len(self.text) if self.stopped else len(self.text) - self._open()
        new, self._given = self.text[self._given : certain], max(self._given, certain)
        return new

    @property
    def _lead(self) -> int:
        """How many characters at the beginning no stop text begins in."""
        return 0 if self._stops_in_lead else len(self.text) - len(self.text.lstrip())

    def _open(self) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        begin = self._lead
        return max(
            (
                count
                for stop in self._stops
                for count in range(min(len(stop) - 1, len(self.text) - begin), 0, -1)
                if self.text.endswith(stop[:count])
            ),
            default=0,
        )
