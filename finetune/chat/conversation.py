"""A conversation with a model: its turns, its images (each encoded once), and the replies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune.chat.one_reply import one_reply
from finetune.errors import UserError
from finetune.replies.decoder import Decoder, PromptRow
from finetune.replies.gguf_model import GgufModel
from finetune.replies.prompt_template import in_prompt
from finetune.replies.replies import stop_ids_of, without_adapter
from finetune.replies.running_batch import ReplyRequest
from finetune.replies.sampling import Sampling
from finetune.replies.task_replies import Style
from finetune.replies.torch_decoder import TorchDecoder
from qwenvl import QwenVLConfig, QwenVLImageProcessor, QwenVLTokenizer, load_image
from qwenvl.images.page_references import find_page
from qwenvl.text.chat import Rendered, render_chat, render_prompt
from qwenvl.text.grounding import has_markup
from qwenvl.views import Views

Message = dict[str, Any]

KEPT_BYTES = 10**9
"""Memory for the turns so far, so that each is computed once; given up where memory is short."""


@dataclass
class ChatImage:
    """An image of the conversation.

    Attributes:
        path: absolute.
        size: width and height of the upright image in pixels.
        version: modification time and size of the file, which may change during the conversation.
        pixels: (pictures, 3, S, S) uint8, of the image or, with views, of its pictures.
        features: (pictures, n_queries, hidden), None until they are encoded.
    """

    path: Path
    size: tuple[int, int]
    version: tuple[int, int]
    pixels: torch.Tensor
    features: torch.Tensor | None = None


@dataclass(frozen=True)
class Answer:
    """A reply.

    Attributes:
        text: with grounding tags, without other control tokens; blank if there was no reply.
        prompt_tokens: tokens of the prompt, earlier turns included.
        ended: whether the model ended the reply; otherwise it was stopped or reached the most new tokens.
        stopped: whether Ctrl-C stopped it.
    """

    text: str
    prompt_tokens: int
    ended: bool
    stopped: bool


@dataclass
class Conversation:
    """Asks a model, turn after turn.

    Attributes:
        model: with or without adapter, in eval mode; or a GGUF model.
        tokenizer: of the model.
        image_processor: of the model; None for one that reads text only.
        style: "chat" for ChatML with all turns so far; "base" for raw text, each prompt by itself.
        system: the system message; None for the default one.
        prompt: the template that each question is put into (`prompt_template.in_prompt`); None asks it as it is.
        views: what pictures each image becomes, as the model was trained; None is itself alone.
        markup_is_text: well-formed `<ref>`, `<box>` and `<quad>` in messages are text, as the model was trained;
            otherwise tokens.
        max_new_tokens: most tokens of a reply.
        temperature: 0 always takes the likeliest token; above 0, tokens are sampled.
        messages: the turns so far, as `qwenvl.text.chat.render_chat` takes them, without the system message.
        images: of `messages`, in reading order.
        waiting: images for the next message.
        decoder: of replies.
    """

    model: torch.nn.Module | GgufModel
    tokenizer: QwenVLTokenizer
    image_processor: QwenVLImageProcessor | None
    style: Style = "chat"
    system: str | None = None
    prompt: str | None = None
    views: Views | None = None
    markup_is_text: bool = False
    max_new_tokens: int = 512
    temperature: float = 0.0
    messages: list[Message] = field(default_factory=list)
    images: list[ChatImage] = field(default_factory=list)
    waiting: list[ChatImage] = field(default_factory=list)
    decoder: Decoder = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.model, GgufModel):
            self.decoder = self.model.decoder
        else:
            self.decoder = TorchDecoder(self.model, prefix_bytes=KEPT_BYTES)

    def add_image(self, path: str | Path) -> ChatImage:
        """Put an image, or a page such as `file.pdf#3`, into the next message.

        Raises:
            UserError: the model reads text only.
            ImageError: the image cannot be read.
        """
        if self.image_processor is None:
            raise UserError("this is a text-only checkpoint: it takes no images")
        path = Path(path).expanduser().absolute()
        image = load_image(path)
        status = Path(find_page(str(path), None)[0]).stat()
        version = (status.st_mtime_ns, status.st_size)
        for known in (*self.images, *self.waiting):
            if (known.path, known.version) == (path, version):
                self.waiting.append(known)
                return known
        pictures = [image] if self.views is None else self.views.pictures(image)
        pixels = self.image_processor(pictures, do_normalize=False, return_tensors="pt")["pixel_values"]
        self.waiting.append(ChatImage(path, image.size, version, pixels))
        return self.waiting[-1]

    def forget(self) -> None:
        """Start over; the system message stays."""
        self.messages, self.images, self.waiting = [], [], []

    @property
    def with_system(self) -> list[Message]:
        """All messages, starting with the given system message."""
        return self._with_system(self.messages)

    def ask(self, text: str, on_text: Callable[[str], None] = lambda piece: None) -> Answer:
        """Add a message and reply to it. A turn without a reply is dropped; its images stay for the next message.

        Args:
            text: the question, which `prompt` is put around; well-formed `<ref>`, `<box>` and `<quad>` become tokens
                unless `markup_is_text`.
            on_text: called with the pieces of the reply, in whole characters; bytes that are not UTF-8 become U+FFFD.

        Returns:
            The reply; Ctrl-C during generation stops it.

        Raises:
            InputError: text that cannot be encoded, or a conversation that is longer than the model allows.
        """
        if self.style == "base":  # it has no turns
            self.messages, self.images = [], []
        images = [*self.images, *self.waiting]
        messages = [*self.messages, self._user_message(in_prompt(text, self.prompt))]
        prompt = self._render(messages)
        room = self.decoder.context - len(prompt.ids)
        if room < 1:
            raise UserError(
                f"the conversation is {len(prompt.ids):,} tokens long{self.cost_of_pictures(images)}, and the model "
                f"takes {self.decoder.context:,}: start a new one"
            )
        answer = self._generate(prompt, images, min(room, self.max_new_tokens), on_text)
        if answer.text.strip():
            reply = {"role": "assistant", "content": answer.text, **self._grounding_flag(answer.text)}
            self.messages, self.images, self.waiting = [*messages, reply], images, []
        return answer

    def cost_of_pictures(self, images: Sequence[ChatImage]) -> str:
        """What the views take of a conversation's length, in words; empty without views or images."""
        if self.views is None or not images:
            return ""
        pictures = self.views.count * len(images)
        return f" ({pictures * (self.config.n_queries + 2):,} of them for {pictures:,} pictures, {self.views})"

    @property
    def config(self) -> QwenVLConfig:
        """Of the model."""
        return self.model.config if isinstance(self.model, GgufModel) else without_adapter(self.model).config

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *messages]

    def _user_message(self, text: str) -> Message:
        if not self.waiting:
            return {"role": "user", "content": text, **self._grounding_flag(text)}
        parts = [{"type": "image", "image": str(image.path)} for image in self.waiting]
        return {"role": "user", "content": [*parts, {"type": "text", "text": text}], **self._grounding_flag(text)}

    def _grounding_flag(self, text: str) -> dict[str, bool]:
        """The key that turns a message's markup into tokens, if it has any and they are not to be text."""
        return {"grounding": True} if has_markup(text) and not self.markup_is_text else {}

    def _render(self, messages: Sequence[Message]) -> Rendered:
        n_queries = self.config.n_queries
        if self.style == "base":
            message = messages[-1]
            return render_prompt(
                message["content"],
                self.tokenizer,
                grounding=message.get("grounding", False),
                views=self.views,
                n_queries=n_queries,
            )
        return render_chat(
            self._with_system(messages),
            self.tokenizer,
            add_generation_prompt=True,
            views=self.views,
            n_queries=n_queries,
        )

    def _generate(
        self, prompt: Rendered, images: Sequence[ChatImage], max_new_tokens: int, on_text: Callable[[str], None]
    ) -> Answer:
        keys = [f"{image.path} {image.version} {part}" for image in images for part in range(len(image.pixels))]
        request = ReplyRequest(
            PromptRow(prompt.ids, self._features(images), keys),
            max_new_tokens,
            self._stop_ids,
            sampling=Sampling(temperature=self.temperature),
        )
        reply = one_reply(self.decoder, self.tokenizer, request, on_text)
        return Answer(reply.text, len(prompt.ids), reply.ended, reply.stopped)

    @property
    def _stop_ids(self) -> tuple[int, ...]:
        if isinstance(self.model, GgufModel):
            return self.model.stop_ids
        return stop_ids_of(self.model, self.tokenizer, self.style)

    @torch.no_grad()
    def _features(self, images: Sequence[ChatImage]) -> list[torch.Tensor]:
        """(n_queries, hidden) of each picture, in reading order."""
        features: list[torch.Tensor] = []
        for image in images:
            if image.features is None:
                image.features = self._encode(image.pixels)
            features.extend(image.features)
        return features

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        if isinstance(self.model, GgufModel):
            return self.model.encode(pixels)
        base = without_adapter(self.model)
        return base.get_image_features(pixels.to(base.device))
