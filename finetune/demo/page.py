"""The page, in Gradio: its components, and which of them does what in `talk`."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from finetune.demo import view
from finetune.demo.asked_model import AskedModel
from finetune.demo.pictures import MOST_BYTES
from finetune.demo.run_examples import Example
from finetune.demo.style import JS
from finetune.demo.talk import Settings, Talk
from finetune.demo.visitors import KEPT_SECONDS, MOST_VISITORS, Visitors
from finetune.errors import UserError

logger = logging.getLogger(__name__)

UPLOADED = ["image", ".pdf", ".tif", ".tiff"]
_FAULT = "Something went wrong here; the terminal that the page was started in says what."


def take_uploads_alone(button: gr.UploadButton) -> None:
    """Let an upload button take files that were uploaded: Gradio would also fetch an address that a client sends."""
    take = button.async_move_resource_to_block_cache

    async def take_upload(url_or_file_path: Any) -> Any:
        if "://" in str(url_or_file_path):
            raise gr.Error("addresses are not fetched here: upload the file")
        return await take(url_or_file_path)

    # A subclass would make Gradio write a stub beside this file.
    button.async_move_resource_to_block_cache = take_upload  # type: ignore[method-assign]


Updates = dict[Any, Any]
"""What an event changes, by component."""


class Page:
    """The components, and what happens on their events.

    Args:
        title: of the page.
        about: what the model is, a sentence each.
        models: one, or two that are compared.
        examples: of the run's evaluation data.
        folder: of the page's files.

    Attributes:
        blocks: for Gradio.
    """

    def __init__(self, title: str, models: Sequence[AskedModel], examples: Sequence[Example], folder: Path) -> None:
        self._models, self._examples = models, list(examples)
        self._visitors = Visitors(models, folder)
        # Files that Gradio made for a visitor go an hour after they were made; the folder goes with the page.
        self.blocks = gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, KEPT_SECONDS))
        with self.blocks:
            self._lay_out(title)
            self._connect()

    def _lay_out(self, title: str) -> None:
        gr.HTML(view.heading(title, self._models), elem_classes="title")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self._pasts, self._lasts = [], []
                with gr.Row():
                    for number, model in enumerate(self._models):
                        with gr.Column(min_width=300, elem_classes="talk"):
                            self._pasts.append(gr.HTML(view.past([], number, model.title), js_on_load=None))
                            self._lasts.append(gr.HTML("", js_on_load=None))
                self._notice = gr.HTML("", visible=False, elem_classes="notice", js_on_load=None)
                self._spoken = gr.HTML(view.for_screen_readers(""), elem_classes="hidden-text", js_on_load=None)
                self._choices = gr.HTML("", visible=False, js_on_load=view.CHOICES_JS)
                self._more = gr.Button("Show more pages", visible=False, size="sm")
                self._message = gr.Textbox(
                    label="Message",
                    lines=1,
                    max_lines=8,
                    placeholder="Ask about the pictures; Enter sends",
                    autofocus=True,
                )
                with gr.Row():
                    self._upload = gr.UploadButton(
                        "Add images or a PDF",
                        file_count="multiple",
                        file_types=UPLOADED,
                        type="filepath",
                        size="md",
                        min_width=150,
                        visible=any(model.takes_images for model in self._models),
                    )
                    take_uploads_alone(self._upload)
                    self._send = gr.Button("Send", variant="primary", size="md", min_width=100)
                    self._stop = gr.Button("Stop", variant="stop", size="md", min_width=100, interactive=False)
                    self._new = gr.Button("New conversation", size="md", min_width=140)
            with gr.Column(scale=1, min_width=300):
                self._templates = [self._template(number) for number in range(len(self._models))]
                with gr.Accordion("Settings", open=False):
                    self._most = gr.Slider(1, 2048, value=512, step=1, label="Most new tokens of a reply")
                    self._temperature = gr.Slider(
                        0, 2, value=0, step=0.05, label="Temperature", info="0 always takes the likeliest token"
                    )
                if self._examples:
                    shown = [view.Choice(one.thumbnail, one.question) for one in self._examples]
                    label = "Examples of the evaluation data, with the run's small copies of their pictures: tap one"
                    self._filled_in = gr.HTML(view.choices(label, shown), js_on_load=view.CHOICES_JS)

    def _template(self, number: int) -> gr.Textbox:
        """The prompt around the message; of a second model only where it was trained with another one."""
        own = self._models[number].template
        first = self._models[0].template
        is_shown = number == 0 or (own is not None and own != first)
        return gr.Textbox(
            (own if own is not None else first) or "",
            label="Prompt" if number == 0 else f"Prompt of {self._models[number].title}",
            info="The message is put in place of {question}. Empty: as typed.",
            lines=1,
            max_lines=6,
            visible=is_shown,
            interactive=True,
        )

    def _connect(self) -> None:
        blocks = self.blocks
        self._changed = [
            *self._pasts,
            *self._lasts,
            *self._templates,
            *(self._notice, self._spoken, self._choices, self._more, self._message, self._send, self._stop),
        ]
        asked = [self._message, self._most, self._temperature, *self._templates]
        private: Any = {"api_visibility": "private", "show_progress": "hidden"}
        # Every function may wait for the disk or the model, so none holds up another visitor's.
        each: Any = {**private, "concurrency_limit": None}
        gr.on(
            [self._send.click, self._message.submit],
            self._ask,
            asked,
            self._changed,
            trigger_mode="once",
            **each,
        )
        self._stop.click(self._stop_reply, None, None, queue=False, **private)
        self._new.click(self._start_over, None, self._changed, **each)
        self._upload.upload(self._add, self._upload, self._changed, **(each | {"show_progress": "minimal"}))
        self._more.click(self._show_more, None, self._changed, **each)
        self._choices.select(self._toggle, None, self._changed, **each)
        if self._examples:
            self._filled_in.select(self._fill_in, None, self._changed, **each)
        blocks.load(None, js=JS)
        blocks.unload(self._leave)
        # Each open conversation holds one place of the queue while it is answered.
        blocks.queue(max_size=MOST_VISITORS, default_concurrency_limit=None)

    # ---- events

    def _talk(self, request: gr.Request) -> Talk:
        return self._visitors.talk(str(request.session_hash))

    def _leave(self, request: gr.Request) -> None:
        self._visitors.leave(str(request.session_hash))

    def _ask(
        self, request: gr.Request, message: str, most: float, temperature: float, *templates: str
    ) -> Iterator[Updates]:
        talk = self._talk(request)
        settings = Settings(self._templates_asked(templates), int(most), float(temperature))
        titles = [model.title for model in self._models]
        try:
            replies = talk.ask(message, settings)
            turn = next(replies)
        except UserError as error:
            yield self._noticed(talk, str(error))
            return
        except Exception:
            logger.exception("a message could not be asked")
            yield self._noticed(talk, _FAULT)
            return
        yield self._all(talk, running=True) | {self._message: ""}
        try:
            for _ in replies:
                yield self._replies(talk)
            said = view.for_screen_readers(view.spoken(turn, titles))
            yield self._all(talk) | {self._spoken: said}
        except Exception:
            logger.exception("a reply could not be shown")
            yield self._noticed(talk, _FAULT)

    def _templates_asked(self, templates: Sequence[str]) -> tuple[str, ...]:
        """The templates; a model without a field of its own is asked by that of the first."""
        return tuple(
            given if field.visible else templates[0] for given, field in zip(templates, self._templates, strict=True)
        )

    def _stop_reply(self, request: gr.Request) -> None:
        self._talk(request).stop()

    def _start_over(self, request: gr.Request) -> Updates:
        talk = self._talk(request)
        talk.forget()
        return self._all(talk) | {self._message: ""}

    def _add(self, files: list[str] | None, request: gr.Request) -> Updates:
        talk, problems = self._talk(request), []
        for file in files or []:
            path = Path(file)
            try:
                if path.stat().st_size > MOST_BYTES:
                    raise UserError(f"{path.name}: the file is larger than {MOST_BYTES // 1_000_000} MB")
                talk.upload(path.name, path.read_bytes())
            except UserError as error:
                problems.append(str(error))
            except Exception:
                logger.exception("an upload could not be read")
                problems.append(f"{path.name}: {_FAULT}")
            finally:
                path.unlink(missing_ok=True)
        return self._noticed(talk, *problems)

    def _show_more(self, request: gr.Request) -> Updates:
        talk = self._talk(request)
        return self._noticed(talk, *self._problems(talk.more_pages))

    def _toggle(self, event: gr.EventData, request: gr.Request) -> Updates:
        talk, number = self._talk(request), _number(event)
        return self._noticed(talk, *self._problems(lambda: talk.toggle(number)))

    def _fill_in(self, event: gr.EventData, request: gr.Request) -> Updates:
        talk, number = self._talk(request), _number(event)
        if not 0 <= number < len(self._examples):
            return self._noticed(talk)
        example = self._examples[number]
        problems = self._problems(lambda: talk.fill_in(example))
        if problems:
            return self._noticed(talk, *problems)
        template = example.template or ""
        return self._noticed(talk) | {self._message: example.question, self._templates[0]: template}

    def _problems(self, work: Callable[[], None]) -> list[str]:
        """Do something for a visitor; what was wrong, a sentence each."""
        try:
            work()
        except UserError as error:
            return [str(error)]
        except Exception:
            logger.exception("what a visitor asked for failed")
            return [_FAULT]
        return []

    # ---- what is shown

    def _all(self, talk: Talk, *, running: bool = False) -> Updates:
        pasts = {
            component: view.past(talk.turns, number, self._models[number].title)
            for number, component in enumerate(self._pasts)
        }
        buttons = {self._send: gr.update(interactive=not running), self._stop: gr.update(interactive=running)}
        return (
            self._replies(talk)
            | pasts
            | buttons
            | self._pictures(talk)
            | {self._notice: gr.update(value="", visible=False)}
        )

    def _replies(self, talk: Talk) -> Updates:
        """The replies to the last message alone, while they grow."""
        return {
            component: view.last_reply(talk.turns, number, self._models[number].title)
            for number, component in enumerate(self._lasts)
        }

    def _noticed(self, talk: Talk, *problems: str) -> Updates:
        return self._pictures(talk) | {self._notice: gr.update(value=view.notice(problems), visible=bool(problems))}

    def _pictures(self, talk: Talk) -> Updates:
        offered = [
            view.Choice(one.thumbnail, one.name, number in talk.chosen) for number, one in enumerate(talk.offered)
        ]
        chosen, left = len(talk.chosen), talk.pages_left
        label = f"Pictures, {chosen or 'none'} in the message: tap one to put it in, or to leave it out"
        return {
            self._choices: gr.update(value=view.choices(label, offered), visible=bool(offered)),
            self._more: gr.update(visible=left > 0, value=f"Show more pages ({left} left)"),
        }


def _number(event: gr.EventData) -> int:
    """Which choice was tapped; -1 for what is none."""
    number = event._data.get("number") if isinstance(event._data, dict) else None
    return number if type(number) is int else -1
