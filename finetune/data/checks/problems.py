"""What is wrong with a sample, as far as that is known without a tokenizer and without opening its images."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from finetune.data.checks.markup import find_markup, grounding_problems, talk_about_markup, why_refused
from finetune.data.images.image_files import check_image
from finetune.data.images.picture_numbers import refuse_moved_pictures
from finetune.data.message_parts import boxes_inside, content_parts, grounding_texts, image_sources
from finetune.data.sample import BadField, Sample
from finetune.errors import InputError
from qwenvl.text.chat import is_trained, train_last_only
from qwenvl.views import Views

MOST_IMAGES = 1000
"""Images of a row: 258,000 tokens. A row of many more would take minutes to look at, and no model could read it."""

_SHOWN_REASONS = 5  # of one sample's markup


def find_problems(
    sample: Sample,
    *,
    grounding: bool,
    markup_as_text: frozenset[str],
    box_edge: Literal["error", "clamp"] = "error",
    views: Views | None = None,
    train_on: Literal["all", "last"] = "all",
) -> tuple[list[BadField], list[str]]:
    """Everything that is wrong with a sample, and the kinds of markup that its text holds.

    Args:
        sample: of any format.
        grounding, markup_as_text, box_edge, views, train_on: see `rules.Rules`.

    Raises:
        BadField: it has more images than are looked at, or cannot be shown with views; nothing else was looked at.
    """
    if (count := sum(1 for _ in image_sources(sample.messages))) > MOST_IMAGES:
        raise BadField("images", too_many_images(count))
    if views is not None and count:
        refuse_views(sample.messages, views, grounding)
    problems: list[BadField] = []
    messages = sample.messages if box_edge == "error" else boxes_inside(sample.messages, grounding)
    if malformed := _malformed(messages, grounding, markup_as_text):
        remedy = ""
        if box_edge == "error":
            left = _malformed(boxes_inside(messages, grounding), grounding, markup_as_text)
            remedy = " (data.box_edge: clamp takes 1000 as 999)" if len(left) < len(malformed) else ""
        problems.append(BadField(malformed[0][0], _why_malformed(malformed) + remedy))
    found = find_markup(sample.messages, grounding)
    if refused := [look for look in found if look.kind not in markup_as_text]:
        problems.append(BadField(refused[0].place, why_refused(refused)))
    for number, source in enumerate(image_sources(sample.messages)):
        try:
            check_image(source, sample.access)
        except InputError as error:
            problems.append(BadField(f"images[{number}]", str(error)))
            break
    # By the messages: with labels "structure" something is trained in every conversation.
    if all(message["role"] != "assistant" for message in sample.messages):
        problems.append(BadField("messages", "nothing in it is trained: it has no assistant's turn"))
    elif not any(map(is_trained, sample.messages)):
        problems.append(BadField("messages", "nothing in it is trained: all assistant's turns are marked as context"))
    elif train_on == "last" and not any(map(is_trained, train_last_only(sample.messages))):
        reason = "nothing in it is trained: its last reply, which data.train_on: last trains, is marked as context"
        problems.append(BadField("messages", reason))
    kinds = [look.kind for look in found]
    if markup_as_text:
        for _, text in grounding_texts(messages, grounding):
            kinds += [kind for kind in talk_about_markup(text) if kind not in kinds]
    return problems, kinds


def refuse_views(messages: Sequence[Mapping[str, Any]], views: Views, grounding: bool) -> None:
    """Check that a conversation can be shown with views.

    Raises:
        BadField: it has too many pictures then, names pictures by numbers that would be others', or has boxes and no
            page that they are of.
    """
    parts = (part for message in messages for part in content_parts(message))
    if (count := views.count * sum(part["type"] == "image" for part in parts)) > MOST_IMAGES:
        raise BadField("images", f"{too_many_images(count)} (data.views makes {views.count} of an image)")
    if not views.page and (boxes := next(grounding_texts(messages, grounding), None)) is not None:
        raise BadField(
            boxes[0], "boxes are of the whole page, and data.views.page: false leaves it out: set it to true"
        )
    refuse_moved_pictures(messages, 1, "data.views")


def together(problems: Sequence[BadField]) -> BadField:
    """Several problems of a row as one."""
    first, *others = problems
    more = "".join(f"; and {problem.field}: {problem.reason}" for problem in others)
    return BadField(first.field, first.reason + more)


def _malformed(
    messages: Sequence[Mapping[str, Any]], grounding: bool, markup_as_text: frozenset[str]
) -> list[tuple[str, str]]:
    """(place, reason) of all grounding markup that the rules do not let be text."""
    return [
        (place, reason)
        for place, text in grounding_texts(messages, grounding)
        for reason in grounding_problems(text, markup_as_text)
    ]


def _why_malformed(problems: Sequence[tuple[str, str]]) -> str:
    """Everything that is wrong with the markup of a sample, in one reason."""
    first = problems[0][0]
    said = [reason if place == first else f"{place}: {reason}" for place, reason in problems[:_SHOWN_REASONS]]
    said += [f"and {len(problems) - _SHOWN_REASONS} more"] if len(problems) > _SHOWN_REASONS else []
    return f"malformed grounding markup: {'; '.join(said)}"


def too_many_images(count: int) -> str:
    """The reason against a row of more than `MOST_IMAGES` images."""
    return f"there are {count:,} in one row, and {MOST_IMAGES:,} are the most that are looked at; divide the row"
