"""How training renders a sample, and which samples it leaves out; the check, the collator and previews share it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune.data.checks.shortening import Fitted, OnLong, render_fitting
from finetune.data.message_parts import boxes_inside
from qwenvl.text.chat import LabelRule, train_last_only
from qwenvl.text.tokenizer import QwenVLTokenizer
from qwenvl.views import Views

TrainOn = Literal["all", "last"]


def trained_labels(labels: LabelRule, train_on: TrainOn) -> LabelRule:
    """Which tokens are trained: of a last reply alone never the structure, which is that of all turns."""
    return "assistant" if train_on == "last" else labels


@dataclass(frozen=True)
class Rules:
    """How training renders a sample, and which samples it leaves out.

    Attributes:
        tokenizer, labels, grounding, n_queries: as for `chat.render_chat`.
        max_length: tokens a sample may have; None is any number.
        on_long: "error" refuses data with longer samples, "drop" leaves these out and counts them, "drop_turns" leaves
            out turns at their front where that is enough (see `shortening.render_fitting`).
        on_bad_row: "error" refuses data with samples that cannot be used, "skip" leaves these out and lists them.
        box_edge: what coordinates of 1000 in boxes are: an "error", or with "clamp" 999.
        identify: note what each sample is made of, to find those that train and evaluate (see `overlap`).
        markup_as_text: kinds of markup that are text where no format reads them (see `markup`); others are refused.
        views: what pictures an image becomes; None is itself alone.
        train_on: "last" trains the last reply of a conversation alone, and with it nothing of the turns' structure,
            whatever `labels` says; of evaluation data the loss is of the same.
    """

    tokenizer: QwenVLTokenizer
    max_length: int | None
    n_queries: int = 256
    labels: LabelRule = "assistant"
    grounding: bool = False
    on_long: OnLong = "error"
    on_bad_row: Literal["error", "skip"] = "error"
    box_edge: Literal["error", "clamp"] = "error"
    identify: bool = False
    markup_as_text: frozenset[str] = frozenset()
    views: Views | None = None
    train_on: TrainOn = "all"

    @property
    def pictures(self) -> int:
        """Pictures of one image."""
        return 1 if self.views is None else self.views.count

    def fit(self, messages: Sequence[Mapping[str, Any]]) -> Fitted:
        """Render messages as they are trained.

        Raises:
            InputError: as `chat.render_chat`.
        """
        return render_fitting(
            self.read(messages),
            self.tokenizer,
            max_length=self.max_length,
            on_long=self.on_long,
            labels=trained_labels(self.labels, self.train_on),
            grounding=self.grounding,
            n_queries=self.n_queries,
            views=self.views,
        )

    def cost(self, pictures: int, more_pages: int) -> str:
        """What the pictures of a sample cost, where recipe keys made several of an image: which, and what to do.

        Args:
            pictures: of the sample, as rendered.
            more_pages: of the sample.
        """
        made = []
        if more_pages:
            made.append((f"data.pages shows {more_pages:,} pages more", "fewer pages (data.pages.first)"))
        if self.views is not None:
            made.append((f"data.views makes {self.views.count} of an image", "fewer parts (data.views.grid)"))
        if not made or not pictures:
            return ""
        tokens = pictures * (self.n_queries + 2)
        keys, remedies = zip(*made, strict=True)
        return (
            f" ({tokens:,} of them are {pictures:,} pictures: {' and '.join(keys)}; {', '.join(remedies)}, or a "
            "larger max_length)"
        )

    def read(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """The messages with coordinates at the image's edge as `box_edge` says, and replies that are not trained by
        `train_on` marked as context."""
        messages = messages if self.box_edge == "error" else boxes_inside(messages, self.grounding)
        return messages if self.train_on == "all" else train_last_only(messages)
