"""Chat completions over a real socket; what replies is scripted, so that every answer is exact."""

import base64
import contextlib
import io
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL import Image
from running_api import RunningApi, chat_body, running_api

from finetune.serve.batch_bounds import BatchBounds


@pytest.fixture(scope="module")
def api() -> Iterator[RunningApi]:
    with running_api(max_images=2, max_body=200_000) as running:
        yield running


@pytest.fixture(scope="module")
def client(api) -> openai.OpenAI:
    return openai.OpenAI(base_url=api.address, api_key="none", max_retries=0)


def data_uri(shade: int = 0, size: int = 16) -> str:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (shade, 0, 0)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def with_image(text: str, uri: str) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": text}]


def ask(client: openai.OpenAI, text: Any = "Say abc", **fields: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], **fields)


def test_a_reply(client, api):
    reply = ask(client)
    assert reply.object == "chat.completion"
    assert reply.model == "tiny"
    (choice,) = reply.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", "Say abc")
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    rendered = api.api.names.get("tiny").render([{"role": "user", "content": "Say abc"}])
    words = len(api.tokenizer.encode("Say abc"))
    assert reply.usage.prompt_tokens == len(rendered.ids)
    assert reply.usage.completion_tokens == words
    assert reply.usage.total_tokens == len(rendered.ids) + words
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


def test_a_stream_is_the_reply_in_pieces(client):
    pieces = list(ask(client, "Say äöü 你好", stream=True, stream_options={"include_usage": True}))
    *grown, end = pieces
    assert grown[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in grown) == "Say äöü 你好"
    assert [piece.choices[0].finish_reason for piece in grown] == [None] * (len(grown) - 1) + ["stop"]
    assert "\ufffd" not in "".join(piece.choices[0].delta.content or "" for piece in grown)
    assert end.choices == []
    assert end.usage.completion_tokens == ask(client, "Say äöü 你好").usage.completion_tokens
    assert len({piece.id for piece in pieces}) == 1
    assert len(grown) > 3
    assert all(piece.usage is None for piece in ask(client, stream=True))


def test_the_stream_on_the_wire(api):
    status, content, response = api.request("POST", "/v1/chat/completions", chat_body("Hi", stream=True))
    assert status == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert response.headers["Cache-Control"] == "no-cache"
    events = content.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events[:-2])


def test_limits_of_a_reply(client):
    assert ask(client, "one two three four", max_tokens=2).choices[0].finish_reason == "length"
    assert ask(client, "one two three four", max_completion_tokens=2).usage.completion_tokens == 2
    stopped = ask(client, "one two three four", stop="three").choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("one two ", "stop")
    stopped = ask(client, "one two three four", stop=["four", " two"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("one", "stop")


def test_a_stop_text_is_no_part_of_a_reply_wherever_it_begins(client, api, monkeypatch):
    monkeypatch.setattr(api.decoder, "_script", lambda row: api.tokenizer.encode(" \n\n12"))
    for stop, left in ((["\n\n"], " "), (" ", ""), ("\n1", " \n"), (None, " \n\n12")):
        (choice,) = ask(client, stop=stop).choices
        assert (choice.message.content, choice.finish_reason) == (left, "stop")
        pieces = ask(client, stop=stop, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == left


def test_several_replies_with_their_logprobs(client, api):
    reply = ask(client, "a b", n=3, logprobs=True, top_logprobs=2, temperature=1.0, seed=5)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    words = api.tokenizer.encode("a b")
    assert reply.usage.completion_tokens == 3 * len(words)
    for choice in reply.choices:
        assert b"".join(bytes(one.bytes) for one in choice.logprobs.content) == b"a b"
        for one in choice.logprobs.content:
            assert one.token.encode() == bytes(one.bytes)
            assert one.logprob == pytest.approx(0, abs=1e-6)
            assert len(one.top_logprobs) == 2 and one.top_logprobs[0].token == one.token
    streamed: dict[int, list[str]] = {}
    for piece in ask(client, "a b", n=2, logprobs=True, stream=True):
        (choice,) = piece.choices
        if choice.logprobs is not None:
            streamed.setdefault(choice.index, []).extend(one.token for one in choice.logprobs.content)
    assert {index: "".join(tokens) for index, tokens in streamed.items()} == {0: "a b", 1: "a b"}


def test_an_image_is_encoded_once(client, api):
    before = api.model.encoded
    for _ in range(2):
        reply = ask(client, with_image("What?", data_uri(1)))
        assert reply.choices[0].message.content.endswith("What?")
    assert api.model.encoded == before + 1
    n_queries = api.model.config.n_queries
    assert reply.usage.prompt_tokens > n_queries


def test_boxes_in_pixels(client, api, monkeypatch):
    text = "<ref>the dog</ref><box>(100,200),(500,800)</box>"
    monkeypatch.setattr(api.decoder, "_script", lambda row: api.tokenizer.encode(text))
    reply = ask(client, with_image("Where?", data_uri(2, size=500)), extra_body={"boxes": "pixels"})
    box = {"label": "the dog", "box": [50.0, 100.0, 250.0, 400.0], "quad": None, "image": 0}
    assert reply.choices[0].message.content == text
    assert reply.choices[0].message.boxes == [box]
    *_, last = ask(client, with_image("Where?", data_uri(2, size=500)), stream=True, extra_body={"boxes": "pixels"})
    assert last.choices[0].delta.boxes == [box]


REFUSED = [
    ({"top_k": 5}, "top_k", "unknown: top_k. The fields are model, messages"),
    ({"repetition_penalty": 1.2, "min_p": 0.1}, "repetition_penalty", "unknown: repetition_penalty, min_p."),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "leave it out (or give 0"),
    ({"presence_penalty": False}, "presence_penalty", "leave it out"),
    ({"logit_bias": {"5": 10}}, "logit_bias", "is not supported by this server"),
    ({"tools": [{"type": "function"}]}, "tools", "is not supported by this server"),
    ({"response_format": {"type": "json_object"}}, "response_format", "leave it out"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "leave it out"),
    ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
    ({"temperature": "0"}, "temperature", "valid number"),
    ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": True}, "n", "valid integer"),
    ({"n": 1000}, None, "1000 replies are asked for"),
    ({"seed": 2**63}, "seed", "less than"),
    ({"stop": ["a"] * 5}, "stop", "at most 4"),
    ({"stop": ""}, "stop[0]", "at least 1 character"),
    ({"stop": ["a", 5]}, "stop[1]", "valid string"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "say different things"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown: stream_options.usage"),
    ({"boxes": "percent"}, "boxes", "'pixels'"),
    ({"boxes": "pixels"}, "boxes", "there is no image"),
    ({"messages": []}, "messages", "at least one"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "must be one of"),
    ({"messages": "Hi"}, "messages", "valid list"),
    ({"max_tokens": 1020}, "max_tokens", "and the reply may have 1,020: this server takes 1,024 together"),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED, ids=[next(iter(case[0])) for case in REFUSED])
def test_what_is_wrong_is_said_by_name(api, fields, param, message):
    status, content = api.chat(**fields)
    assert status == 400
    error = content["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


def test_neutral_values_ask_for_nothing(api):
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "store": False,
        "n": 1,
        "user": "somebody",
        "stop": None,
        "seed": None,
        "stream_options": None,
        "service_tier": "auto",
        "reasoning_effort": None,
    }
    status, content = api.chat(**neutral)
    assert (status, content["choices"][0]["message"]["content"]) == (200, "Say abc")


def test_a_prompt_without_room(api):
    status, content = api.chat("word " * 2000)
    assert status == 400
    assert content["error"]["code"] == "context_length_exceeded"
    assert "tokens: this server takes 1,024 together (--max-model-len)" in content["error"]["message"]
    assert content["error"]["param"] == "messages"


def test_no_such_model(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "Hi"}])
    assert caught.value.code == "model_not_found"
    assert "there is no model 'gpt' here, but tiny" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"model": "tiny", "model": "other"}', "'model' is given twice"),
        (b'{"temperature": NaN}', "NaN is no number of JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "the body is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff\xfe\x00", "the body is not JSON"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate pair"),
        (
            b'{"model": "tiny", "messages": [{"role": "user", "content": "Hi", "\\ud800": 1}]}',
            "messages[0].\\ud800: is",
        ),
    ],
)
def test_a_body_that_is_no_request(api, body, message):
    status, content, _ = api.request("POST", "/v1/chat/completions", body)
    assert status == 400, content
    assert message in content["error"]["message"]


def test_a_body_is_counted_while_it_is_read(api):
    status, content, _ = api.request("POST", "/v1/chat/completions", b" " * 300_000)
    assert status == 413
    assert "more than 200,000 bytes" in content["error"]["message"]
    with socket.create_connection(("127.0.0.1", api.port), timeout=20) as connection:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(3):
            connection.sendall(b"186a0\r\n" + b" " * 100_000 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come(api, monkeypatch):
    monkeypatch.setattr("finetune.serve.api.request_body.SILENCE", 0.1)
    with socket.create_connection(("127.0.0.1", api.port), timeout=20) as connection:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_comes_in_drops(api, monkeypatch):
    """Never silent for long, and all the same no longer than a body takes: it holds a place that others wait for."""
    monkeypatch.setattr("finetune.serve.api.request_body.SILENCE", 0.3)
    with socket.create_connection(("127.0.0.1", api.port), timeout=20) as connection:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: 1000\r\n\r\n{")
        connection.settimeout(0.05)
        answer = b""
        for _ in range(200):
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(100)
                break
            connection.sendall(b" ")
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_images_that_cannot_be_taken(api, tmp_path):
    file = tmp_path / "image.png"
    Image.new("RGB", (4, 4)).save(file)
    for uri, message in [
        (str(file), "images are read from data URIs"),
        (f"file://{file}", "images are read from data URIs"),
        ("https://example.org/a.png", "this server fetches no URLs"),
        ("data:image/png;base64,AAAA", "cannot be used"),
    ]:
        status, content = api.chat(with_image("What?", uri))
        assert status == 400, uri
        assert message in content["error"]["message"]
        assert content["error"]["param"].startswith("messages[0].content[0]")
    status, content = api.chat([*with_image("What?", data_uri(1)), *with_image("?", data_uri(1)) * 2])
    assert (status, "this server takes 2" in content["error"]["message"]) == (400, True)


def test_an_image_that_is_damaged_is_an_error_also_in_a_stream(api):
    damaged = data_uri(3)[:-40] + "A" * 40
    for stream in (False, True):
        status, content = api.chat(with_image("What?", damaged), stream=stream)
        assert status == 400, content
        assert content["error"]["code"] == "input"


def test_other_paths_and_methods(api):
    assert api.request("GET", "/v1/completions")[:2] == (
        404,
        {
            "error": {
                "message": "there is no GET /v1/completions here",
                "type": "not_found_error",
                "param": None,
                "code": None,
            }
        },
    )
    assert api.request("DELETE", "/v1/models")[0] == 405
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert api.request("GET", path)[0] == 404


def test_models_health_and_metrics(api, client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.max_model_len, model.default_temperature) == ("tiny", "model", 1024, 0.0)
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here"):
        client.models.retrieve("other")
    assert api.request("GET", "/health")[:2] == (200, {"status": "ok"})

    def figures() -> dict[str, float]:
        lines = api.request("GET", "/metrics")[1].splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    before = figures()
    ask(client, "one two")
    api.chat(top_k=1)
    after = figures()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('finetune_requests_total{status="200"}') == 1
    assert grown('finetune_requests_total{status="400"}') == 1
    assert grown("finetune_first_token_seconds_count") == 1
    assert grown("finetune_reply_tokens_total") == len(api.tokenizer.encode("one two"))
    assert after["finetune_batch_rows"] == after["finetune_waiting_requests"] == 0


def test_a_fault_is_told_without_its_details(api, monkeypatch, caplog):
    def fail(rows):
        raise RuntimeError("secret")

    monkeypatch.setattr(api.decoder, "before_join", fail)
    status, content, response = api.request("POST", "/v1/chat/completions", chat_body("Hi"))
    assert (status, content["error"]["type"]) == (500, "server_error")
    assert "secret" not in json.dumps(content)
    assert "secret" in caplog.text
    assert response.headers["x-should-retry"] == "false"
    monkeypatch.undo()
    assert api.chat("Hi")[0] == 200


def test_a_stream_that_fails_says_so(api, client, monkeypatch):
    steps = []

    def fail(numbers):
        steps.append(1)
        if len(steps) > 2:
            raise RuntimeError("broken")

    monkeypatch.setattr(api.decoder, "before_step", fail)
    text = ""
    with pytest.raises(openai.APIError, match="a fault of the server"):
        for piece in ask(client, "one two three four", stream=True):
            text += piece.choices[0].delta.content or ""
    assert text == api.tokenizer.decode(api.tokenizer.encode("one two three four")[:3])


def test_a_client_that_leaves_ends_its_work():
    with running_api(held=True) as api:
        for stream in (False, True):
            connection = api.open_chat("one two three four five six", stream=stream)
            api.decoder.permit(1)
            api.wait_until(lambda: api.engine.state.rows == 1)
            connection.close()
            time.sleep(0.05)  # what the operating system needs to tell
            api.decoder.permit(2)
            api.wait_until(lambda: api.decoder.live == [])
        steps = len(api.decoder.steps)
        assert steps < 8
        metrics = api.request("GET", "/metrics")[1]
        assert 'finetune_requests_total{status="499"} 2.0' in metrics


def test_a_full_queue_is_429():
    with running_api(held=True, engine={"max_queue": 1, "bounds": BatchBounds(rows=1)}) as api:
        runs = api.open_chat("one two")
        api.wait_until(lambda: api.engine.state.rows == 1)
        waits = api.open_chat("one two")
        api.wait_until(lambda: api.engine.state.waiting == 1)
        status, content, response = api.request("POST", "/v1/chat/completions", chat_body("Hi"))
        assert (status, content["error"]["type"], response.headers["Retry-After"]) == (429, "rate_limit_error", "1")
        api.decoder.permit(100)
        for connection in (runs, waits):
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_request_has_its_time():
    with running_api(held=True, timeout=0.1) as api:
        connection = api.open_chat("one two three", stream=False)
        api.wait_until(lambda: api.engine.state.rows == 1)
        time.sleep(0.1)
        api.decoder.permit(1)
        assert connection.recv(100).startswith(b"HTTP/1.1 504 ")


def test_a_reader_that_does_not_read_is_cut_off_and_delays_nobody(monkeypatch):
    monkeypatch.setattr("finetune.serve.api.mailbox.MOST_EVENTS", 8)
    monkeypatch.setattr("finetune.serve.api.connection.UNREAD", 0.2)
    with running_api(held=True, send_buffer=4096) as api:
        # More pieces than the buffers of uvicorn and of the operating system hold.
        tokens = api.tokenizer.encode("one two three four five six seven eight ") * 20
        monkeypatch.setattr(api.decoder, "_script", lambda row: tokens)
        slow = api.open_chat("Hi", stream=True, logprobs=True, top_logprobs=20)
        api.wait_until(lambda: api.engine.state.rows == 1)
        monkeypatch.setattr(api.decoder, "_script", api._echo)
        other = api.open_chat("Hi")
        api.wait_until(lambda: api.engine.state.waiting == 1)
        while api.decoder.live:
            _step(api)
        assert 20 < len(api.decoder.steps) < len(tokens), "its work was ended"
        assert other.recv(100).startswith(b"HTTP/1.1 200 ")
        other.close()
        api.wait_until(lambda: not api.server.server_state.connections)
        slow.close()


def test_many_replies_at_once_are_no_slow_reader(client, monkeypatch):
    """A step has an event for each of them, and more steps may come before the event loop has its turn."""
    monkeypatch.setattr("finetune.serve.api.mailbox.MOST_EVENTS", 2)
    reply = ask(client, "one two three", n=16)
    assert [choice.message.content for choice in reply.choices] == ["one two three"] * 16
    monkeypatch.setattr("finetune.serve.api.mailbox.MOST_EVENTS", 12)
    texts = [""] * 16
    for piece in ask(client, "one two three", n=16, stream=True):
        texts[piece.choices[0].index] += piece.choices[0].delta.content or ""
    assert texts == ["one two three"] * 16


def _step(api: RunningApi) -> None:
    """Let one step go, and what came of it reach the event loop."""
    steps = len(api.decoder.steps)
    api.decoder.permit(1)
    api.wait_until(lambda: len(api.decoder.steps) > steps or not api.decoder.live)
    time.sleep(0.002)


def test_a_connection_that_asks_nothing_is_cut(monkeypatch):
    monkeypatch.setattr("finetune.serve.api.connection.IDLE", 0.1)
    with running_api() as api:
        for sent in (b"", b"POST /v1/chat/comp"):
            with socket.create_connection(("127.0.0.1", api.port), timeout=20) as connection:
                connection.sendall(sent)
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(10) == b""
