"""The API on a real socket, in a thread of this process, before a decoder whose replies are scripted."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripted_decoder import ScriptedDecoder, scripted_model

from finetune.replies.decoder import PromptRow
from finetune.replies.model_style import find_use
from finetune.replies.text_stream import TokenBytes
from finetune.serve.api.api import Api
from finetune.serve.api.app import build_app
from finetune.serve.api.metrics import Metrics
from finetune.serve.api.server import Server, listen
from finetune.serve.api.settings import ApiSettings
from finetune.serve.asked_name import Asking
from finetune.serve.engine import Engine
from finetune.serve.model_to_open import BetweenStepsOf
from finetune.serve.served_names import ServedNames
from qwenvl import QwenVLConfig, QwenVLProcessor

TINY = Path(__file__).parent.parent.parent / "examples" / "tiny"


class RunningApi:
    """A server, and ways to ask it.

    The reply to a user's message is the message itself: `Say abc` is answered `Say abc`.
    """

    def __init__(
        self, held: bool, settings: dict[str, Any], engine: dict[str, Any], send_buffer: int | None, adapters: Any
    ) -> None:
        processor = QwenVLProcessor.from_pretrained(TINY)
        config = QwenVLConfig.from_pretrained(TINY)
        self.tokenizer = tokenizer = processor.tokenizer
        self.decoder = ScriptedDecoder(
            self._echo, tokenizer.im_end_id, config.vocab_size, context=config.max_position_embeddings, held=held
        )
        self.model = scripted_model(self.decoder, processor, config)
        self.engine = Engine(self.model, **engine)
        names = ServedNames(str(TINY), (), tokenizer, Asking(), adapters)
        names.put(find_use(str(TINY), style="chat"), "tiny", None)
        options = ApiSettings(**{"max_model_len": 1024, **settings})
        self.api = Api(
            self.engine, names, options, Metrics(self.engine), TokenBytes(tokenizer), BetweenStepsOf(self.engine)
        )
        bound = listen("127.0.0.1", 0)
        if send_buffer is not None:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.port = bound.getsockname()[1]
        started = threading.Event()
        self.server = Server(build_app(self.api), self.engine, grace=0, on_start=started.set)
        self.error: Exception | None = None  # that ended the server
        self.thread = threading.Thread(target=self._serve, args=(bound,), daemon=True)
        self.thread.start()
        assert started.wait(20)

    def _serve(self, bound: socket.socket) -> None:
        try:
            self.server.serve_on(bound)
        except Exception as error:
            self.error = error

    def _echo(self, row: PromptRow) -> Sequence[int]:
        text = self.tokenizer.decode([token for token in row.ids if token < self.tokenizer.eod_id])
        return self.tokenizer.encode(text.rpartition("user\n")[2].rpartition("\nassistant\n")[0].strip())

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, http.client.HTTPResponse]:
        """Status, content (of JSON, read), and the response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, sent, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(content) if is_json else content.decode(), response

    def chat(self, text: Any = "Say abc", **fields: Any) -> tuple[int, Any]:
        """Ask for a reply to a message."""
        status, content, _ = self.request("POST", "/v1/chat/completions", chat_body(text, **fields))
        return status, content

    def open_chat(self, text: str, **fields: Any) -> socket.socket:
        """Send a request and read nothing."""
        body = json.dumps(chat_body(text, **fields)).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        return connection

    def wait_until(self, condition: Any) -> None:
        """Wait for something that other threads do."""
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, "it has not come"
            time.sleep(0.002)

    def stop(self) -> None:
        self.server.should_exit = True
        if self.decoder._permits is not None:
            self.decoder.permit(10_000)
        self.thread.join(20)
        assert not self.thread.is_alive()


def chat_body(text: Any, **fields: Any) -> dict[str, Any]:
    """A request for a reply to one message; fields that are None are sent as null."""
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **fields}


@contextmanager
def running_api(
    *,
    held: bool = False,
    engine: dict[str, Any] | None = None,
    send_buffer: int | None = None,
    adapters: Any = None,
    **settings: Any,
) -> Iterator[RunningApi]:
    """A server that is stopped afterwards.

    Args:
        held: each step waits until `decoder.permit` lets it go.
        engine: arguments of `Engine`.
        send_buffer: bytes that the operating system holds for a client that does not read.
        adapters: holds those of the model, see `ServedNames`.
        settings: of `ApiSettings`.
    """
    api = RunningApi(held, settings, engine or {}, send_buffer, adapters)
    try:
        yield api
    finally:
        api.stop()
