"""How a server stops, and what it listens on."""

import socket

import pytest
import torch
from running_api import chat_body, running_api

from finetune.errors import Failed, UserError
from finetune.serve.api.server import listen
from finetune.serve.reach import is_this_machine, url_of


def read_all(connection: socket.socket) -> str:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts).decode()


def test_replies_that_are_not_done_in_time_end_with_an_error():
    with running_api(held=True) as api:
        streamed = api.open_chat("one two three four", stream=True)
        api.wait_until(lambda: api.engine.state.rows == 1)
        whole = api.open_chat("one two three four")
        api.wait_until(lambda: api.engine.state.waiting == 1)
        api.server.should_exit = True
        api.wait_until(lambda: api.engine.is_closing)
        assert api.thread.is_alive()
        api.decoder.permit(1)
        said = read_all(streamed)
        assert said.startswith("HTTP/1.1 200 ")
        assert '"finish_reason":"stop"' not in said and "[DONE]" not in said
        assert '"message":"the server is stopping"' in said
        assert read_all(whole).startswith("HTTP/1.1 503 ")
        api.thread.join(20)
        assert not api.thread.is_alive()
        assert api.error is None
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", api.port))


def test_a_server_whose_device_is_lost_stops_as_failed(caplog):
    with running_api() as api:

        def fail(numbers):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        api.decoder.before_step = fail
        status, content, _ = api.request("POST", "/v1/chat/completions", chat_body("Hi"))
        assert (status, content["error"]["code"]) == (500, "fault")
        api.thread.join(20)
        assert not api.thread.is_alive()
        assert isinstance(api.error, Failed)
        assert "illegal memory access" in caplog.text


def test_an_address():
    with listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert url_of(bound) == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {port} cannot be listened on: Address already"):
            bound.listen()
            listen("127.0.0.1", port)
    with listen("0.0.0.0", 0) as bound:
        assert url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.mark.parametrize(
    ("host", "own"), [("127.0.0.1", True), ("localhost", True), ("127.3.2.1", True), ("0.0.0.0", False), ("::", False)]
)
def test_what_only_this_machine_reaches(host, own):
    assert is_this_machine(host) == own
