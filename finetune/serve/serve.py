"""`finetune serve`: a model behind the API, from its folder to the last reply."""

import importlib.util
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.serve.keys import others_can_read, read_keys
from finetune.serve.model_to_open import Backend, ModelToOpen
from finetune.serve.reach import check_reach, own_names, url_of
from finetune.terminal import say
from qwenvl import ImageAccess

if TYPE_CHECKING:
    from finetune.serve.api.settings import ApiSettings

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "httpx")


@dataclass(frozen=True)
class ServeOptions:
    """How a server takes requests.

    Attributes:
        host, port: where it listens; port 0 is any that is free.
        key_file: keys, one a line; None where none is needed, which only this machine may reach.
        cors: origins whose pages may use it in a browser.
        allow_urls: whether images are fetched.
        adapter_folders: where adapters may be loaded from while it runs; empty forbids that.
        max_model_len: most tokens of a prompt and its reply; None is what the model was trained on.
        max_body: bytes of a request.
        max_images, max_pixels: images of a request, and pixels of each.
        timeout: seconds of a request.
        grace: seconds that running replies have after a signal.
        temperature: of requests that give none.
    """

    host: str
    port: int
    key_file: Path | None
    cors: Sequence[str]
    allow_urls: bool
    adapter_folders: Sequence[Path]
    max_model_len: int | None
    max_body: int
    max_images: int
    max_pixels: int
    timeout: float
    grace: float
    temperature: float


def serve(find_model: Callable[[], ModelToOpen], options: ServeOptions) -> None:
    """Serve a model until a signal.

    Args:
        find_model: the model, whose weights are loaded once all else is known to be right.
        options: of the server.

    Raises:
        InputError: an argument is wrong.
        Failed: the device cannot be used any more.
        Interrupted, KeyboardInterrupt: by a signal, when all replies have ended.
    """
    require_packages()
    from finetune.serve.api.server import listen
    from finetune.serve.api.settings import ApiSettings

    keys = () if options.key_file is None else read_keys(options.key_file)
    check_reach(options.host, options.cors, bool(keys))
    folders = tuple(_existing(folder) for folder in options.adapter_folders)
    model = find_model()
    settings = ApiSettings(
        max_model_len=model.length_limit(options.max_model_len),
        images=ImageAccess(allow_urls=options.allow_urls, max_bytes=options.max_body, max_pixels=options.max_pixels),
        max_images=options.max_images,
        max_body=options.max_body,
        timeout=options.timeout,
        temperature=options.temperature,
        keys=keys,
        # With a key, a page of the web cannot ask, whatever it calls the server.
        hosts=None if keys else own_names(options.host),
        cors=tuple(options.cors),
        adapter_folders=folders,
    )
    with listen(options.host, options.port) as bound:
        backend = model.open()
        if folders and backend.between_steps is None:
            raise UserError("--allow-adapter-changes: this engine loads no adapters while it runs")
        _say_what_is_served(backend, settings, options)
        _run(backend, settings, bound, options.grace)


def _run(backend: Backend, settings: "ApiSettings", bound: socket.socket, grace: float) -> None:
    from finetune.replies.text_stream import TokenBytes
    from finetune.serve.api.api import Api
    from finetune.serve.api.app import build_app
    from finetune.serve.api.metrics import Metrics
    from finetune.serve.api.server import Server

    api = Api(
        backend.replier,
        backend.names,
        settings,
        Metrics(backend.replier),
        TokenBytes(backend.tokenizer),
        backend.between_steps,
    )

    def started() -> None:
        address = url_of(bound)
        say("try", example(address, next(iter(backend.names)).name, bool(settings.keys)))
        say("serving", f"{address}/v1 until Ctrl-C")

    try:
        Server(build_app(api), backend.replier, grace=grace, on_start=started).serve_on(bound)
    finally:
        backend.replier.close(0)


def require_packages() -> None:
    """Raises:
    UserError: what the API needs is not installed.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f'finetune serve needs {" and ".join(missing)}: install with pip install "qwenvl-finetune[serve]"'
        )


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"--allow-adapter-changes {folder}: there is no such folder")
    return folder.resolve()


def _say_what_is_served(backend: Backend, settings: "ApiSettings", options: ServeOptions) -> None:
    for name in backend.names:
        say("model", f"{name.name}: {name.folder}")
        for note in name.notes:
            say("", note)
    sources = "data URIs and public http(s) URLs" if settings.images.allow_urls else "data URIs"
    say("takes", f"up to {settings.max_model_len:,} tokens, prompt and reply together")
    say(
        "",
        f"up to {settings.max_images} images as {sources}, of {settings.images.max_pixels / 1e6:g} million pixels, in "
        f"{settings.max_body / 1e6:g} MB and {settings.timeout:g} s a request",
    )
    state = backend.replier.state
    if state.row_bound:
        say("batch", f"up to {state.row_bound} replies and {state.token_bound:,} tokens")
    say("replies", _how_chosen(settings.temperature))
    if settings.adapter_folders:
        say("adapters", f"are loaded on request from {', '.join(map(str, settings.adapter_folders))}")
    if options.key_file is None:
        say("keys", "none: whoever uses this machine may ask")
    else:
        say("keys", f"{len(settings.keys)}, of {options.key_file}")
        if others_can_read(options.key_file):
            say("", "other users of this machine can read the file: chmod 600 it")


def _how_chosen(temperature: float) -> str:
    if temperature == 0:
        return "the likeliest (temperature 0) to requests that give no temperature; OpenAI's own default is 1"
    return f"drawn at temperature {temperature:g} to requests that give no temperature"


def example(address: str, model: str, with_key: bool) -> str:
    """A command that asks the server."""
    key = '-H "Authorization: Bearer $KEY" ' if with_key else ""
    return (
        f"curl {address}/v1/chat/completions {key}-H 'Content-Type: application/json' -d "
        f'\'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}\''
    )
