"""The page as a server: its port, its folder of files, and Gradio's app within bounds."""

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import uvicorn
from starlette.routing import Mount

from finetune.demo.access import CheckPassword
from finetune.demo.asked_model import AskedModel
from finetune.demo.run_examples import Example
from finetune.errors import UserError
from finetune.serve.api.server import listen
from finetune.serve.reach import is_this_machine

FIRST_PORT, PORTS = 7860, 100
"""Gradio's own: the first port that is free from there, where none is given."""
GRACE = 2
"""Seconds for what is being sent when the page is closed."""


def take_port(host: str, port: int | None) -> socket.socket:
    """Take a port, before a model is loaded for minutes.

    Args:
        host: name or address.
        port: None for the first one that is free from `FIRST_PORT`; 0 for any.

    Raises:
        UserError: it cannot be had.
    """
    if port is not None:
        return _listening(host, port)
    for number in range(FIRST_PORT, FIRST_PORT + PORTS - 1):
        with contextlib.suppress(UserError):
            return _listening(host, number)
    return _listening(host, FIRST_PORT + PORTS - 1)


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens: before that, another page could take the same port."""
    bound = listen(host, port)
    try:
        bound.listen()
    except OSError as error:
        bound.close()
        raise UserError(f"--host {host} --port {port} cannot be listened on: {error.strerror}") from None
    return bound


@contextlib.contextmanager
def page_folder() -> Iterator[Path]:
    """A folder for what visitors upload and the page shows, for this user alone; it is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="finetune-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prepare_gradio(folder: Path) -> None:
    """Set what Gradio reads from the environment when it is imported: no reports of use, no files elsewhere."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(folder / "examples")
    os.environ["GRADIO_ALLOWED_PATHS"] = ""
    os.environ["GRADIO_SHARE"] = "False"
    os.environ["GRADIO_MCP_SERVER"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@dataclass(frozen=True)
class PageApp:
    """The page as an app.

    Attributes:
        asgi: the app.
        end: ends the connections that open pages hold; called in its event loop.
    """

    asgi: Any
    end: Callable[[], None]


def make_app(
    title: str,
    models: Sequence[AskedModel],
    examples: Sequence[Example],
    folder: Path,
    check_password: CheckPassword | None = None,
    hosts: Sequence[str] | None = None,
) -> PageApp:
    """The page as an app; `prepare_gradio` was called before.

    Args:
        title: of the page.
        models: one, or two that are compared.
        examples: of a run's evaluation data.
        folder: of the page's files.
        check_password: of who may open it; None lets everyone in.
        hosts: what requests may call the server; None is anything.
    """
    import gradio as gr
    from fastapi import FastAPI

    from finetune.demo.guard import Guard
    from finetune.demo.page import Page
    from finetune.demo.pictures import MOST_BYTES
    from finetune.demo.style import CSS

    blocks = Page(title, models, examples, folder).blocks
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # The fonts are the system's: Gradio's themes load theirs from the internet.
    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="blue"
    ).set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        # Gradio's own are too pale to be read easily (WCAG 2, contrast 4.5).
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        auth=check_password,
        auth_message=None,
        allowed_paths=[],
        blocked_paths=[],
        max_file_size=MOST_BYTES,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        show_error=False,
        theme=theme,
        css=CSS,
    )
    # Gradio takes any path of this machine for an upload, until its own `launch` has said this.
    blocks.has_launched = True
    # Open pages hold a connection each; Gradio ends them only with its own server.
    (gradio_app,) = [cast(Any, route.app) for route in app.routes if isinstance(route, Mount)]
    return PageApp(Guard(app, hosts), gradio_app.stop_event.set)


class Server(uvicorn.Server):
    """Serves the page until a signal comes or a model fails.

    Args:
        app: of `make_app`.
        on_start: called when the page can be opened.
        has_failed: whether a model will not reply any more.
    """

    def __init__(
        self,
        app: PageApp,
        on_start: Callable[[], None] = lambda: None,
        has_failed: Callable[[], bool] = lambda: False,
    ) -> None:
        config = uvicorn.Config(
            app.asgi,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=GRACE,
        )
        super().__init__(config)
        self._end, self._on_start, self._has_failed = app.end, on_start, has_failed

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._end()
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        return self._has_failed() or await super().on_tick(counter)


def refuse_open_page(host: str, has_passwords: bool) -> None:
    """Raises:
    UserError: other machines would reach the page, and there is no password.
    """
    if not has_passwords and not is_this_machine(host):
        raise UserError(
            f"--host {host} is reached from other machines: give --password-file FILE with lines name:password, or "
            "leave --host out to be reached from this machine alone"
        )
