"""The models of the page: opened once, asked through an engine in this process.

An adapter that is compared with its base, or with another adapter on it, is one model in memory: the adapter is
switched for each request.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from finetune.batches.image_request import ImageRequest
from finetune.demo.asked_model import Message
from finetune.demo.pictures import ACCESS
from finetune.errors import UserError
from finetune.llamacpp.gguf_files import gguf_files
from finetune.replies.gguf_model import gguf_use
from finetune.replies.model_style import ModelUse, find_use
from finetune.replies.sampling import Sampling
from finetune.replies.task_replies import Style
from finetune.serve.adapters import changes_base
from finetune.serve.asked import Asked, Event
from finetune.serve.gguf_to_open import llamacpp_model
from finetune.serve.model_to_open import pytorch_model
from finetune.serve.replier import Cancellable, Replier
from finetune.serve.served_name import ServedName
from qwenvl.loading import read_adapter
from qwenvl.text.chat import Rendered, render_chat, render_prompt
from qwenvl.views import Views

MODEL, COMPARED = "model", "compared"
"""What the two models are served as; the page shows them under their own names."""


@dataclass(frozen=True)
class EngineModel:
    """A model behind the page.

    Attributes:
        title: as the user wrote it.
        about: what it is and how it is asked, a sentence each.
        served: how it is asked.
        views: what pictures it is shown of an image.
        replier: computes its replies.
        context: most tokens of a conversation.
        trained_length: tokens of the conversations that it was trained on, at most.
    """

    title: str
    about: tuple[str, ...]
    served: ServedName
    views: Views | None
    replier: Replier
    context: int
    trained_length: int

    @property
    def template(self) -> str | None:
        return self.served.template

    @property
    def style(self) -> Style:
        return self.served.style

    @property
    def takes_images(self) -> bool:
        return self.served.takes_images

    @property
    def markup_is_text(self) -> bool:
        return self.served.record.markup_is_text

    def ask(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        temperature: float,
        on_event: Callable[[Event], None],
    ) -> Cancellable:
        """As `AskedModel.ask`."""
        rendered = self._render(messages)
        room = self.context - len(rendered.ids)
        if room < 1:
            raise UserError(
                f"The conversation is {len(rendered.ids):,} tokens long, and the model takes {self.context:,}: start "
                "a new one"
            )
        asked = Asked(
            ids=rendered.ids,
            max_new_tokens=min(room, max_new_tokens),
            stop_ids=self.served.stop_ids,
            images=[ImageRequest(source, ACCESS, "a picture of the conversation") for source in rendered.images],
            adapter=self.served.adapter,
            sampling=Sampling(temperature=temperature),
        )
        return self.replier.submit(asked, on_event)

    def _render(self, messages: Sequence[Message]) -> Rendered:
        served = self.served
        if self.style == "base":
            message = messages[-1]
            return render_prompt(
                message["content"],
                served.tokenizer,
                grounding=message.get("grounding", False),
                views=self.views,
                n_queries=served.n_queries,
            )
        system = [{"role": "system", "content": served.system}] if served.system is not None else []
        return render_chat(
            [*system, *messages],
            served.tokenizer,
            add_generation_prompt=True,
            views=self.views,
            n_queries=served.n_queries,
        )


def open_models(
    model: str,
    compare: str | None = None,
    *,
    base: str | None = None,
    style: Style | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
) -> list[EngineModel]:
    """Open a model, and one to compare it with; to be closed by `close_models`.

    Args:
        model, base, style, dtype, quantization: as `finetune.serve.opened_model.open_served` takes them.
        compare: anything `qwenvl.load_model` takes.

    Raises:
        InputError: an argument is wrong; found before weights are loaded.
    """
    given = {"base": base, "dtype": dtype, "quantization": quantization}
    if gguf_files(model):
        _refuse_on_gguf(model, given)
    use = _find_use(model, base=base, style=style, quantization=quantization)
    opened = partial(_opened, style=style, dtype=dtype, quantization=quantization)
    if compare is None:
        return [opened(model, {MODEL: (model, _kind(use))}, base=base)[0]]
    other = _find_use(compare, style=style, quantization=quantization)
    kinds = {MODEL: (model, _kind(use)), COMPARED: (compare, _kind(other))}
    if not _share_weights(use, other):
        first, second = (
            opened(name, {role: kinds[role]}, base=of)[0]
            for role, name, of in ((MODEL, model, base), (COMPARED, compare, None))
        )
        return _shown_alike(first, second)
    if other.source.adapter is not None:
        return _shown_alike(*opened(model, kinds, base=base, adapters={COMPARED: compare}))
    kinds[COMPARED] = (compare, f"The same model in memory, with the adapter of {model} switched off")
    return _shown_alike(*opened(model, kinds, base=base, base_name=COMPARED))


def close_models(models: Sequence[EngineModel], grace: float) -> None:
    """End what computes the replies."""
    for replier in {id(model.replier): model.replier for model in models}.values():
        replier.close(grace)


def _opened(
    folder: str,
    kinds: Mapping[str, tuple[str, str]],
    *,
    base: str | None,
    style: Style | None,
    dtype: str | None,
    quantization: str | None,
    adapters: Mapping[str, str] | None = None,
    base_name: str | None = None,
) -> list[EngineModel]:
    """Open one model in memory, and what is served of it.

    Args:
        folder: of the model.
        kinds: what it is served as -> its title and what it is; the first is the model itself.
        adapters, base_name: as for `pytorch_model`.
    """
    name = next(iter(kinds))
    if gguf_files(folder):
        to_open = llamacpp_model(folder, name=name, style=style)
    else:
        to_open = pytorch_model(
            folder,
            name=name,
            adapters=adapters,
            base_name=base_name,
            base=base,
            style=style,
            dtype=dtype,
            quantization=quantization,
        )
    backend = to_open.open()
    models = []
    for name, (title, kind) in kinds.items():
        served = backend.names.get(name)
        assert served is not None, "it was opened under this name"
        lengths = to_open.context, to_open.trained_length
        views = served.record.views
        models.append(EngineModel(title, _about(served, kind), served, views, backend.replier, *lengths))
    return models


def _find_use(
    folder: str, *, base: str | None = None, style: Style | None = None, quantization: str | None = None
) -> ModelUse:
    """How a model is asked, that of a GGUF folder too."""
    if gguf_files(folder):
        return gguf_use(folder, style)[1]
    return find_use(folder, base=base, style=style, quantization=quantization)


def _refuse_on_gguf(folder: str, given: Mapping[str, str | None]) -> None:
    for name, value in given.items():
        if value not in (None, "auto"):
            raise UserError(f"--{name} has no effect on {folder}, whose language model is a GGUF file: leave it out")


def _kind(use: ModelUse) -> str:
    if gguf_files(use.name):
        return "A GGUF folder, run by llama.cpp"
    adapter = use.source.adapter
    return f"An adapter on {use.source.base}" if adapter is not None else "A checkpoint"


def _about(served: ServedName, kind: str) -> tuple[str, ...]:
    """What a model is, and how it is asked, a sentence each."""
    record = served.record
    lines = [f"{kind}, {served.notes[0]}."]
    if served.style == "base":
        lines.append("It continues text and has no turns: each message is asked by itself, with its pictures.")
    if served.system is not None:
        lines.append(f"It is asked after the system message {served.system!r}, as it was trained.")
    if record.views is not None:
        lines.append(f"Each picture is shown to it as {record.views}, as it was trained.")
    if served.template is None and record.templates:
        lines.append(f"It was trained with the prompts {' and '.join(map(repr, record.templates))}.")
    if not served.takes_images:
        lines.append("It reads text only.")
    return tuple(lines)


def _shown_alike(first: EngineModel, second: EngineModel) -> list[EngineModel]:
    """Both models, as an evaluation compares them: a second one whose training is not recorded is shown the pictures
    that the first one is."""
    record = second.served.record
    if first.views is not None and record.views is None and record.labels is None:
        line = f"Each picture is shown to it as {first.views}, as to the model beside it."
        second = replace(second, views=first.views, about=(*second.about, line))
    return [first, second]


def _share_weights(use: ModelUse, other: ModelUse) -> bool:
    """Whether one model in memory can be both: adapters on the same base, or one and its base."""
    if use.source.adapter is None or not _is_same_place(use.source.base, other.source.base):
        return False
    if other.source.adapter is not None and use.quantized != other.quantized:
        return False
    adapters = [one for one in (use.source.adapter, other.source.adapter) if one is not None]
    return not any(changes_base(read_adapter(adapter)) for adapter in adapters)


def _is_same_place(first: str, second: str) -> bool:
    """Whether two folders or hub ids are the same."""
    return first == second or (Path(first).exists() and Path(first).resolve() == Path(second).resolve())
