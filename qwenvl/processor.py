"""QwenVLProcessor: messages and images to the model's inputs."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import cached_file

from qwenvl.checkpoint.pretrained_errors import pretrained_errors
from qwenvl.checkpoint.record import trained_as
from qwenvl.checkpoint.settings import examine_settings
from qwenvl.errors import InputError
from qwenvl.images.image_processor import QwenVLImageProcessor
from qwenvl.images.images import ImageAccess
from qwenvl.model.configuration import QwenVLConfig
from qwenvl.text.chat import Rendered, TurnOptions, render_chat
from qwenvl.text.chat_string import CHAT_TEMPLATE, IMAGE_PLACEHOLDER, read_string, write_chat
from qwenvl.text.model_inputs import ModelInputs, check_template_arguments, conversation_batch, input_columns
from qwenvl.text.tokenizer import QwenVLTokenizer
from qwenvl.views import PagePart, Views


class QwenVLProcessor(ProcessorMixin):
    """Turn conversations (or prompt strings) with images into `input_ids`, `attention_mask`, `pixel_values`.

    Args:
        image_processor: images to `pixel_values`.
        tokenizer: text to ids.
        n_queries: positions of an image between `<img>` and `</img>`.
        chat_template: for other programs only; conversations are rendered by `qwenvl.text.chat`.

    Attributes:
        system: the system message of conversations that bring none; None for the default one. `from_pretrained` sets
            it to that of the model's training, by its record (`qwenvl.json`).
        views: what pictures each image becomes, in conversations and in `__call__`; None is itself alone.
            `from_pretrained` sets it to those of the model's training.
    """

    def __init__(
        self,
        image_processor: QwenVLImageProcessor,
        tokenizer: QwenVLTokenizer,
        n_queries: int = 256,
        chat_template: str | None = None,
    ):
        self.n_queries = n_queries
        self.system: str | None = None
        self.views: Views | None = None
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_pad_id
        self.image_placeholder = IMAGE_PLACEHOLDER

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        **kwargs: Any,
    ) -> "QwenVLProcessor":
        """Load from a hub id or a folder, arguments as in Transformers.

        A folder saved by this class has a file for the image processor. A published one has none: its settings follow
        from the model's `config.json`. The record of a model's training is read with the default revision alone, and
        that of an adapter by `load_processor`.

        Raises:
            MissingFileError: there is no such folder or hub id.
            InputError: files that are damaged, a text-only checkpoint, or a vocabulary of another model.
        """
        path = pretrained_model_name_or_path
        hub: dict[str, Any] = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
            "revision": revision,
            **{key: kwargs[key] for key in ("proxies", "subfolder") if kwargs.get(key) is not None},
        }
        if Path(path).is_dir():
            examine_settings(Path(path, kwargs.get("subfolder") or ""))
        processor = cls._from_files(path, hub)
        if revision in (None, "main") and cache_dir is None and token is None and kwargs.get("subfolder") is None:
            record = trained_as(os.fspath(path))
            processor.system, processor.views = record.system, record.views
        return processor

    @classmethod
    def _from_files(cls, path: str | os.PathLike[str], hub: dict[str, Any]) -> "QwenVLProcessor":
        """The processor that the tokenizer's, the image processor's and the model's files say.

        Args:
            hub: arguments with which Transformers finds a file.
        """
        with pretrained_errors(path):
            tokenizer = QwenVLTokenizer.from_pretrained(path, **hub)
            saved = {
                name: cached_file(
                    path,
                    name,
                    **hub,
                    _raise_exceptions_for_missing_entries=False,
                    _raise_exceptions_for_gated_repo=False,
                    _raise_exceptions_for_connection_errors=False,
                )
                for name in ("processor_config.json", "preprocessor_config.json")
            }
            if not any(saved.values()):
                return cls.from_config(QwenVLConfig.from_pretrained(path, **hub), tokenizer)
            image_processor = QwenVLImageProcessor.from_pretrained(path, **hub)
            n_queries = None
            if saved["processor_config.json"]:
                n_queries = cls.get_processor_dict(path, **hub)[0].get("n_queries")
            if n_queries is None or Path(path, "config.json").is_file():
                wanted = QwenVLConfig.from_pretrained(path, **hub).n_queries
                if n_queries not in (None, wanted):
                    raise InputError(
                        f"{path}: processor_config.json says n_queries {n_queries}, but by config.json an image has "
                        f"{wanted} positions: restore the one that was changed"
                    )
                n_queries = wanted
        return cls(image_processor, tokenizer, n_queries)

    @classmethod
    def from_config(cls, config: QwenVLConfig, tokenizer: QwenVLTokenizer) -> "QwenVLProcessor":
        """Build the processor that fits a model's configuration.

        Raises:
            InputError: a text-only checkpoint, or a vocabulary that is not the model's.
        """
        if config.visual is None:
            raise InputError(
                "this is a text-only Qwen checkpoint (its config has no `visual`): it needs a tokenizer, no processor"
            )
        if tokenizer.image_start_id != config.image_start_id:
            raise InputError(
                f"vocabulary and model do not fit together: <img> is id {tokenizer.image_start_id} by qwen.tiktoken "
                f"but {config.image_start_id} by config.json (visual.image_start_id). Restore the published files"
            )
        return cls(QwenVLImageProcessor(size=config.visual["image_size"]), tokenizer, config.n_queries)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        access: ImageAccess | None = None,
        return_tensors: str | None = None,
        sanitize_control_tokens: bool = True,
        **layout: Any,
    ) -> BatchFeature:
        """Turn prompt strings, as `apply_chat_template(tokenize=False)` writes them, into model inputs.

        Control tokens in the strings are structure: build the strings with `apply_chat_template`, which marks those
        that a message's text spells. An image is `<img></img>`.

        Args:
            images: one image, a list, or a list for each string: in reading order, one for each placeholder; with
                `views` one for the placeholders of all its pictures.
            text: one string or a batch of them.
            access: what image references may reach; see `images.ImageAccess`.
            return_tensors: as in Transformers.
            sanitize_control_tokens: accepted for compatibility; marked tokens are always text.
            layout: `padding`, `padding_side`, `truncation`, `max_length`, ...: see `model_inputs.input_columns`.

        Returns:
            `input_ids` and `attention_mask` (batch, length), as lists unless `return_tensors` is given, and, if there
            are images, `pixel_values` (images of the whole batch, 3, S, S). Labels that are set on it leave image
            placeholders out (see `ModelInputs`).

        Raises:
            InputError: images and placeholders differ in number; truncation inside or before an image.
            ImageError: an image that cannot be read.
        """
        if text is None:
            if images is None:
                raise InputError("give text, images or both")
            sources = _flatten(images)
            if self.views is not None:
                sources = [picture for source in sources for picture in self.views.pictures(source)]
            return BatchFeature({"pixel_values": self._pixel_values(sources, access)})
        strings = [text] if isinstance(text, str) else list(text)
        rendered = [read_string(string, self.tokenizer, n_queries=self.n_queries) for string in strings]
        if self.views is not None:
            rendered = [_with_views(one, self.views, f"text {index}") for index, one in enumerate(rendered)]
        return self._batch(rendered, images=images, access=access, return_tensors=return_tensors, **layout)

    def apply_chat_template(  # type: ignore[override]  # options by keyword only, and no tools or documents
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        grounding: bool = False,
        numbered: bool = True,
        processor_kwargs: Mapping[str, Any] | None = None,
        tools: None = None,
        documents: None = None,
        sanitize_control_tokens: bool = True,
        load_audio_from_video: bool = False,
        **kwargs: Any,
    ) -> BatchFeature | list | str:
        """Render a conversation, or a batch of them, in Transformers' message format.

        Args:
            conversation: messages as in `chat.render_chat`.
            chat_template: this processor's own, or None: conversations are rendered by `qwenvl.text.chat`.
            tokenize: return ids (True) or a string for `__call__` (False).
            return_dict: return `input_ids`, `attention_mask`, `pixel_values`, not only the ids.
            return_assistant_tokens_mask: add `assistant_masks`, 1 for tokens that the label rule "assistant" trains.
            grounding, numbered: see `chat.render_chat`.
            processor_kwargs, kwargs: `images` (for parts without a source), and the keywords of `__call__`.
            tools, documents: not supported.
            sanitize_control_tokens: accepted for compatibility; text never becomes a control token.
            load_audio_from_video: accepted for compatibility, and without effect: videos are refused.

        Raises:
            InputError: malformed messages (the place is named), another chat template, tools or documents.
        """
        check_template_arguments(chat_template, self.chat_template, tools, documents)
        conversations, is_batch = conversation_batch(conversation)
        conversations = [self._with_system(messages) for messages in conversations]
        how: TurnOptions = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "grounding": grounding,
            "numbered": numbered,
            "views": self.views,
        }
        if not tokenize:
            strings = [write_chat(messages, **how) for messages in conversations]
            return strings if is_batch else strings[0]
        rendered = [
            render_chat(messages, self.tokenizer, n_queries=self.n_queries, **how) for messages in conversations
        ]
        options = {"images": None, "access": None, **(processor_kwargs or {}), **kwargs}
        if return_tensors not in (None, "auto"):
            options["return_tensors"] = return_tensors
        batch = self._batch(rendered, assistant_masks=return_assistant_tokens_mask, **options)
        return batch if return_dict else batch["input_ids"]

    def _with_system(self, messages: Any) -> Any:
        """A conversation with the processor's system message before it; one that is malformed is left as it is."""
        first = messages[0] if isinstance(messages, Sequence) and messages else None
        if self.system is None or not isinstance(first, Mapping) or first.get("role") == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def _batch(
        self,
        rendered: list[Rendered],
        *,
        images: Any,
        access: ImageAccess | None,
        return_tensors: str | None = None,
        **layout: Any,
    ) -> BatchFeature:
        sources = _fill_sources([one.images for one in rendered], images, self.views)
        columns = input_columns(rendered, self.tokenizer, **layout)
        batch = ModelInputs(columns, tensor_type=return_tensors, image_token_id=self.image_token_id)
        if any(sources):
            batch["pixel_values"] = self._pixel_values(_flatten(sources), access)
        return batch

    def _pixel_values(self, sources: list[Any], access: ImageAccess | None) -> torch.Tensor:
        options = {} if access is None else {"access": access}
        return self.image_processor(sources, return_tensors="pt", **options)["pixel_values"]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def _flatten(images: Any) -> list[Any]:
    """One image, a list, or nested lists of them, as one list in reading order."""
    if not isinstance(images, list | tuple):
        return [images]
    return [image for item in images for image in _flatten(item)]


def _with_views(rendered: Rendered, views: Views, name: str) -> Rendered:
    """A string's placeholders as the pictures of images that are given beside it.

    Raises:
        InputError: the placeholders are not those of whole images.
    """
    images, left = divmod(len(rendered.images), views.count)
    if left:
        raise InputError(
            f"{name}: it has {len(rendered.images)} image placeholder(s), and this model was trained with views, so "
            f"that each image takes {views.count} ({views}): write it with processor.apply_chat_template, or set "
            "processor.views = None to give every picture yourself"
        )
    return replace(rendered, images=[picture for _ in range(images) for picture in views.pictures(None)])


def _fill_sources(sources: list[list[Any]], images: Any, views: Views | None) -> list[list[Any]]:
    """Assign the images given beside the messages to the places without a source, in reading order; an image has one
    place, which with views is that of all its pictures.

    Raises:
        InputError: more or fewer images than such places, in the batch or, for nested images, in one row.
    """
    given = [] if images is None else images if isinstance(images, list | tuple) else [images]
    if given and len(given) == len(sources) and all(isinstance(item, list | tuple) for item in given):
        return [
            _fill_row(row, _flatten(list(row_images)), views, f"row {index}: ")
            for index, (row, row_images) in enumerate(zip(sources, given, strict=True))
        ]
    flat = _fill_row([source for row in sources for source in row], _flatten(list(given)), views, "")
    remaining = iter(flat)
    return [[next(remaining) for _ in row] for row in sources]


def _fill_row(sources: list[Any], images: list[Any], views: Views | None, where: str) -> list[Any]:
    open_places = [index for index, source in enumerate(sources) if _is_open(source)]
    pictures = 1 if views is None else views.count
    if len(open_places) != len(images) * pictures:
        of_views = "" if views is None else f" (each is shown as {views}: give whole images, not their parts)"
        raise InputError(
            f"{where}{len(images)} image(s) are given for {len(open_places) // pictures} place(s) without an image of "
            f"their own{of_views}"
        )
    filled = list(sources)
    for number, place in enumerate(open_places):
        image, part = images[number // pictures], sources[place]
        filled[place] = image if part is None else replace(part, source=image)
    return filled


def _is_open(source: Any) -> bool:
    return source is None or (isinstance(source, PagePart) and source.source is None)
