"""`finetune chat`: a conversation in the terminal. Replies go to stdout, everything else to stderr."""

import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from finetune.chat.conversation import Answer, ChatImage, Conversation
from finetune.chat.conversation_rows import append_row
from finetune.errors import Failed, InputError, UserError
from finetune.files.path_errors import path_errors
from finetune.llamacpp.gguf_files import gguf_files
from finetune.quantities import format_count
from finetune.replies.gguf_model import GgufModel, gguf_use, open_gguf
from finetune.replies.model_style import ModelUse, find_use
from finetune.replies.prompt_template import asking_notes, choose_template
from finetune.replies.replies import without_adapter
from finetune.replies.task_replies import Style
from finetune.terminal import terminal_line, terminal_text
from qwenvl import QwenVLConfig, QwenVLTokenizer, load_image, load_model, load_processor
from qwenvl.images.drawing import save_grounding
from qwenvl.text.grounding import Region, has_markup, parse_grounding

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
    base: str | None = None,
    style: Style | None = None,
    images: Sequence[str | Path] = (),
    once: str | None = None,
    system: str | None = None,
    prompt: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    dtype: str | None = None,
    quantization: str | None = None,
    boxes: str | Path | None = None,
    threads: int | None = None,
) -> None:
    """Talk to a model until the user leaves, or ask it one thing.

    Args:
        model: anything `qwenvl.load_model` takes, or a folder of `finetune export --to gguf`.
        base: of an adapter, where it is not where the adapter says.
        style: "chat" or "base"; None for the model's own.
        images: for the first message.
        once: a single message; only its reply goes to stdout. None for a conversation.
        system: the system message; None for the one that the model was trained with, else the default one.
        prompt: a template with {question} or {phrase} that each message is put into, "trained" for the one that the
            model was trained with, or "plain" for none. None is "trained" where there is one.
        max_new_tokens: most tokens of a reply.
        temperature: 0 always takes the likeliest token.
        dtype: as in `load_model`.
        quantization: "nf4" or "none"; None for the model's own, as it was trained.
        boxes: image file to draw the boxes of a reply into. None: a new file in the working directory for each reply;
            with `once`, none.
        threads: of llama.cpp, for a folder of a GGUF file; None for as many as PyTorch has.

    Raises:
        InputError: an argument is wrong; found before weights are loaded.
        Failed: with `once`, the device's memory does not hold prompt and reply.
    """
    gguf = None
    if gguf_files(model):
        for name, given in {"--base": base, "--dtype": dtype, "--quantization": quantization}.items():
            if given not in (None, "auto"):
                raise UserError(f"{name} has no effect on {model}, whose language model is a GGUF file: leave it out")
        gguf, use = gguf_use(model, style)
    elif threads is not None:
        raise UserError("--threads has no effect with PyTorch, whose threads OMP_NUM_THREADS says: leave it out")
    else:
        use = find_use(model, base=base, style=style, quantization=quantization)
    config = QwenVLConfig.from_pretrained(use.source.base)
    if use.style == "base" and system is not None:
        raise UserError(f"{model} is a base model, which continues raw text: it has no system message")
    if config.visual is None and images:
        raise UserError(f"{model} is a text-only checkpoint: it takes no images")
    if boxes is not None:
        _check_drawing(Path(boxes))
    for image in images:
        load_image(image)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the terminal cannot show become escapes
            stream.reconfigure(errors="backslashreplace")

    template = choose_template(prompt, use.record, use.name)
    tell(f"{model}: {use}")
    for note in asking_notes(use.record, use.style, prompt=prompt, template=template, system=system):
        tell(note)
    loaded = load_chat_model(use, dtype) if gguf is None else open_gguf(gguf, use, rows=1, threads=threads)
    if isinstance(loaded, GgufModel):
        for line in loaded.memory():
            tell(line)
    conversation = open_conversation(use, loaded)
    conversation.prompt, conversation.max_new_tokens, conversation.temperature = template, max_new_tokens, temperature
    if system is not None:
        conversation.system = system
    for image in images:
        conversation.add_image(image)
    terminal = TerminalChat(conversation, None if boxes is None else Path(boxes))
    if once is not None:
        terminal.once(once)
    else:
        terminal.talk(model)


def load_chat_model(use: ModelUse, dtype: str | None) -> torch.nn.Module:
    """The model, loaded as `use` says."""
    return load_model(
        use.source.base,
        adapter=use.source.adapter,
        dtype=dtype,
        quantization=use.quantization,
        quantize=use.quantize,
        device_map="auto" if torch.cuda.is_available() else None,
    )


def open_conversation(use: ModelUse, loaded: torch.nn.Module | GgufModel) -> Conversation:
    """An empty conversation with `loaded`, a model that was loaded as `use` says."""
    base, record = use.source.base, use.record
    tokenizer, image_processor = QwenVLTokenizer.from_pretrained(base), None
    config = loaded.config if isinstance(loaded, GgufModel) else without_adapter(loaded).config
    if config.visual is not None:
        image_processor = load_processor(base).image_processor
    return Conversation(
        loaded,
        tokenizer,
        image_processor,
        use.style,
        record.system,
        views=record.views,
        markup_is_text=record.markup_is_text,
    )


class TerminalChat:
    """Reads lines from standard input and shows the replies.

    Args:
        conversation: with the model.
        boxes: image file to draw the boxes of a reply into; None for a new file each.
    """

    def __init__(self, conversation: Conversation, boxes: Path | None):
        self.conversation, self.boxes = conversation, boxes
        self._warned = False  # of the conversation's length

    def once(self, text: str) -> None:
        """Ask one thing.

        Raises:
            Failed: the device's memory does not hold prompt and reply.
            KeyboardInterrupt: Ctrl-C.
        """
        self._tell_of_markup(text)
        try:
            answer = self.conversation.ask(text)
        except torch.OutOfMemoryError as error:
            raise Failed(
                "the device's memory does not hold the prompt and its reply: try --quantization nf4"
            ) from error
        if answer.stopped:
            raise KeyboardInterrupt
        # A pipe gets the reply unchanged.
        print(terminal_text(answer.text) if sys.stdout.isatty() else answer.text, flush=True)
        self._tell_about(answer)
        self._show_regions(answer.text, draw=self.boxes is not None)

    def talk(self, name: str) -> None:
        """Talk until the user leaves; `name` is that of the model."""
        model = self.conversation.model
        if not isinstance(model, GgufModel):
            model = without_adapter(model)
            size = format_count(sum(parameter.numel() for parameter in model.parameters()))
            tell(f"{name}: {size} parameters, {str(model.dtype).removeprefix('torch.')}, on {model.device}")
        if self.conversation.style == "base":
            tell("A base model: it continues your text and has no turns. Ask it like this: What is the total? Answer:")
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
            except (InputError, Failed) as error:
                tell(str(error))

    def _take(self, line: str) -> None:
        """Carry out a line of input: a command, or a message."""
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
            size = f"{image.size[0]} x {image.size[1]} pixels"
            tell(f"{image.path.name}, {size}{self._picture_numbers()}: {waiting} image(s) for the next message")
        elif command == "/save" and argument:
            row = append_row(argument, self.conversation.with_system)
            tell(f"{argument}, row {row}")
        elif command in ("/image", "/save"):
            tell(f"{command} needs a file: {command} path/to/file")
        else:
            tell(f"There is no {command}. /help lists the commands; to send it, put a space before it.")

    def _picture_numbers(self) -> str:
        """Which pictures the last image that waits is, where that is not its own number."""
        views, conversation = self.conversation.views, self.conversation
        if views is None or conversation.style == "base":
            return ""
        last = views.count * (len(conversation.images) + len(conversation.waiting))
        return f", pictures {last - views.count + 1} to {last}"

    def _ask(self, text: str) -> None:
        self._tell_of_markup(text)
        answer = self.conversation.ask(text, _print_piece)
        print(flush=True)
        self._tell_about(answer)
        if not answer.text.strip():
            tell("(no reply; the message is forgotten)")
        self._show_regions(answer.text, draw=True)

    def _tell_of_markup(self, text: str) -> None:
        if self.conversation.markup_is_text and has_markup(text):
            tell("(<ref>, <box> and <quad> in messages are text to this model, as in its training)")

    def _tell_about(self, answer: Answer) -> None:
        """Tell what the reader of a reply should know."""
        if answer.stopped:
            tell("(stopped)")
        elif not answer.ended:
            tell(f"(cut at {self.conversation.max_new_tokens:,} tokens: --max-new-tokens)")
        trained = self.conversation.config.seq_length
        if answer.prompt_tokens > trained and not self._warned:
            self._warned = True
            cost = self.conversation.cost_of_pictures(self.conversation.images)
            tell(
                f"(the conversation is {answer.prompt_tokens:,} tokens long{cost}, and the model was trained on up to "
                f"{trained:,}: replies may get worse. /new forgets it)"
            )

    def _show_regions(self, reply: str, *, draw: bool) -> None:
        """Tell boxes and quads in pixels of the last image as a whole, and draw them on it."""
        regions = parse_grounding(reply).regions
        if not regions:
            return
        if not self.conversation.images:
            tell("(the reply has boxes, but there is no image in the conversation)")
            return
        if self.conversation.views is not None and not self.conversation.views.page:
            tell("(the reply has boxes, and the model was not shown the whole image that they would be of)")
            return
        image = self.conversation.images[-1]
        for region in regions:
            tell(f"  {region_text(region, image)}")
        if draw:
            path = self.boxes or free_name(Path(f"{image.path.stem}_boxes.png"))
            with path_errors(path, "write the boxes to", "Give another file with --boxes"):
                save_grounding(image.path, reply, path)
            tell(f"  drawn: {path}")


def region_text(region: Region, image: ChatImage) -> str:
    """`the dog: (12, 40) (530, 998)`, in pixels."""
    points = " ".join(f"({round(x)}, {round(y)})" for x, y in region.to_pixels(*image.size).points)
    label = terminal_line(region.label) if region.label is not None else region.kind
    return f"{label}: {points}"


def free_name(path: Path) -> Path:
    """The path if it is free, else with the first number that makes it free: `boxes-2.png`."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def read_line() -> str:
    """The next line of input; a prompt is shown only on a terminal.

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


def tell(line: str) -> None:
    """Print to stderr, with control characters made visible."""
    print(terminal_text(line), file=sys.stderr, flush=True)


def _print_piece(piece: str) -> None:
    print(terminal_text(piece), end="", flush=True)


def _unquoted(argument: str) -> str:
    """A path without the quotes that a file manager puts around it."""
    if len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "'\"":
        return argument[1:-1]
    return argument


def _check_drawing(path: Path) -> None:
    """Refuse a file that no image can be written to.

    Raises:
        UserError: its ending is not that of an image, or it has no folder.
    """
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--boxes {path}: give a file that ends in .png or .jpg")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--boxes {path}: there is no folder {path.absolute().parent}")
