"""A model that the page asks."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from finetune.replies.task_replies import Style
from finetune.serve.asked import Event
from finetune.serve.replier import Cancellable
from qwenvl.views import Views

Message = dict[str, Any]
"""As `qwenvl.text.chat.render_chat` takes it; images are sources that `load_image` takes with `pictures.ACCESS`."""


class AskedModel(Protocol):
    """A model, and how it is asked."""

    @property
    def title(self) -> str:
        """Its name."""

    @property
    def about(self) -> Sequence[str]:
        """What it is and how it is asked, a sentence each."""

    @property
    def template(self) -> str | None:
        """The prompt that it was trained with, with a place for the question; None where there is not one."""

    @property
    def style(self) -> Style:
        """ "chat", or "base" for raw text, which has no turns."""

    @property
    def views(self) -> Views | None:
        """What pictures it is shown of each image."""

    @property
    def takes_images(self) -> bool:
        """Whether it reads images."""

    @property
    def markup_is_text(self) -> bool:
        """Whether `<ref>`, `<box>` and `<quad>` in messages are text to it."""

    @property
    def trained_length(self) -> int:
        """Tokens of the conversations that it was trained on, at most."""

    def ask(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        temperature: float,
        on_event: Callable[[Event], None],
    ) -> Cancellable:
        """Ask for the next reply. Does not wait.

        Args:
            messages: the conversation up to the message that is to be replied to, without the system message.
            on_event: called with each event, from another thread.

        Raises:
            QueueFull, EngineClosed: it takes no more now.
            InputError: it cannot be asked this.
        """
