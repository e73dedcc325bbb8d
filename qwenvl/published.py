"""The published model's way to be asked, for code that was written against it.

    query = from_list_format([{"image": "receipt.jpg"}, {"text": "What is the total?"}])
    reply, history = chat(model, processor, query=query, history=None)
    reply, history = chat(model, processor, "Find it.", history=history)
    picture = draw_bbox_on_latest_picture(reply, history)  # a PIL image, None without boxes

A query of `from_list_format` carries its images; a string is only text, whatever it spells. The ids are the published
ones, except that pictures are numbered over the whole conversation (there: anew in each list) and that no turn is left
out (there: the oldest, beyond `max_window_size`).
"""

import queue
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import BatchFeature, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qwenvl.errors import InputError
from qwenvl.images.drawing import draw_regions
from qwenvl.images.images import ImageAccess, load_image
from qwenvl.model.modeling import QwenVLForConditionalGeneration
from qwenvl.processor import QwenVLProcessor
from qwenvl.text.chat import DEFAULT_SYSTEM
from qwenvl.text.grounding import parse_grounding
from qwenvl.text.list_format import Query, from_list_format

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Query", "as_messages", "chat", "chat_stream", "draw_bbox_on_latest_picture", "from_list_format"]

_IMAGE_IN_TEXT = re.compile(r"<img>.*?</img>", re.DOTALL)

# Keywords of the published `chat`, and of `generate`, that a reply as text and a history leave no room for.
_REFUSED = {
    "tokenizer": "give the processor in its place",
    "stream": "call chat_stream",
    "append_history": "leave the returned history unused",
    "max_window_size": "no turn is left out here: give fewer turns as history",
    "stop_words_ids": "give eos_token_id, a list of ids",
    "num_return_sequences": "call model.generate",
    "return_dict_in_generate": "call model.generate",
    "streamer": "call chat_stream",
}


History = list[tuple[str | Query, str]]
"""The turns so far: questions and replies."""


def chat(
    model: "QwenVLForConditionalGeneration | PeftModel",
    processor: QwenVLProcessor,
    query: str | Query,
    history: Sequence[Sequence[Any]] | None = None,
    system: str | None = None,
    *,
    access: ImageAccess | None = None,
    **options: Any,
) -> tuple[str, History]:
    """Ask a chat model, and take its reply and the conversation with it.

    Args:
        model: of `qwenvl.load_model`.
        processor: of `qwenvl.load_processor`; in the place of the published tokenizer.
        query: text, or of `from_list_format`.
        history: as this function returned it; None begins a conversation. Pairs in which the question is a string, as
            the published code kept them, are text without images.
        system: the system message; None for the processor's own (that of the model's training), else the default one.
        access: what paths and URLs of images may reach; by default any path and no URL.
        options: of `model.generate`, `generation_config` among them. What is not given comes from
            `model.generation_config`: whether and how tokens are sampled, and how many.

    Returns:
        The reply, up to `<|im_end|>`, `<|im_start|>` or `<|endoftext|>`, with grounding tags and without white space
        around it; and the history with this turn added. The given one is not changed.

    Raises:
        InputError: a history, query or option that is not as above, a base model, or a conversation that is longer
            than the model takes.
        ImageError: an image that cannot be read.
    """
    model = _chat_model(model)
    inputs, options = _prepare(model, processor, query, history, system, access, options)
    ids = model.generate(**inputs, **options)
    assert isinstance(ids, torch.Tensor), "no dictionary is asked for"
    reply = _reply(processor, ids[0, inputs["input_ids"].shape[1] :].tolist()).strip()
    return reply, [*_turns(history), (query, reply)]


def chat_stream(
    model: "QwenVLForConditionalGeneration | PeftModel",
    processor: QwenVLProcessor,
    query: str | Query,
    history: Sequence[Sequence[Any]] | None = None,
    system: str | None = None,
    *,
    access: ImageAccess | None = None,
    **options: Any,
) -> Iterator[str]:
    """As `chat`, but yields the reply as far as it is known, longer each time; the last is what `chat` returns.

    Add `(query, reply)` to the history to go on from it. Generation ends when the iterator is closed.

    Raises:
        InputError, ImageError: as `chat`, before the first piece.
    """
    model = _chat_model(model)
    inputs, options = _prepare(model, processor, query, history, system, access, options)
    return _stream(model, processor, inputs, options)


def draw_bbox_on_latest_picture(
    reply: str, history: Sequence[Sequence[Any]] | None = None, *, access: ImageAccess | None = None
) -> Image.Image | None:
    """Draw the boxes and quads of a reply on the last image of the conversation; None if the reply has none.

    Markup that cannot be read, or only after a repair, is named in a warning.

    Args:
        reply: with its grounding tags.
        history: of `chat`, with the turn of the reply.
        access: what the image's path or URL may reach, as in `chat`.

    Raises:
        InputError: boxes, but no image in the history.
        ImageError: the image cannot be read.
    """
    found = parse_grounding(reply)
    for problem in found.problems:
        drawn = "repaired" if problem.repaired else "not drawn"
        warnings.warn(f"{reply[slice(*problem.span)][:80]!r} is {drawn}: {problem.reason}", stacklevel=2)
    if not found.regions:
        return None
    images = [image for query, _ in _turns(history) if isinstance(query, Query) for image in query.images]
    if not images:
        raise InputError(
            "the reply has boxes, but no question of the history has an image to draw them on: give the history that "
            "chat returned, with questions of from_list_format"
        )
    return draw_regions(load_image(images[-1], access=access or ImageAccess()), found.regions)


def as_messages(
    query: str | Query, history: Sequence[Sequence[Any]] | None = None, system: str = DEFAULT_SYSTEM
) -> list[dict[str, Any]]:
    """A conversation as messages: `apply_chat_template(..., grounding=True)` gives the ids that `chat` asks with.

    Raises:
        InputError: a history or query that is not as in `chat`.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
    for question, reply in _turns(history):
        messages += [_user_message(question), {"role": "assistant", "content": reply}]
    return [*messages, _user_message(query)]


def _user_message(query: str | Query) -> dict[str, Any]:
    if isinstance(query, Query):
        return {"role": "user", "content": list(query.parts)}
    if not isinstance(query, str):
        raise InputError(f"a question is text or what from_list_format gives, not {type(query).__name__}")
    if found := _IMAGE_IN_TEXT.search(query):
        warnings.warn(
            f"the question holds {found[0][:80]!r}, which is asked as text: images are given with from_list_format",
            stacklevel=5,  # the caller of chat
        )
    return {"role": "user", "content": query}


def _turns(history: Sequence[Sequence[Any]] | None) -> History:
    if history is None:
        return []
    if isinstance(history, str) or not isinstance(history, Sequence):
        raise InputError(f"history must be a list of (question, reply) pairs, not {type(history).__name__}")
    turns: History = []
    for index, turn in enumerate(history):
        is_pair = isinstance(turn, Sequence) and not isinstance(turn, str) and len(turn) == 2
        if not is_pair or not isinstance(turn[0], str | Query) or not isinstance(turn[1], str):
            raise InputError(f"turn {index} of the history must be a question and a reply, not {str(turn)[:200]}")
        turns.append((turn[0], turn[1]))
    return turns


def _chat_model(model: Any) -> QwenVLForConditionalGeneration:
    """The model inside PEFT's wrapper, adapter layers included: `PeftModel.generate` changes the generation config."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, QwenVLForConditionalGeneration):
        raise InputError(f"model must be a Qwen-VL model (qwenvl.load_model), not {type(model).__name__}")
    # `load_model` sets it to what the model was trained as, whatever its base.
    if getattr(base.generation_config, "chat_format", None) == "raw":
        raise InputError(
            "this is a base model (chat_format: raw), which knows no conversations: ask it with "
            "processor(text=query.text, images=query.images) and model.generate"
        )
    return base


def _prepare(
    model: QwenVLForConditionalGeneration,
    processor: QwenVLProcessor,
    query: str | Query,
    history: Sequence[Sequence[Any]] | None,
    system: str | None,
    access: ImageAccess | None,
    options: Mapping[str, Any],
) -> tuple[BatchFeature, dict[str, Any]]:
    """The prompt as the model's inputs, on its device, and the options of `generate`."""
    if not isinstance(processor, QwenVLProcessor):
        raise InputError(
            f"processor must be a Qwen-VL processor (qwenvl.load_processor), not {type(processor).__name__}: a "
            "tokenizer alone opens no images"
        )
    for name in options:
        if name in _REFUSED:
            raise InputError(f"{name} is no option of this chat: {_REFUSED[name]}")
    if system is None:
        system = DEFAULT_SYSTEM if processor.system is None else processor.system
    inputs = processor.apply_chat_template(
        as_messages(query, history, system),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        grounding=True,
        access=access,
    )
    assert isinstance(inputs, BatchFeature), "return_dict=True"
    length, room = inputs["input_ids"].shape[1], model.config.max_position_embeddings
    if length >= room:
        raise InputError(
            f"the conversation is {length:,} tokens long, and the model takes {room:,}: give fewer turns as history"
        )
    tokenizer = processor.tokenizer
    given = (options.get("generation_config"), model.generation_config)
    own = [options.get("eos_token_id"), *(settings.eos_token_id for settings in given if settings is not None)]
    own = next((end for end in own if end is not None), [])
    ends = [own] if isinstance(own, int) else list(own)
    ends = list(dict.fromkeys([*ends, tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id]))
    return inputs.to(model.device), {"pad_token_id": tokenizer.pad_token_id, **options, "eos_token_id": ends}


def _reply(processor: QwenVLProcessor, ids: Sequence[int]) -> str:
    text = processor.tokenizer.decode(list(ids), skip_special_tokens=True, keep_grounding=True)
    assert isinstance(text, str), "one sequence of ids decodes to one text"
    return text


def _stream(
    model: QwenVLForConditionalGeneration, processor: QwenVLProcessor, inputs: BatchFeature, options: dict[str, Any]
) -> Iterator[str]:
    """Generate in a thread, and yield the text of the tokens that it has put out."""
    tokens = _Tokens()
    closed = _Closed()
    criteria = StoppingCriteriaList([*(options.pop("stopping_criteria", None) or []), closed])

    def generate() -> None:
        try:
            model.generate(**inputs, **options, streamer=tokens, stopping_criteria=criteria)
        except BaseException as error:  # raised where the reply is read
            tokens.arrived.put(error)

    thread = threading.Thread(target=generate, name="chat-stream", daemon=True)
    thread.start()
    ids: list[int] = []
    shown: str | None = None
    try:
        while (token := tokens.arrived.get()) is not None:
            if isinstance(token, BaseException):
                raise token
            ids.append(token)
            # Half a character decodes to U+FFFD until its other bytes come.
            text = _reply(processor, ids).rstrip("\ufffd").strip()
            if text and text != shown:
                shown = text
                yield text
        text = _reply(processor, ids).strip()
        if text != shown:
            yield text
    finally:
        closed.event.set()
        thread.join()


class _Tokens(BaseStreamer):
    """Passes new tokens on: `arrived` has an id each, None at the end, or what was raised."""

    def __init__(self) -> None:
        self.arrived: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            for token in value.reshape(-1).tolist():
                self.arrived.put(token)
        self._prompt_seen = True  # `generate` puts the prompt first

    def end(self) -> None:
        self.arrived.put(None)


class _Closed(StoppingCriteria):
    """Ends generation when nobody reads the reply any more."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], self.event.is_set(), device=input_ids.device)
