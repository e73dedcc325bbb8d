"""Text that looks like the markup of another format, or like a control token, and would be trained as words.

Which format reads `<image>` or `<img src="a.png">` is a matter of the recipe: in the wrong one, the letters are
trained and the image is not. The names of what was found are those that `data.markup_as_text` takes: `<image>`,
`<img>`, `<|im_end|>`, `[IMG]`, `<box>`, ...
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.message_parts import content_parts
from finetune.errors import UserError
from qwenvl.text.grounding import parse_grounding, split_markup

# Each alternative begins with a fixed character, by which the search skips ordinary text. Repetitions are bounded.
_LOOKS = re.compile(
    r"""<\s{0,3}/?\s{0,3}(?i:img|image)s?(?i:[\s_-]?(?:[0-9]{1,3}|pad|context|here|start|end|token|placeholder|
            soft_token))?(?:\s?/?>|(?=\s[^<>\n]{0,300}=)|(?=\s?\Z))
      | <\|[^\s|<>]{1,40}\|>
      | </?(?:ref|box|quad)>
      | </?(?i:bbox|ref-object|cls-object|video|audio|grounding|start_of_image|start_of_turn|end_of_turn|im_start|
            im_end|im_patch|fake_token_around_image)>
      | <(?:loc|patch_index)_?[0-9]{0,4}>
      | \[/?(?:IMG|IMG_BREAK|IMG_END|INST)\]
      | Picture[ ][0-9]{1,3}:\s{0,3}(?:[^\s<>()]{1,200}\.(?i:png|jpe?g|webp|gif|bmp|tiff?|pdf)
            |[^\n<>]{1,200}\.(?i:png|jpe?g|webp|gif|bmp|tiff?|pdf)(?:\#[0-9]{1,9})?[ \t]{0,9}(?:\n|\Z))
      | data:image/""",
    re.VERBOSE,
)
_IN_GROUNDING = frozenset({"<ref>", "<box>", "<quad>"})
_PICTURE = "Picture 1:"
_SHOWN = 60  # characters of a text that are shown
_COORDINATES = re.compile(r"[\s0-9.,;()\[\]{}+-]*[0-9][\s0-9.,;()\[\]{}+-]*")


@dataclass(frozen=True)
class LookAlike:
    """A piece of markup in a text: what kind it is, the message it is in, and the text around it."""

    kind: str
    place: str
    shown: str


def markup_kind(written: str) -> str | None:
    """The kind of a piece of markup, as `data.markup_as_text` names it; None for what is no such piece.

    `<IMG>`, `</img>` and `<img src` are `<img>`; `<image 2>` is `<image>`; `[/INST]` is `[INST]`.
    """
    if re.match(r"Picture( [0-9]+)?:", written):
        return _PICTURE
    # "<img src" and "<box" are the beginnings of such pieces.
    match = _LOOKS.match(written) or _LOOKS.match(f"{written}>") or _LOOKS.match(f"{written}=")
    return None if match is None else _kind(match[0])


def check_markup_names(names: Sequence[str]) -> frozenset[str]:
    """The kinds that a recipe's `data.markup_as_text` names.

    Raises:
        UserError: a name of nothing that is looked for.
    """
    kinds = set()
    for name in names:
        kind = markup_kind(name)
        if kind is None:
            raise UserError(
                f"data.markup_as_text: {name!r} is not looked for in texts; name what the check reports, such as "
                "<image>, <img>, <box> or <|im_end|>"
            )
        kinds.add(kind)
    return frozenset(kinds)


def find_markup(messages: Sequence[Mapping[str, Any]], grounding: bool) -> list[LookAlike]:
    """What is looked for in the texts of a conversation, the first of each kind.

    Args:
        grounding: whether all texts are grounding text, whose `<ref>`, `<box>` and `<quad>` are read.
    """
    found: dict[str, LookAlike] = {}
    for place, text, marked in _texts(messages, grounding):
        if "<" not in text and "[" not in text and "Picture " not in text and "data:image/" not in text:
            continue
        for match in _LOOKS.finditer(text):
            kind = _kind(match[0])
            if kind not in found and not (marked and kind in _IN_GROUNDING):
                start = max(0, match.start() - _SHOWN // 3)
                found[kind] = LookAlike(kind, place, text[start : start + _SHOWN])
    return list(found.values())


def why_refused(found: Sequence[LookAlike]) -> str:
    """One sentence about look-alikes that no recipe names, for the problem of their row."""
    kinds = [look.kind for look in found]
    hint = next((hint for names, hint in _HINTS if names.intersection(kinds)), "use a format that reads it")
    if kinds[0].startswith("<|"):
        hint = "control tokens are the format's to place, so take it out"
    named = ", ".join(kind if kind.startswith("<") else f'"{kind}"' for kind in kinds)
    looks = "looks" if len(kinds) == 1 else "look"
    return (
        f"{', '.join(kinds)} {looks} like markup, but would be trained as words ({found[0].shown!r}): {hint}, or say "
        f"that this is text with data.markup_as_text: [{named}]"
    )


def grounding_problems(text: str, allowed: Collection[str]) -> list[str]:
    """What is wrong with the markup of a grounding text, in its order.

    Args:
        allowed: kinds that may be text. Tags that hold no coordinates are then talk about the markup; coordinates
            that are written wrongly stay a problem.
    """
    reasons = []
    for problem in parse_grounding(text).problems:
        written = text[slice(*problem.span)]
        kind = markup_kind(written)
        is_talk = not problem.repaired and not _COORDINATES.fullmatch(re.sub("<[^<>]*>", "", written))
        if not is_talk:
            reasons.append(problem.reason)
        elif kind not in allowed:
            reasons.append(f"{problem.reason}; data.markup_as_text: [{kind}] trains talk about the markup as text")
    return reasons


def talk_about_markup(text: str) -> list[str]:
    """The kinds of tags in a grounding text that are no tokens, and so are trained as words."""
    words = [piece for piece, is_tag in split_markup(text) if not is_tag]
    kinds = [_kind(match[0]) for piece in words for match in _LOOKS.finditer(piece)]
    return list(dict.fromkeys(kind for kind in kinds if kind in _IN_GROUNDING))


def _kind(written: str) -> str:
    if written.startswith("Picture"):
        return _PICTURE
    if written.startswith("data:"):
        return "data:image/"
    if written.startswith("["):
        return "[INST]" if "INST" in written else "[IMG]"
    if written.startswith("<|"):
        return written.lower()
    word = re.sub(r"[^a-z_-]", "", written.lower()).strip("_-")
    if word.startswith("image"):
        return "<image>"
    return "<img>" if word.startswith("img") else f"<{word}>"


def _texts(messages: Sequence[Mapping[str, Any]], grounding: bool) -> Iterator[tuple[str, str, bool]]:
    """(place, text, whether it is grounding text) of all texts."""
    for index, message in enumerate(messages):
        marked = grounding or bool(message.get("grounding"))
        for part in content_parts(message):
            if part["type"] == "text":
                yield f"messages[{index}]", part["text"], marked or bool(part.get("grounding"))


_HINTS = (
    (frozenset({"<image>"}), "formats messages, llava, swift and texts put the row's images there"),
    (frozenset({"<img>", _PICTURE}), "format qwen_json reads <img>path</img>"),
    (_IN_GROUNDING, "data.grounding: true reads <ref>, <box> and <quad> as the model's own"),
    (frozenset({"<bbox>", "<ref-object>"}), "format swift fills them from objects"),
    (frozenset({"data:image/"}), "give the image a part of its own"),
)
