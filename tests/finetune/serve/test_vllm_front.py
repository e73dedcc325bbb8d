"""The API before a vLLM server answers as the API of the same model in this process, and says what fails there."""

import base64
import json

import pytest
from recipes_for_tests import IMAGES, TINY
from starlette.testclient import TestClient
from vllm_stand_in import StandIn, serve_stand_in

from finetune.errors import UserError
from finetune.export.export import export
from finetune.replies.text_stream import TokenBytes
from finetune.serve.api.api import Api
from finetune.serve.api.app import build_app
from finetune.serve.api.metrics import Metrics
from finetune.serve.api.settings import ApiSettings
from finetune.serve.engine import Engine
from finetune.serve.opened_model import open_served
from finetune.serve.vllm_model import open_before_vllm
from finetune.terminal import say_nothing
from qwenvl import QwenVLTokenizer

IMAGE = "data:image/png;base64," + base64.b64encode(IMAGES[0].read_bytes()).decode()
MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": "What is it?"}],
    }
]
ASKED = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(str(TINY), "qwen2", out=tmp_path_factory.mktemp("exported") / "qwen2", say=say_nothing)


@pytest.fixture(scope="module")
def stand_in(exported):
    return StandIn(exported)


def client_of(replier, names, context):
    tokenizer = QwenVLTokenizer.from_pretrained(TINY)
    settings = ApiSettings(context)
    return TestClient(build_app(Api(replier, names, settings, Metrics(replier), TokenBytes(tokenizer))))


@pytest.fixture(scope="module")
def front(exported, stand_in):
    with serve_stand_in(stand_in) as address:
        engine, names = open_before_vllm(str(exported), address, name="tiny", max_open=8, image_bytes=10**6)
        yield client_of(engine, names, engine.context)
        engine.close(0)


@pytest.fixture(scope="module")
def own():
    opened, names = open_served(str(TINY), name="tiny")
    engine = Engine(opened)
    yield client_of(engine, names, 2048)
    engine.close(0)


def comparable(body):
    """Without what is of one request alone, log-probabilities to 1e-3."""
    as_text = json.dumps({**body, "id": None, "created": None, "system_fingerprint": None})
    return json.loads(as_text, parse_float=lambda value: round(float(value), 3))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"messages": [{"role": "user", "content": "Hello"}]},
        {"logprobs": True, "top_logprobs": 2, "max_tokens": 3},
        {"n": 2, "temperature": 0},
    ],
)
def test_answers_are_those_of_the_model_itself(front, own, settings):
    ours, fronts = (client.post("/v1/chat/completions", json=ASKED | settings) for client in (own, front))
    assert ours.status_code == 200 and comparable(fronts.json()) == comparable(ours.json())


def test_streams_are_those_of_the_model_itself(front, own):
    def events(client):
        asked = ASKED | {"stream": True, "stream_options": {"include_usage": True}}
        lines = client.post("/v1/chat/completions", json=asked).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [comparable(json.loads(line.removeprefix("data: "))) for line in lines[:-2]]

    assert len(events(own)) > 5 and events(front) == events(own)


@pytest.mark.parametrize(
    ("fault", "status", "code", "words"),
    [
        ({"refuse_with": 500}, 502, "upstream", "answers 500"),
        ({"refuse_with": 503}, 503, "unreachable", "answers 503"),
        ({"error_after": 0}, 502, "upstream", "EngineCore died"),
    ],
)
def test_what_fails_there_is_said_in_the_form_of_the_api(front, stand_in, fault, status, code, words):
    for name, value in fault.items():
        setattr(stand_in, name, value)
    try:
        answer = front.post("/v1/chat/completions", json=ASKED)
    finally:
        for name in fault:
            setattr(stand_in, name, None)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code) and words in error["message"]


def test_a_stream_that_breaks_off_there_ends_with_an_error(front, stand_in):
    stand_in.error_after = 3
    try:
        text = front.post("/v1/chat/completions", json=ASKED | {"stream": True}).text
    finally:
        stand_in.error_after = None
    last = json.loads(text.rstrip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "upstream" and "[DONE]" not in text


def test_no_adapters_are_loaded_before_a_server(front):
    answer = front.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "b"})
    assert answer.status_code == 404


def test_another_model_there_is_found_at_the_start(exported, stand_in):
    table = stand_in.model.get_input_embeddings().weight.data
    own = table.clone()
    try:
        with serve_stand_in(stand_in) as address:
            table.copy_(own.roll(1, dims=0))
            with pytest.raises(UserError, match="another model than the folder here; serve that folder there"):
                open_before_vllm(str(exported), address, max_open=1, image_bytes=0)
            stand_in.takes_embeddings = False
            with pytest.raises(UserError, match="You must set `--enable-prompt-embeds`"):
                open_before_vllm(str(exported), address, max_open=1, image_bytes=0)
    finally:
        table.copy_(own)
        stand_in.takes_embeddings = True


def test_a_server_that_does_not_answer_and_a_folder_that_is_none_are_said(exported):
    with pytest.raises(UserError, match="start it with `vllm serve FOLDER --enable-prompt-embeds`"):
        open_before_vllm(str(exported), "http://127.0.0.1:9", max_open=1, image_bytes=0)
    with pytest.raises(UserError, match="takes a folder of `finetune export MODEL --to qwen2`"):
        open_before_vllm(str(TINY), "http://127.0.0.1:9", max_open=1, image_bytes=0)
