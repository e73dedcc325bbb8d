"""`finetune serve` as a process of its own, asked by OpenAI's client; and what it refuses before weights load."""

import base64
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from adapters_for_tests import make_adapter
from forked_finetune import Started
from recipes_for_tests import IMAGES, TINY

from finetune.cli import main
from finetune.replies.replies import stop_ids_of
from finetune.replies.reply_text import reply_text
from qwenvl import load_image, load_model
from qwenvl.text.chat import render_chat


@dataclass
class Served:
    """A server and its client."""

    process: Started
    client: openai.OpenAI
    adapters: Path

    def ask(self, content: Any, model: str = "tiny", **fields: Any) -> Any:
        messages = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(model=model, messages=messages, **fields)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    adapters = folder / "adapters"
    make_adapter(adapters / "first")
    make_adapter(adapters / "second", target_modules=["c_attn", "in_proj"])
    process = Started(
        [
            *("serve", TINY, "--style", "chat", "--dtype", "float32", "--port", "0", "--grace", "20"),
            *("--adapter", f"first={adapters / 'first'}", "--allow-adapter-changes", adapters),
        ]
    )
    end = time.monotonic() + 120
    while not (found := re.search(r"^serving +(http\S+)", process.said_so_far()[0], re.MULTILINE)):
        assert process.poll() is None and time.monotonic() < end, process.said_so_far()
        time.sleep(0.02)
    client = openai.OpenAI(base_url=found[1], api_key="none", max_retries=0, timeout=60)
    yield Served(process, client, adapters)
    process.kill()
    process.wait(20)


def with_image(text: str, image: Path) -> list[dict[str, Any]]:
    uri = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    return [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": text}]


class Alone:
    """The same model with nothing else in the batch, by `generate`."""

    def __init__(self, processor: Any, adapter: Path | None = None) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        loaded = load_model(TINY, adapter=None if adapter is None else str(adapter), dtype="float32")
        self.model = loaded.eval()
        self.base = loaded.get_base_model() if adapter is not None else loaded
        self.stop_ids = stop_ids_of(loaded, self.tokenizer)

    def prompt(self, text: str, image: Path | None) -> dict[str, torch.Tensor]:
        parts = [] if image is None else [{"type": "image", "image": str(image)}]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
        rendered = render_chat(
            messages, self.tokenizer, add_generation_prompt=True, n_queries=self.base.config.n_queries
        )
        inputs = {"input_ids": torch.tensor([rendered.ids])}
        if image is not None:
            pixels = self.processor.image_processor(load_image(image), do_normalize=False, return_tensors="pt")
            inputs["pixel_values"] = pixels["pixel_values"]
        return inputs

    def reply(self, text: str, image: Path | None, most: int) -> tuple[str, int]:
        """Its text, and the tokens of the prompt."""
        inputs = self.prompt(text, image)
        ids = self.base.generate(
            **inputs, max_new_tokens=most, do_sample=False, eos_token_id=list(self.stop_ids), pad_token_id=0
        )[0, inputs["input_ids"].shape[1] :].tolist()
        return reply_text(self.tokenizer, ids), inputs["input_ids"].shape[1]


QUESTIONS = [
    ("What is this?", IMAGES[0], 24),
    ("Hello", None, 40),
    ("And what is that, at some length?", IMAGES[1], 12),
    ("What is this?", IMAGES[0], 30),
    ("How many?", IMAGES[2], 33),
    ("Which colour has the first one?", IMAGES[0], 9),
]


def test_replies_at_once_are_those_of_generate_alone(served, tiny_processor):
    questions = [(name, *question) for question in QUESTIONS for name in ("tiny", "first")]

    def ask(question: tuple[str, str, Path | None, int]) -> tuple[str, int]:
        name, text, image, most = question
        content = text if image is None else with_image(text, image)
        reply = served.ask(content, model=name, max_tokens=most)
        return reply.choices[0].message.content, reply.usage.prompt_tokens

    with ThreadPoolExecutor(len(questions)) as threads:
        replies = list(threads.map(ask, questions))
    alone = {"tiny": Alone(tiny_processor), "first": Alone(tiny_processor, served.adapters / "first")}
    assert replies == [alone[name].reply(*question) for name, *question in questions]
    assert len({text for text, _ in replies}) > 6, "the replies say something"
    again = [ask(question) for question in questions[:3]]
    assert again == replies[:3], "what was kept of them changes nothing"
    assert served.ask(with_image(*QUESTIONS[0][:2])).usage.prompt_tokens_details.cached_tokens > 256


def test_a_stream_with_an_image_is_the_whole_reply(served):
    content = with_image("What is this?", IMAGES[3])
    whole = served.ask(content, max_tokens=30).choices[0]
    pieces = list(served.ask(content, max_tokens=30, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.message.content
    assert pieces[-1].choices[0].finish_reason == whole.finish_reason


def test_logprobs_are_those_of_the_model(served, tiny_processor):
    alone = Alone(tiny_processor)
    reply = served.ask(with_image("Hi", IMAGES[1]), max_tokens=1, logprobs=True, top_logprobs=5)
    with torch.no_grad():
        logprobs = alone.base(**alone.prompt("Hi", IMAGES[1])).logits[0, -1].float().log_softmax(-1)
    values = logprobs.topk(5).values.tolist()
    (first,) = reply.choices[0].logprobs.content
    assert [one.logprob for one in first.top_logprobs] == pytest.approx(values, abs=1e-4)
    assert first.logprob == pytest.approx(values[0], abs=1e-4)


def test_seeded_replies_are_drawn_again_and_apart(served):
    drawn = {"max_tokens": 8, "temperature": 1.0, "seed": 3}
    three = served.ask("Hello", n=3, **drawn)
    texts = [choice.message.content for choice in three.choices]
    assert len(set(texts)) == 3
    assert served.ask("Hello", **drawn).choices[0].message.content == texts[0]
    assert served.ask("Hello", max_tokens=8, temperature=1.0).choices[0].message.content != texts[0]


def test_adapters_come_and_go(served, tiny_processor):
    def post(path: str, **body: str) -> Any:
        return served.client.post(path, body=body, cast_to=object)

    assert [model.id for model in served.client.models.list()] == ["tiny", "first"]
    folder = served.adapters / "second"
    assert post("/load_lora_adapter", lora_name="new", lora_path=str(folder))["id"] == "new"
    content = with_image("What is this?", IMAGES[0])
    expected, _ = Alone(tiny_processor, folder).reply("What is this?", IMAGES[0], 20)
    assert served.ask(content, model="new", max_tokens=20).choices[0].message.content == expected
    assert served.ask(content, max_tokens=20).choices[0].message.content != expected
    with pytest.raises(openai.BadRequestError, match="new is served already"):
        post("/load_lora_adapter", lora_name="new", lora_path=str(folder))
    post("/unload_lora_adapter", lora_name="new")
    with pytest.raises(openai.NotFoundError, match="there is no model 'new' here, but tiny, first"):
        served.ask("Hi", model="new")
    with pytest.raises(openai.BadRequestError, match="tiny is the model itself"):
        post("/unload_lora_adapter", lora_name="tiny")


def test_errors_are_openais(served):
    with pytest.raises(openai.BadRequestError) as caught:
        served.ask("Hi", extra_body={"top_k": 4})
    assert (caught.value.param, caught.value.code) == ("top_k", "unknown_parameter")
    with pytest.raises(openai.BadRequestError, match="this server takes 700 together"):
        served.ask("Hi", max_tokens=700)


def test_what_it_says_at_the_start(served):
    said = served.process.said_so_far()[0]
    assert f"model       tiny: {TINY}\n" in said
    assert f"model       first: {served.adapters / 'first'}\n" in said
    assert "takes       up to 700 tokens, prompt and reply together\n" in said
    assert "OpenAI's own default is 1\n" in said
    assert "keys        none: whoever uses this machine may ask\n" in said
    assert re.search(r"^try +curl http://127.0.0.1:\d+/v1/chat/completions ", said, re.MULTILINE)


def test_sigterm_lets_a_stream_finish(served):  # the last one: the server ends
    stream = served.ask("Hello", stream=True, n=4, max_tokens=150, temperature=2.0, seed=1)
    pieces = iter(stream)
    for _ in range(8):
        next(pieces)
    os.kill(served.process.pid, signal.SIGTERM)
    after = list(pieces)
    assert len(after) > 8
    finished = [piece.choices[0].index for piece in after if piece.choices[0].finish_reason is not None]
    assert sorted(finished) == [0, 1, 2, 3]
    assert served.process.wait(30) == 143
    assert served.process.said_so_far()[1].endswith(
        "interrupted by SIGTERM; replies that ran were finished, or ended after --grace\n"
    )
    with pytest.raises(openai.APIConnectionError):
        served.ask("Hi")


@pytest.fixture
def refused(capsys) -> Any:
    def run(*arguments: str | Path) -> str:
        assert main(["serve", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    return run


def test_what_is_refused_before_weights_load(refused, tmp_path, monkeypatch):
    def loads(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("finetune.serve.opened_model.load_model", loads)
    keys = tmp_path / "keys.txt"
    tiny = (TINY, "--style", "chat")
    assert "--host 0.0.0.0 is reached from other machines" in refused(*tiny, "--host", "0.0.0.0")
    assert "--host no.such.host.invalid is no address" in refused(*tiny, "--host", "no.such.host.invalid")
    assert "cannot be read: No such file" in refused(*tiny, "--api-key-file", keys)
    for content, message in [
        ("\n\n", "has no key"),
        ("a-key-that-is-long-enough\nshort\n", "line 2: a key of 5 characters can be guessed"),
        ("a key with spaces in it\n", "line 1: a key has letters"),
    ]:
        keys.write_text(content)
        said = refused(*tiny, "--api-key-file", keys)
        assert message in said and "long-enough" not in said
    assert "--cors '*' lets every page" in refused(*tiny, "--cors", "*")
    assert "--cors example.org: an origin is like" in refused(*tiny, "--cors", "example.org")
    assert "there is no such folder" in refused(*tiny, "--allow-adapter-changes", tmp_path / "none")
    assert "--max-model-len 5000: the model takes" in refused(*tiny, "--max-model-len", "5000")
    assert "two have the same name" in refused(*tiny, "--adapter", "a=x", "--adapter", "a=y")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"--port {port} cannot be listened on: Address already in use" in refused(*tiny, "--port", port)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "must be a port from 0 to 65535"),
        (["--adapter", "folder"], "must be NAME=FOLDER"),
        (["--temperature", "3"], "must be a number from 0 to 2"),
        (["--timeout", "0"], "must be a number above 0"),
        (["--max-queue", "0"], "must be a whole number from 1"),
    ],
)
def test_arguments(refused, arguments, message):
    assert message in refused(TINY, *arguments)


def test_the_extra_is_named_where_it_is_not_installed(refused, monkeypatch):
    monkeypatch.setattr("finetune.serve.serve.PACKAGES", ("fastapi", "a_package_that_is_not_there"))
    assert 'finetune serve needs a_package_that_is_not_there: install with pip install "qwenvl-finetune[serve]"' in (
        refused(TINY, "--style", "chat")
    )
