"""The page as a server: its port, its folder of files, and Gradio's app within bounds."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from finetune.demo.access import CheckPassword, is_loopback
from finetune.demo.asked_model import AskedModel
from finetune.demo.run_examples import Example
from finetune.errors import UserError
from finetune.terminal import say

FIRST_PORT, PORTS = 7860, 100
"""Gradio's own: the first port that is free from there, where none is given."""
GRACE = 3
"""Seconds for what is being sent when the page is closed."""


def listen(host: str, port: int | None) -> socket.socket:
    """Take a port, before a model is loaded for minutes.

    Args:
        port: None for the first one that is free from `FIRST_PORT`; 0 for any.

    Raises:
        UserError: it is taken, or there is no such address here.
    """
    bare = host.strip("[]")
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    ports = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]
    problem: OSError | None = None
    for number in ports:
        one = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "posix":
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((bare, number))
            one.listen(128)
            return one
        except (OSError, OverflowError) as error:
            one.close()
            problem = error if isinstance(error, OSError) else OSError(str(error))
    reason = problem.strerror or problem if problem is not None else "none is free"
    where = f"port {port}" if port is not None else f"ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1}"
    raise UserError(f"the page cannot listen on {host}, {where} ({reason}): give another one with --port or --host")


@contextmanager
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


def make_app(
    title: str,
    models: Sequence[AskedModel],
    examples: Sequence[Example],
    folder: Path,
    check_password: CheckPassword | None = None,
) -> Any:
    """The page as an ASGI app; `prepare_gradio` was called before.

    Args:
        title: of the page.
        models: one, or two that are compared.
        examples: of a run's evaluation data.
        folder: of the page's files.
        check_password: of who may open it; None lets everyone in.
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
    return Guard(app)


class Server(uvicorn.Server):
    """Says where it listens once it does."""

    def __init__(self, config: uvicorn.Config, said: str) -> None:
        super().__init__(config)
        self._said = said

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        say("page", self._said)


def make_server(app: Any, said: str) -> Server:
    """A server of the page; `said` is printed when it listens."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE, server_header=False
    )
    return Server(config, said)


def address_of(listening: socket.socket) -> str:
    """`http://127.0.0.1:7860`"""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def refuse_open_page(host: str, has_passwords: bool) -> None:
    """Raises:
    UserError: other machines would reach the page, and there is no password.
    """
    if not is_loopback(host) and not has_passwords:
        raise UserError(
            f"--host {host} lets other machines open the page: give --password-file FILE with lines name:password, "
            "or leave --host out and reach it by ssh -L"
        )
