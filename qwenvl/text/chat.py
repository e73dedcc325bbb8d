"""Messages to ids, labels and image order: the only place where a conversation becomes tokens.

Training, preview, chat and evaluation all call it, so the tokens that are trained are those that are shown and asked.
Control tokens are placed by id, from the structure of the messages; a message's text never becomes a control token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from qwenvl.errors import InputError
from qwenvl.text.grounding import split_markup
from qwenvl.text.image_parts import IMAGE_TYPES, image_source, picture_prefix, put_pictures
from qwenvl.views import Views

if TYPE_CHECKING:
    from qwenvl.text.tokenizer import QwenVLTokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."
IGNORED = -100
"""Label of a token that is not trained."""

LabelRule = Literal["assistant", "structure"]
LABEL_RULES: tuple[LabelRule, ...] = ("assistant", "structure")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ImageSlot:
    """A place for an image in a message: its number in the conversation, from 1, and its source or None."""

    number: int
    source: Any


@dataclass(frozen=True)
class Tag:
    """A grounding tag that becomes one token."""

    token: str


Piece = str | Tag | ImageSlot


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model reads it.

    ids: token ids; an image is `<img>`, n_queries x `<imgpad>`, `</img>`.
    labels: as long as ids; the id of a trained token, `IGNORED` elsewhere.
    images: the sources in reading order, one for each image span; None for a part without a source. With views, those
        of all pictures.
    """

    ids: list[int]
    labels: list[int]
    images: list[Any]

    @property
    def supervised(self) -> int:
        """Number of trained tokens."""
        return len(self.labels) - self.labels.count(IGNORED)


class TurnOptions(TypedDict, total=False):
    """The options of `render_chat` that decide how messages become turns."""

    add_generation_prompt: bool
    continue_final_message: bool
    grounding: bool
    numbered: bool
    views: Views | None


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: "QwenVLTokenizer",
    *,
    labels: LabelRule = "assistant",
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    grounding: bool = False,
    numbered: bool = True,
    views: Views | None = None,
    n_queries: int = 256,
) -> Rendered:
    """Write a conversation in ChatML.

    Args:
        messages: `{"role": "system" | "user" | "assistant", "content": text | [parts]}`. Parts are
            `{"type": "text", "text": ...}` and `{"type": "image", "image": source}`. A message (or one text part)
            with `"grounding": True` is grounding text. An image part with `"numbered": False` gets no "Picture k:".
            An assistant's message with `"train": False` is context: it is written, and not trained. Without a system
            message the default one is written.
        tokenizer: for the ids.
        labels: which tokens are trained. "assistant": assistant text and its `<|im_end|>`. "structure", as in the
            published training script: also every `<|im_start|>`, `<|im_end|>` and the newline after it.
        add_generation_prompt: end with an open assistant turn.
        continue_final_message: leave the last message open, which must be the assistant's.
        grounding: treat every message as grounding text: well-formed `<ref>`, `<box>`, `<quad>` become tokens. All
            other markup, and markup in text that is not grounding text, stays text.
        numbered: write "Picture k:" before the k-th image of the conversation and a newline after it.
        views: what pictures an image becomes, each with a number of its own; None is the image alone.
        n_queries: positions an image takes between its tags.

    Returns:
        ids, labels and image sources.

    Raises:
        InputError: a message that is not as above; the error names its place.
    """
    if labels not in LABEL_RULES:
        raise InputError(f"labels must be one of {', '.join(LABEL_RULES)}, not {labels!r}")
    writer = Writer(tokenizer, n_queries)
    every_frame = labels == "structure"
    turns = list(read_turns(messages, grounding, numbered, continue_final_message, add_generation_prompt, views))
    for turn in turns:
        writer.control(tokenizer.im_start_id, train=every_frame)
        writer.text(turn.role, train=False)
        writer.text("\n", train=False)
        writer.pieces(turn.pieces, train=turn.trained)
        if turn.closed:
            writer.control(tokenizer.im_end_id, train=every_frame or turn.trained)
            writer.text("\n", train=every_frame)
    return writer.rendered


def render_prompt(
    content: str | Sequence[Mapping[str, Any]],
    tokenizer: "QwenVLTokenizer",
    *,
    completion: str | None = None,
    grounding: bool = False,
    numbered: bool = False,
    views: Views | None = None,
    n_queries: int = 256,
) -> Rendered:
    """Write raw text without ChatML, as the base model reads it: `<img>..</img>{question} Answer:`.

    Args:
        content: text, or parts as in `render_chat`.
        completion: the expected reply; it and the `<|endoftext|>` after it are trained.
        grounding: as in `render_chat`; a prompt may also end in an open `<box>` for the model to complete.
        numbered: write "Picture k:" before each image.
        views: as in `render_chat`.

    Raises:
        InputError: parts that are not as in `render_chat`.
    """
    writer = Writer(tokenizer, n_queries)
    writer.pieces(read_prompt(content, grounding, numbered, completion is None, views), train=False)
    if completion is not None:
        writer.pieces(_pieces(completion, "completion", grounding, numbered, _ImageCounter()), train=True)
        writer.control(tokenizer.eod_id, train=True)
    return writer.rendered


@dataclass(frozen=True)
class Turn:
    """One message as pieces; `closed` unless it is the open one at the end; whether its text is `trained`."""

    role: str
    pieces: list[Piece]
    closed: bool = True
    trained: bool = False


def read_turns(
    messages: Sequence[Mapping[str, Any]],
    grounding: bool = False,
    numbered: bool = True,
    continue_final_message: bool = False,
    add_generation_prompt: bool = False,
    views: Views | None = None,
) -> Iterator[Turn]:
    """The conversation's turns, the default system message included; arguments and errors as in `render_chat`."""
    if isinstance(messages, Mapping | str) or not isinstance(messages, Sequence):
        raise InputError(f"messages must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise InputError("messages are empty: there is nothing to write")
    if add_generation_prompt and continue_final_message:
        raise InputError("give add_generation_prompt or continue_final_message, not both")
    for index, message in enumerate(messages):
        _check_message(message, index)
    if continue_final_message and messages[-1]["role"] != "assistant":
        raise InputError("continue_final_message needs an assistant message at the end")
    contents = [message["content"] for message in messages]
    if views is not None:
        contents = put_pictures(contents, views.pictures)
    if messages[0]["role"] != "system":
        yield Turn("system", [DEFAULT_SYSTEM])
    counter = _ImageCounter()
    for index, message in enumerate(messages):
        is_open = continue_final_message and index == len(messages) - 1
        is_grounding = grounding or bool(message.get("grounding"))
        place = f"message {index} ({message['role']})"
        pieces = _pieces(contents[index], place, is_grounding, numbered, counter, open_box=is_open)
        if message["role"] != "user" and any(isinstance(piece, ImageSlot) for piece in pieces):
            raise InputError(f"{place}: only a user's message can hold images")
        yield Turn(message["role"], pieces, closed=not is_open, trained=is_trained(message))
    if add_generation_prompt:
        yield Turn("assistant", [], closed=False)


def read_prompt(
    content: str | Sequence[Mapping[str, Any]],
    grounding: bool = False,
    numbered: bool = False,
    open_box: bool = False,
    views: Views | None = None,
) -> list[Piece]:
    """A raw prompt's pieces; arguments and errors as in `render_prompt`, and `open_box`: it may end in an open one."""
    if views is not None:
        (content,) = put_pictures([content], views.pictures)
    return _pieces(content, "prompt", grounding, numbered, _ImageCounter(), open_box=open_box)


def is_trained(message: Mapping[str, Any]) -> bool:
    """Whether the text of a message is trained: it is the assistant's, and not marked `"train": False`."""
    return message["role"] == "assistant" and message.get("train") is not False


def train_last_only(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with all of the assistant's but the last marked as context, `"train": False`.

    The last is trained unless it is marked itself; another one does not take its place.
    """
    last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    return [
        {**message, "train": False} if message["role"] == "assistant" and index != last else message
        for index, message in enumerate(messages)
    ]


def _check_message(message: Any, index: int) -> None:
    if not isinstance(message, Mapping):
        raise InputError(f"message {index} must be a mapping with role and content, not {type(message).__name__}")
    if message.get("role") not in ROLES:
        raise InputError(f"message {index}: role must be one of {', '.join(ROLES)}, not {message.get('role')!r}")
    if message["role"] == "system" and index:
        raise InputError(f"message {index}: a system message can only be the first")
    if message.get("content") is None:
        raise InputError(f"message {index} ({message['role']}) has no content")
    train = message.get("train")
    if train is not None and not isinstance(train, bool):
        raise InputError(f"message {index} ({message['role']}): train must be true or false, not {train!r}"[:200])
    if train and message["role"] != "assistant":
        raise InputError(f"message {index} ({message['role']}): train is true, and only the assistant's are trained")


@dataclass
class _ImageCounter:
    """Images seen so far in one conversation."""

    seen: int = 0

    def next(self) -> int:
        self.seen += 1
        return self.seen


def _pieces(
    content: str | Sequence[Mapping[str, Any]],
    place: str,
    grounding: bool,
    numbered: bool,
    counter: _ImageCounter,
    open_box: bool = False,
) -> list[Piece]:
    """Content as runs of text, grounding tags and image slots; adjacent texts are joined into one run."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise InputError(f"{place}: content must be text or a list of parts, not {type(content).__name__}")
    pieces: list[Piece] = []
    run: list[str] = []  # joined once: added one to the other, many parts would take a time of their square

    def end_run() -> None:
        if text := "".join(run):
            pieces.append(text)
        run.clear()

    for index, part in enumerate(content):
        where = f"{place}, part {index}"
        if not isinstance(part, Mapping):
            raise InputError(f"{where}: must be a mapping with a type, not {type(part).__name__}")
        if part.get("type") == "text":
            text = part.get("text")
            if not isinstance(text, str):
                raise InputError(f"{where}: text must be a string, not {type(text).__name__}")
            if not (grounding or part.get("grounding")):
                run.append(text)
                continue
            for piece, is_tag in split_markup(text, open_box=open_box and index == len(content) - 1):
                if is_tag:
                    end_run()
                    pieces.append(Tag(piece))
                else:
                    run.append(piece)
        elif part.get("type") in IMAGE_TYPES:
            is_numbered = numbered if part.get("numbered") is None else part["numbered"]
            slot = ImageSlot(counter.next(), image_source(part, where))
            if is_numbered:
                run.append(picture_prefix(slot.number))
            end_run()
            pieces.append(slot)
            if is_numbered:
                run.append("\n")
        else:
            raise InputError(f"{where}: type must be text or image, not {part.get('type')!r}")
    end_run()
    return pieces


@dataclass
class Writer:
    """Collects ids and labels piece by piece."""

    tokenizer: "QwenVLTokenizer"
    n_queries: int
    rendered: Rendered = field(default_factory=lambda: Rendered([], [], []))

    def pieces(self, pieces: Sequence[Piece], *, train: bool) -> None:
        for piece in pieces:
            if isinstance(piece, str):
                self.text(piece, train=train)
            elif isinstance(piece, Tag):
                self.control(self.tokenizer.control_tokens[piece.token], train=train)
            else:
                self.image(piece)

    def text(self, text: str, *, train: bool) -> None:
        self._write(self.tokenizer.encode_text(text), train)

    def control(self, token_id: int, *, train: bool) -> None:
        self._write([token_id], train)

    def image(self, slot: ImageSlot) -> None:
        tokenizer = self.tokenizer
        span = [tokenizer.image_start_id, *[tokenizer.image_pad_id] * self.n_queries, tokenizer.image_end_id]
        self._write(span, train=False)
        self.rendered.images.append(slot.source)

    def _write(self, ids: list[int], train: bool) -> None:
        self.rendered.ids.extend(ids)
        self.rendered.labels.extend(ids if train else [IGNORED] * len(ids))
