"""A conversation in the terminal. Replies go to stdout, everything else to stderr."""

import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import GenerationConfig

from finetune.chat.conversation import Answer, ChatImage, Conversation
from finetune.chat.conversation_rows import append_row
from finetune.errors import Failed, UserError
from finetune.quantities import format_count
from finetune.replies.replies import without_adapter
from finetune.replies.task_replies import Style
from finetune.terminal import terminal_line, terminal_text
from qwenvl import QwenVLConfig, QwenVLTokenizer, load_image, load_model, load_processor
from qwenvl.images.drawing import save_grounding
from qwenvl.loading import find_source
from qwenvl.text.grounding import Region, parse_grounding

HELP = """\
/image PATH   put an image into the next message; several times for several images
/new          forget the conversation
/save FILE    add the conversation to a .jsonl file, as a row to train on
/help         this
/quit         leave (or Ctrl-D)
Ctrl-C stops a reply; what there is of it stays. A message that begins with / is sent with a space before it."""


def chat(
    model: str,
    *,
    images: Sequence[str | Path] = (),
    once: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    dtype: str | None = None,
    quantization: str | None = None,
    boxes: str | Path | None = None,
) -> None:
    """Talk to a model until the user leaves, or ask it one thing.

    Args:
        model: anything `qwenvl.load_model` takes.
        images: for the first message.
        once: the one message; its reply alone goes to stdout. None for a conversation.
        system: the system message.
        max_new_tokens: most tokens of a reply.
        temperature: 0 always takes the likeliest token.
        dtype, quantization: as in `load_model`.
        boxes: file to draw the boxes of a reply into. None: a new file each, in the working directory; with `once`,
            none.

    Raises:
        UserError, ValueError, FileNotFoundError: something that was given does not fit; found before weights load.
        Failed: `once`, and the device's memory does not hold it.
    """
    style, config = chat_style(model), QwenVLConfig.from_pretrained(find_source(model).base)
    if style == "base" and system is not None:
        raise UserError(f"{model} is a base model, which goes on with raw text: it has no system message")
    if config.visual is None and images:
        raise UserError(f"{model} is a text-only checkpoint: it takes no images")
    if boxes is not None:
        _refuse_drawing(Path(boxes))
    for image in images:
        load_image(image)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character gets its number
            stream.reconfigure(errors="backslashreplace")

    loaded = load_model(
        model,
        dtype=dtype,
        quantization=quantization,
        device_map="auto" if torch.cuda.is_available() else None,
    )
    conversation = open_conversation(model, loaded, style)
    conversation.system, conversation.max_new_tokens, conversation.temperature = system, max_new_tokens, temperature
    for image in images:
        conversation.add_image(image)
    terminal = _Terminal(conversation, None if boxes is None else Path(boxes))
    if once is not None:
        terminal.once(once)
    else:
        terminal.talk(model)


def chat_style(model: str) -> Style:
    """How a model is talked to: in ChatML, or in raw text where its generation config says that it is a base model.

    All that is trained here is trained in ChatML, whatever its base was.
    """
    source = find_source(model)
    if source.adapter is not None or (Path(model) / "run.json").is_file():
        return "chat"
    try:
        settings = GenerationConfig.from_pretrained(source.base)
    except OSError:  # none there
        return "chat"
    return "base" if getattr(settings, "chat_format", None) == "raw" else "chat"


def open_conversation(model: str, loaded: torch.nn.Module, style: Style) -> Conversation:
    """A conversation that has not begun, with a model that is loaded from `model`."""
    if without_adapter(loaded).config.visual is None:
        return Conversation(loaded, QwenVLTokenizer.from_pretrained(find_source(model).base), None, style)
    processor = load_processor(model)
    return Conversation(loaded, processor.tokenizer, processor.image_processor, style)


class _Terminal:
    def __init__(self, conversation: Conversation, boxes: Path | None):
        self.conversation, self.boxes = conversation, boxes
        self._warned = False

    def once(self, text: str):
        try:
            answer = self.conversation.ask(text)
        except torch.OutOfMemoryError as error:
            raise Failed(
                "the device's memory does not hold the prompt and its reply: try --quantization nf4"
            ) from error
        if answer.stopped:
            raise KeyboardInterrupt
        # What reads a pipe gets the reply as it is.
        print(terminal_text(answer.text) if sys.stdout.isatty() else answer.text, flush=True)
        self._tell_about(answer)
        self._show_regions(answer.text, draw=self.boxes is not None)

    def talk(self, name: str):
        model = without_adapter(self.conversation.model)
        size = sum(parameter.numel() for parameter in model.parameters())
        tell(f"{name}: {format_count(size)} parameters, {str(model.dtype).removeprefix('torch.')}, on {model.device}")
        if self.conversation.style == "base":
            tell("A base model: it goes on with your text, and knows no turns. Ask it so: What is the total? Answer:")
        tell("/help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves.")
        while True:
            try:
                line = read_line()
            except EOFError:
                tell("")
                return
            except KeyboardInterrupt:
                tell("\nCtrl-D or /quit leaves.")
                continue
            if line.strip() == "/quit":
                return
            try:
                self._take(line)
            except torch.OutOfMemoryError:
                tell("The device's memory does not hold this: /new, or --quantization nf4")
            except (UserError, ValueError, OSError) as error:
                tell(terminal_text(str(error)))

    def _take(self, line: str):
        """A line of input: a command, or a message."""
        command, _, argument = line.strip().partition(" ")
        argument = _unquoted(argument.strip())
        if not line.strip():
            return
        if not line.startswith("/"):
            self._ask(line.strip())
        elif command == "/help":
            tell(HELP)
        elif command == "/new":
            self.conversation.forget()
            self._warned = False
            tell("Forgotten.")
        elif command == "/image" and argument:
            image = self.conversation.add_image(argument)
            waiting = len(self.conversation.waiting)
            tell(
                f"{image.path.name}, {image.size[0]} x {image.size[1]} pixels: {waiting} image(s) for the next message"
            )
        elif command == "/save" and argument:
            row = append_row(argument, self.conversation.with_system)
            tell(f"{argument}, row {row}")
        elif command in ("/image", "/save"):
            tell(f"{command} needs a file: {command} path/to/file")
        else:
            tell(f"There is no {terminal_line(command)}. /help lists the commands; to send it, put a space before it.")

    def _ask(self, text: str):
        answer = self.conversation.ask(text, _print_piece)
        print(flush=True)
        self._tell_about(answer)
        if not answer.text.strip():
            tell("(no reply; the message is forgotten)")
        self._show_regions(answer.text, draw=True)

    def _tell_about(self, answer: Answer):
        """What the reader of a reply should know."""
        if answer.stopped:
            tell("(stopped)")
        elif not answer.ended:
            tell(f"(cut at {self.conversation.max_new_tokens:,} tokens: --max-new-tokens)")
        trained = without_adapter(self.conversation.model).config.seq_length
        if answer.prompt_tokens > trained and not self._warned:
            self._warned = True
            tell(
                f"(the conversation is {answer.prompt_tokens:,} tokens long, and the model was trained on "
                f"{trained:,} at once: replies may get worse. /new forgets it)"
            )

    def _show_regions(self, reply: str, *, draw: bool):
        """Boxes and quads in pixels of the last image, and drawn on it."""
        regions = parse_grounding(reply).regions
        if not regions:
            return
        if not self.conversation.images:
            tell("(the reply has boxes, but there is no image in the conversation)")
            return
        image = self.conversation.images[-1]
        for region in regions:
            tell(f"  {region_text(region, image)}")
        if draw:
            path = self.boxes or free_name(Path(f"{image.path.stem}_boxes.png"))
            save_grounding(image.path, reply, path)
            tell(f"  drawn: {path}")


def region_text(region: Region, image: ChatImage) -> str:
    """the dog: (12, 40) (530, 998), in pixels"""
    points = " ".join(f"({round(x)}, {round(y)})" for x, y in region.to_pixels(*image.size).points)
    label = terminal_line(region.label) if region.label is not None else region.kind
    return f"{label}: {points}"


def free_name(path: Path) -> Path:
    """The path, or with the first number that makes it one that is free."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def read_line() -> str:
    """The next line of input; a prompt is shown only to a person.

    Raises:
        EOFError: there is none.
    """
    if not sys.stdin.isatty():
        return input()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives `input` editing and the lines before)
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def tell(line: str):
    print(line, file=sys.stderr, flush=True)


def _print_piece(piece: str):
    print(terminal_text(piece), end="", flush=True)


def _unquoted(argument: str) -> str:
    """A path as a file manager drops it into a terminal."""
    if len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "'\"":
        return argument[1:-1]
    return argument


def _refuse_drawing(path: Path):
    """Raises:
    UserError: nothing can be drawn into that file.
    """
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--boxes {path}: give a file that ends in .png or .jpg")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--boxes {path}: there is no folder {path.absolute().parent}")
