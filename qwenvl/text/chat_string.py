"""A conversation as one string, and that string as tokens: for tools that handle prompts as text.

Preference trainers and servers render a chat to a string, cut it, and tokenize the pieces. `read_string` of
`write_chat`'s string gives the same ids as `chat.render_chat`. Control tokens that are structure are written as they
are; one that a message's *text* spells is wrapped in two private-use characters (those with which Transformers marks
such text) and read back as text.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwenvl.errors import InputError
from qwenvl.text.chat import ImageSlot, Piece, Rendered, Tag, Writer, read_prompt, read_turns
from qwenvl.text.image_parts import IMAGE_SOURCE_KEYS
from qwenvl.text.vocabulary import CONTROL_TOKENS
from qwenvl.views import Views

if TYPE_CHECKING:
    from qwenvl.text.tokenizer import QwenVLTokenizer

MARK_OPEN, MARK_CLOSE = "\U000f0000", "\U000f0001"
IMAGE_PLACEHOLDER = "<img></img>"
_IN_TEXT = re.compile("|".join(map(re.escape, (*CONTROL_TOKENS, MARK_OPEN, MARK_CLOSE))))

# For tools that only accept Jinja templates (servers, TRL's checks). It cannot tell control tokens that a text spells
# from structure, so this project renders with `chat.py`; a test keeps the two equal on ordinary conversations.
CHAT_TEMPLATE = """\
{%- set pictures = namespace(seen=0) -%}
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' and message['train'] is not false -%}
{%- generation -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endgeneration -%}
{%- else -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
{%- set pictures.seen = pictures.seen + 1 -%}
{{- 'Picture ' ~ pictures.seen ~ ':<img></img>\\n' -}}
{%- else -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def write_chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    grounding: bool = False,
    numbered: bool = True,
    views: Views | None = None,
) -> str:
    """Write the conversation as a string; an image is `<img></img>`. Arguments and errors as in `chat.render_chat`."""
    written = []
    for turn in read_turns(messages, grounding, numbered, continue_final_message, add_generation_prompt, views):
        written += [f"<|im_start|>{turn.role}\n", _write_pieces(turn.pieces), "<|im_end|>\n" if turn.closed else ""]
    return "".join(written)


def write_prompt(
    content: str | Sequence[Mapping[str, Any]], *, grounding: bool = False, numbered: bool = False
) -> str:
    """Write a raw prompt as a string, as `write_chat`. Arguments and errors as in `chat.render_prompt`."""
    return _write_pieces(read_prompt(content, grounding, numbered, open_box=True))


def _write_pieces(pieces: Sequence[Piece]) -> str:
    return "".join(
        _IN_TEXT.sub(rf"{MARK_OPEN}\g<0>{MARK_CLOSE}", piece)
        if isinstance(piece, str)
        else piece.token
        if isinstance(piece, Tag)
        else IMAGE_PLACEHOLDER
        for piece in pieces
    )


def read_string(string: str, tokenizer: "QwenVLTokenizer", *, n_queries: int = 256) -> Rendered:
    """Tokenize a string as `write_chat` makes it, or a piece of one; none of its tokens is trained.

    An image is `<img></img>`, with any number of `<imgpad>` between. Its source is None: the string names no images.

    Raises:
        InputError: an `<img>` that is not such a placeholder. Paths between the tags, as in the published data, are
            never opened.
    """
    writer = Writer(tokenizer, n_queries)
    for piece in _read_pieces(string, tokenizer):
        if isinstance(piece, ImageSlot):
            writer.image(piece)
        elif isinstance(piece, Tag):
            writer.control(tokenizer.control_tokens[piece.token], train=False)
        else:
            writer.text(piece, train=False)
    return writer.rendered


def _read_pieces(string: str, tokenizer: "QwenVLTokenizer") -> list[Piece]:
    """Cut a string into text runs, control tokens and image placeholders."""
    tokens = "|".join(re.escape(token) for token in tokenizer.control_tokens)
    pattern = re.compile(
        rf"{MARK_OPEN}(?P<literal>{tokens}|{MARK_OPEN}|{MARK_CLOSE}){MARK_CLOSE}"
        r"|(?P<image><img>(?:<imgpad>)*+</img>)"
        rf"|(?P<control>{tokens})"
    )
    pieces: list[Piece] = []
    text, cursor, images = "", 0, 0
    for match in pattern.finditer(string):
        text += string[cursor : match.start()]
        cursor = match.end()
        if match["literal"] is not None:
            text += match["literal"]
            continue
        pieces += _text_runs(text, pieces)
        text = ""
        if match["image"] is not None:
            images += 1
            pieces.append(ImageSlot(images, None))
        elif match["control"] in ("<img>", "</img>", "<imgpad>"):
            raise InputError(
                f"the text holds {match['control']} at character {match.start()}, which is not part of an image "
                f"placeholder ({IMAGE_PLACEHOLDER}). Paths inside the text are not opened: pass the images beside it, "
                f"or as message parts with one of {', '.join(IMAGE_SOURCE_KEYS)}"
            )
        else:
            pieces.append(Tag(match["control"]))
    return pieces + _text_runs(text + string[cursor:], pieces)


def _text_runs(text: str, before: list[Piece]) -> list[Piece]:
    """The text as it is encoded: after `<|im_start|>` the role and its newline are runs of their own."""
    if before and before[-1] == Tag("<|im_start|>") and "\n" in text:
        role, content = text.split("\n", 1)
        return [run for run in (role, "\n", content) if run]
    return [text] if text else []
