"""`transformers serve` on our folders, asked by the stock `openai` package over a real connection."""

import base64
import json
import os
import pty
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from recipes_for_tests import IMAGES, ROOT, TINY

from finetune.errors import InputError, UserError
from finetune.programs import transformers_serve
from qwenvl import QwenVLProcessor, load_model, load_processor
from qwenvl.checkpoint.record import ModelRecord, write_record
from qwenvl.text.vocabulary import GROUNDING_TOKENS
from qwenvl.views import Views

openai = pytest.importorskip("openai", reason="the client of the API is not installed")
pytest.importorskip("fastapi", reason="the server's packages are not installed")
pytest.importorskip("uvicorn", reason="the server's packages are not installed")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def asks(image, text: str = "Where is it?", **part) -> list[dict]:
    url = image if isinstance(image, str) else data_uri(image)
    return [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]}
    ]


def data_uri(image: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()


def reply_of(folder, image: Path, text: str = "Where is it?", tokens: int = 12) -> str:
    """Our own greedy reply."""
    model, processor = load_model(folder, dtype="float32"), load_processor(folder)
    parts = [{"type": "image", "image": str(image)}, {"type": "text", "text": text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True, keep_grounding=True)


@pytest.fixture
def unprepared(monkeypatch):
    """What `prepare_serve` changes comes back after the test."""
    import transformers
    from transformers.cli.serving import server, utils
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.models.auto import modeling_auto

    for name in ("QWenLMHeadModel", "QwenVLForConditionalGeneration"):
        monkeypatch.setattr(sys.modules[transformers.__name__], name, None, raising=False)
    monkeypatch.setitem(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "qwen", None)
    monkeypatch.setattr(ModelManager, "_load_processor", ModelManager._load_processor)
    monkeypatch.setattr(server, "build_server", server.build_server)
    use = utils.GenerationState.use_continuous_batching
    monkeypatch.setattr(utils.GenerationState, "use_continuous_batching", use)
    for handler in (ChatCompletionHandler, ResponseHandler):
        monkeypatch.setattr(handler, "_resolve_model", handler._resolve_model)
        read = staticmethod(handler.get_processor_inputs_from_messages)
        monkeypatch.setattr(handler, "get_processor_inputs_from_messages", read)


@pytest.fixture
def client(unprepared):
    from transformers.cli.serve import Serve

    transformers_serve.prepare_serve()
    port = free_port()
    server = Serve(device="cpu", dtype="float32", host="127.0.0.1", port=port, non_blocking=True)
    try:
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=5)
    finally:
        server.kill_server()


def refused(client, **request) -> str:
    with pytest.raises(openai.BadRequestError) as error:
        client.with_options(max_retries=0).chat.completions.create(**request)
    assert error.value.body["type"] == "invalid_request_error"
    return error.value.body["message"]


def test_the_stock_client_is_answered_about_an_image(client, tmp_path):
    folder = str(shutil.copytree(TINY, tmp_path / "tuned"))
    # As a training of ours leaves it: a system message and views, which the Auto classes must follow.
    write_record(folder, ModelRecord(chat_format="chatml", system="Be short.", views=Views(True, (1, 2), 0.0)))
    expected = reply_of(folder, IMAGES[0])
    asked = {"model": folder, "messages": asks(IMAGES[0]), "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected and whole.usage.completion_tokens == 12
    assert whole.usage.prompt_tokens > 3 * 256, "the page and its two parts"
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].choices[0].finish_reason == "length"

    secret = tmp_path / "secret.png"
    shutil.copy(IMAGES[0], secret)
    for elsewhere in (str(secret), "http://127.0.0.1/a.png", f"file://{secret}"):
        assert "is no data URI" in refused(client, model=folder, messages=asks(elsewhere))
    assert "data URI of 26 bytes" in refused(client, model=folder, messages=asks("data:image/png;base64,AAAA"))
    options = {"chat_template_kwargs": {"images": [str(secret)]}}
    assert "chat_template_kwargs: images" in refused(
        client, model=folder, messages=asks(IMAGES[0]), extra_body=options
    )

    raw = str(shutil.copytree(TINY, tmp_path / "raw"))
    write_record(raw, ModelRecord(chat_format="raw"))
    assert "was trained on raw text" in refused(client, model=raw, messages=asks(IMAGES[0]))
    continued = client.completions.create(model=raw, prompt="Once", max_tokens=3, temperature=0)
    assert continued.usage.completion_tokens <= 3


def test_boxes_are_text_of_a_reply():
    """The tags are special tokens, which the server leaves out; whole, and as it streams."""
    from tokenizers.decoders import DecodeStream

    manager = SimpleNamespace(trust_remote_code=False)
    load = transformers_serve.ready_processor(lambda _manager, _name: QwenVLProcessor.from_pretrained(TINY))
    processor = load(manager, f"{TINY}@main")
    reply = " <ref>the dog</ref><box>(1,2),(3,4)</box>\n"
    ids = processor.tokenizer.encode_text(reply, tokens=GROUNDING_TOKENS)
    ids = [processor.tokenizer.control_tokens["<|extra_0|>"], *ids, processor.tokenizer.im_end_id]
    assert processor.decode(ids, skip_special_tokens=True) == reply
    stream = DecodeStream([], skip_special_tokens=True)
    pieces = [stream.step(processor.tokenizer._tokenizer, token) for token in ids]
    assert "".join(filter(None, pieces)) == reply


def test_another_transformers_is_said(unprepared, monkeypatch):
    from transformers.cli.serving.model_manager import ModelManager

    monkeypatch.setattr(ModelManager, "_load_processor", lambda self, name: None)
    with pytest.raises(UserError, match=r"transformers 5\.\S+ has no ModelManager._load_processor as this software"):
        transformers_serve.prepare_serve()


def test_an_adapter_is_to_be_merged_first(tmp_path):
    transformers_serve.refuse_unmerged(str(TINY))
    transformers_serve.refuse_unmerged("Qwen/Qwen-VL-Chat")
    run = tmp_path / "run"
    shutil.copytree(TINY, run / "model")
    with pytest.raises(
        InputError, match=f"is a run, and transformers serve takes its checkpoint: give {run / 'model'}"
    ):
        transformers_serve.refuse_unmerged(str(run))
    shutil.move(run / "model", run / "base")
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(run / "base")}))
    with pytest.raises(InputError, match="is an adapter, and transformers serve takes whole checkpoints"):
        transformers_serve.refuse_unmerged(str(run))


def test_batches_of_text_are_refused(tiny_model):
    """Transformers' own batching computes positions by itself."""
    text = SimpleNamespace(config=tiny_model.config)
    assert not transformers_serve.refusing_batches(lambda *_: False)(None, text, "VLM")
    assert transformers_serve.refusing_batches(lambda *_: True)(None, SimpleNamespace(config=None), "LLM")
    with pytest.raises(InputError, match="without --continuous-batching"):
        transformers_serve.refusing_batches(lambda *_: True)(None, text, "LLM")


def test_an_option_that_the_form_has_not_is_named():
    transformers_serve.refuse_unknown_options({"grounding": True})
    with pytest.raises(InputError, match="enable_thinking"):
        transformers_serve.refuse_unknown_options({"enable_thinking": False})


@pytest.mark.slow
def test_transformers_chat_talks_to_transformers_serve(tmp_path):
    """Both by `finetune run`, in processes and terminals of their own."""
    port, log = free_port(), tmp_path / "log.txt"
    words = [sys.executable, "-m", "finetune", "run", "transformers"]
    environment = {**os.environ, "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "0"}
    served = [*words, "serve", str(ROOT / "examples" / "nano"), "--device", "cpu", "--port", str(port)]
    with log.open("w") as said:
        server = subprocess.Popen(served, cwd=ROOT, env=environment, stdout=said, stderr=said)
    try:
        while "Uvicorn running" not in log.read_text():
            assert server.poll() is None, log.read_text()[-3000:]
        own, theirs = pty.openpty()
        chat = subprocess.Popen(
            [*words, "chat", str(ROOT / "examples" / "nano"), f"http://localhost:{port}/v1", "do_sample=false"],
            cwd=ROOT,
            env=environment,
            stdin=theirs,
            stdout=subprocess.PIPE,
            text=True,
        )
        os.close(theirs)
        os.write(own, b"What is the date?\nAnd again?\n!exit\n")
        out, _ = chat.communicate(timeout=300)
        os.close(own)
        assert chat.returncode == 0 and out.count(" tokens in ") == 2, out
        assert log.read_text().count('POST /v1/chat/completions HTTP/1.1" 200') == 2
    finally:
        server.terminate()
        assert server.wait(60) == 143
