"""A GGUF folder served: the engine's replies, streamed, and what its command refuses."""

import threading

import pytest
from gguf_for_tests import UNAVAILABLE, exported, pages

from finetune.batches.image_request import ImageRequest
from finetune.commands import serve as command
from finetune.errors import UserError
from finetune.serve.asked import Asked, ChoiceToken, Ended, Refused
from finetune.serve.gguf_to_open import llamacpp_model, open_llamacpp
from qwenvl import ImageAccess

with_llamacpp = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))


@with_llamacpp
def test_the_engine_replies_to_pages_that_come_together():
    from gguf_for_tests import KNOWN

    model = llamacpp_model(str(exported()), rows=4, threads=1)
    assert (model.trained_length, model.context) == (2048, 2048)
    with pytest.raises(UserError, match="--max-model-len 4096: the model takes 2,048 tokens"):
        model.length_limit(4096)
    backend = model.open()
    try:
        served = next(iter(backend.names))
        assert served.name == "nano-f16" and served.style == "chat" and served.takes_images
        assert any("keys and values of 2,048 tokens" in note for note in served.notes)
        events, ended = [[] for _ in range(6)], [threading.Event() for _ in range(6)]
        for number, page in enumerate(pages(6)):

            def take(event, number=number):
                events[number].append(event)
                if isinstance(event, Ended | Refused):
                    ended[number].set()

            image = ImageRequest((KNOWN / page.image).read_bytes(), ImageAccess(), "request")
            backend.replier.submit(Asked(page.ids, 24, served.stop_ids, [image]), take)
        assert all(one.wait(60) for one in ended)
    finally:
        backend.replier.close(0)
    for page, own in zip(pages(6), events, strict=True):
        assert isinstance(own[-1], Ended)
        tokens = [event.token.id for event in own if isinstance(event, ChoiceToken)]
        assert [token for token in tokens if token is not None] == page.reply


@with_llamacpp
def test_adapters_are_refused():
    _, names = open_llamacpp(str(exported()), rows=1, threads=1)
    with pytest.raises(UserError, match=r"llama.cpp runs no adapters here: merge it"):
        names.check("contracts", "runs/contracts")


def parsed(*arguments):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model-f16.gguf").touch()
    return str(tmp_path)


def test_a_folder_with_a_gguf_file_is_run_by_llamacpp(folder, tmp_path):
    assert command.check_engine(parsed(folder)) == "llama.cpp"
    assert command.check_engine(parsed(folder, "--threads", "4", "--batch-tokens", "4096")) == "llama.cpp"
    assert command.check_engine(parsed(str(tmp_path / "other"))) == "pytorch"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--engine", "pytorch"], "GGUF file, which only --engine llama.cpp runs"),
        (["--adapter", "a=b"], "--adapter has no effect with llama.cpp"),
        (["--dtype", "float32"], "--dtype has no effect with llama.cpp"),
        (["--quantization", "nf4"], "--quantization has no effect with llama.cpp"),
        (["--at", "http://x"], "--at is for a vLLM server"),
    ],
)
def test_arguments_without_effect_are_refused(folder, given, reason):
    with pytest.raises(UserError, match=reason):
        command.check_engine(parsed(folder, *given))


def test_threads_are_llamacpps(tmp_path):
    with pytest.raises(UserError, match="--threads has no effect with PyTorch"):
        command.check_engine(parsed(str(tmp_path), "--threads", "2"))
