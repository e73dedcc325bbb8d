"""Make conversations fit a maximum length by leaving out whole turns at the front.

The check of the data and the collator both render here, so what is checked is what is trained. A turn is never cut,
and is left out together with its images.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qwenvl.text.chat import LabelRule, Rendered, is_trained, render_chat
from qwenvl.text.tokenizer import QwenVLTokenizer
from qwenvl.views import Views

OnLong = Literal["error", "drop", "drop_turns"]


@dataclass(frozen=True)
class Fitted:
    """A conversation as it is trained.

    Attributes:
        messages: those that are kept: a leading system message, and the last turns.
        rendered: of these messages; longer than allowed where nothing could make it fit.
        turns_dropped: number of turns left out at the front.
    """

    messages: Sequence[Mapping[str, Any]]
    rendered: Rendered
    turns_dropped: int


def render_fitting(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: QwenVLTokenizer,
    *,
    max_length: int | None,
    on_long: OnLong,
    labels: LabelRule,
    grounding: bool,
    n_queries: int,
    views: Views | None = None,
) -> Fitted:
    """Render a conversation; if it is too long and `on_long` is "drop_turns", without as many turns as needed to fit.

    The images that are kept are renumbered: "Picture 1:" is the first of them. A conversation whose last exchange
    alone does not fit, or that may not be shortened, is returned whole and too long.

    Args:
        messages: as for `chat.render_chat`.
        max_length: tokens; None is any number.
        tokenizer, labels, grounding, n_queries, views: as for `chat.render_chat`.

    Raises:
        InputError: as `chat.render_chat`.
    """

    def render(kept: Sequence[Mapping[str, Any]]) -> Rendered:
        return render_chat(kept, tokenizer, labels=labels, grounding=grounding, n_queries=n_queries, views=views)

    rendered = render(messages)
    if on_long != "drop_turns" or max_length is None or len(rendered.ids) <= max_length:
        return Fitted(messages, rendered, 0)
    system, starts = messages[: messages[0]["role"] == "system"], turn_starts(messages)

    def without(turns: int) -> Sequence[Mapping[str, Any]]:
        return [*system, *messages[starts[turns] :]]

    # Fewer turns are never longer, so the smallest number that is enough is found by bisection.
    numbers = range(1, len(starts))
    enough = bisect_left(numbers, True, key=lambda turns: len(render(without(turns)).ids) <= max_length)
    if enough == len(numbers):
        return Fitted(messages, rendered, 0)
    kept = without(numbers[enough])
    return Fitted(kept, render(kept), numbers[enough])


def turn_starts(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Where a conversation's turns begin, as indices of messages: one or more of the user, and the replies to them.

    A reply before the first user message is a turn of its own. What stands after the last trained reply belongs to the
    turn before it, as nothing in it is trained.
    """
    roles = [message["role"] for message in messages]
    first = 1 if roles[0] == "system" else 0
    last_reply = max((index for index, message in enumerate(messages) if is_trained(message)), default=first)
    later = range(first + 1, last_reply)
    return [first, *(index for index in later if roles[index] == "user" and roles[index - 1] != "user")]
