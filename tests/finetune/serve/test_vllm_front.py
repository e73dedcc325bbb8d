"""The API before a vLLM server answers as the API of the same model in this process, and says what fails there."""

import base64
import json
import re
import subprocess
import sys

import httpx
import pytest
from recipes_for_tests import IMAGES, TINY
from starlette.testclient import TestClient
from vllm_stand_in import StandIn, serve_stand_in

from finetune.cli import main
from finetune.errors import UserError
from finetune.export.export import export
from finetune.replies.text_stream import TokenBytes
from finetune.serve.api.api import Api
from finetune.serve.api.app import build_app
from finetune.serve.api.metrics import Metrics
from finetune.serve.api.settings import ApiSettings
from finetune.serve.model_to_open import pytorch_model
from finetune.serve.vllm_model import vllm_model
from finetune.terminal import say_nothing

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


def client_of(backend):
    metrics, token_bytes = Metrics(backend.replier), TokenBytes(backend.tokenizer)
    return TestClient(build_app(Api(backend.replier, backend.names, ApiSettings(2048), metrics, token_bytes)))


@pytest.fixture(scope="module")
def front(exported, stand_in):
    with serve_stand_in(stand_in) as address:
        model = vllm_model(str(exported), address, name="tiny")
        assert model.length_limit(None) == 700  # of its training
        backend = model.open()
        yield client_of(backend)
        backend.replier.close(0)


@pytest.fixture(scope="module")
def own():
    backend = pytorch_model(str(TINY), name="tiny", keep_bytes=0).open()  # a front keeps no prompts
    yield client_of(backend)
    backend.replier.close(0)


def comparable(body):
    """Without what is of one request alone, and what was known of its prompt; log-probabilities to 1e-3."""
    usage = body.get("usage") and {**body["usage"], "prompt_tokens_details": None}
    as_text = json.dumps({**body, "id": None, "created": None, "usage": usage})
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
                vllm_model(str(exported), address).open()
            stand_in.takes_embeddings = False
            with pytest.raises(UserError, match="You must set `--enable-prompt-embeds`"):
                vllm_model(str(exported), address).open()
    finally:
        table.copy_(own)
        stand_in.takes_embeddings = True


def test_a_server_that_does_not_answer_and_a_folder_that_is_none_are_said(exported):
    with pytest.raises(UserError, match="start it with `vllm serve FOLDER --enable-prompt-embeds`"):
        vllm_model(str(exported), "http://127.0.0.1:9")
    with pytest.raises(UserError, match="takes a folder of `finetune export MODEL --to qwen2`"):
        vllm_model(str(TINY), "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "vllm"], "needs --at URL"),
        (["--at", "http://localhost:8000"], "--at is for a vLLM server: give --engine vllm as well"),
        (["--engine", "vllm", "--at", "http://x", "--dtype", "float32"], "--dtype has no effect with --engine vllm"),
        (["--engine", "vllm", "--at", "http://x", "--batch-rows", "8"], "--batch-rows has no effect"),
        (["--engine", "vllm", "--at", "http://x", "--adapter", "a=b"], "--adapter has no effect"),
        (["--engine", "vllm", "--at", "http://x", "--allow-adapter-changes", "."], "--allow-adapter-changes has no"),
        (
            ["--engine", "vllm", "--at", "http://x", "--at-key-file", "none.txt"],
            "--at-key-file none.txt cannot be read",
        ),
        (["--engine", "vllm", "--at", "x"], "--at x: that is no address"),
    ],
)
def test_the_command_refuses_what_has_no_effect(exported, arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", str(exported), "--port", "0", *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_command_serves_before_a_vllm_server(exported, stand_in, tmp_path):
    """And says that nobody else may reach that server."""
    (tmp_path / "key.txt").write_text("secret\n")
    stand_in.key = "secret"
    try:
        with serve_stand_in(stand_in) as address:
            command = ["serve", str(exported), "--engine", "vllm", "--at", address, "--name", "tiny", "--port", "0"]
            command += ["--at-key-file", str(tmp_path / "key.txt")]
            server = subprocess.Popen(
                [sys.executable, "-u", "-m", "finetune", *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            said = []
            for line in server.stdout:
                said.append(line)
                if found := re.search(r"serving +(http://\S+/v1)", line):
                    break
            answer = httpx.post(f"{found[1]}/chat/completions", json=ASKED, timeout=30).json()
            server.terminate()
            server.communicate(timeout=30)
    finally:
        stand_in.key = None
    assert answer["usage"]["completion_tokens"] == 12
    assert "that server must be reached from here alone" in " ".join("".join(said).split())
    assert "secret" not in "".join(said)
