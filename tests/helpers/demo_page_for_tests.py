"""The demo's page, served in this process, and a browser that watches what the page does."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from adapters_for_tests import make_adapter
from safetensors.torch import load_file, save_file

CHROMIUM = Path("/usr/bin/chromium")
GRADIO_READS = (
    *("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE", "GRADIO_ALLOWED_PATHS"),
    *("GRADIO_SHARE", "GRADIO_MCP_SERVER", "HF_HUB_DISABLE_TELEMETRY"),
)


@pytest.fixture
def page_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a page's files; what the page sets for Gradio is taken back."""
    pytest.importorskip("gradio", reason="Gradio is not installed")
    from finetune.demo.server import prepare_gradio

    for name in GRADIO_READS:
        monkeypatch.setenv(name, "")
    folder = tmp_path / "page"
    folder.mkdir()
    prepare_gradio(folder)
    return folder


@contextmanager
def served(models: Sequence[Any], folder: Path, examples: Sequence[Any] = (), **options: Any) -> Iterator[str]:
    """The page on a free port; its address."""
    from finetune.demo.server import Server, make_app, take_port
    from finetune.serve.reach import own_names, url_of

    started = threading.Event()
    with take_port("127.0.0.1", 0) as bound:
        app = make_app("page", models, examples, folder, hosts=own_names("127.0.0.1"), **options)
        server = Server(app, started.set)
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        thread.start()
        assert started.wait(60), "the page does not start"
        try:
            yield url_of(bound)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the page does not end"


def make_strong_adapter(folder: Path, base: Path) -> None:
    """Save an adapter that changes what its base says."""
    make_adapter(folder, base=base)
    file = folder / "adapter_model.safetensors"
    save_file({name: 6 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


class Watched:
    """What a page did that it must not."""

    def __init__(self, page: Any, address: str) -> None:
        self.faults: list[str] = []
        page.on("request", lambda request: self._requested(request.url, address))
        page.on("console", lambda said: self._said(said.type, said.text))
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("response", lambda got: got.status >= 400 and self.faults.append(f"{got.status} {got.url}"))

    def _requested(self, url: str, address: str) -> None:
        if not url.startswith((f"{address}/", "data:", "blob:")):
            self.faults.append(f"asked for {url}")

    def _said(self, kind: str, text: str) -> None:
        if kind == "error":
            self.faults.append(f"console: {text}")


@pytest.fixture
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if not CHROMIUM.is_file():
        pytest.skip(f"there is no {CHROMIUM}")
    with sync_api.sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield one
        one.close()


@contextmanager
def opened(browser: Any, address: str, width: int = 1400, height: int = 900) -> Iterator[Any]:
    """The page in the browser. Nothing of it may load from elsewhere, fail or complain."""
    page = browser.new_page(viewport={"width": width, "height": height})
    watched = Watched(page, address)
    page.goto(address)
    page.get_by_label("Message", exact=True).wait_for()
    yield page
    page.close()
    assert not watched.faults


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()
