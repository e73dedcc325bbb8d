"""The models behind the page reply as in `finetune chat`."""

import queue
from pathlib import Path

import pytest
from demo_page_for_tests import make_strong_adapter
from gguf_for_tests import UNAVAILABLE, exported
from recipes_for_tests import ROOT

from finetune.chat.terminal_chat import open_conversation
from finetune.demo.engine_model import EngineModel, close_models, open_models
from finetune.demo.talk import Settings, Talk
from finetune.errors import UserError
from finetune.replies.model_style import find_use
from qwenvl import load_model

NANO = ROOT / "examples" / "nano"
PAGES = [ROOT / f"examples/quickstart/known/images/test/{number:06}.png" for number in range(2)]
QUESTIONS = ["The shop, please.", "What does Bat cost?"]


def talked(models: list[EngineModel], folder: Path) -> list[list[str]]:
    """The replies of each model in a conversation of two turns."""
    talk = Talk(models, folder)
    for page, question in zip(PAGES, QUESTIONS, strict=True):
        talk.upload(page.name, page.read_bytes())
        *_, _ = talk.ask(question, Settings(("",) * len(models), max_new_tokens=16))
    return [[turn.replies[number].text for turn in talk.turns] for number in range(len(models))]


def chatted(model: str | Path) -> list[str]:
    """The same in `finetune chat`."""
    use = find_use(str(model))
    loaded = load_model(use.source.base, adapter=use.source.adapter)
    conversation = open_conversation(use, loaded)
    conversation.max_new_tokens = 16
    replies = []
    for page, question in zip(PAGES, QUESTIONS, strict=True):
        conversation.add_image(page)
        replies.append(conversation.ask(question).text)
    return replies


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """On the nano, with replies of its own."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    make_strong_adapter(folder, NANO)
    return folder


def test_an_adapter_and_its_base_are_one_model_and_each_replies_as_in_the_chat(adapter, tmp_path):
    models = open_models(str(adapter), str(NANO))
    try:
        tuned, base = models
        assert tuned.replier is base.replier
        assert "switched off" in base.about[0] and "An adapter on" in tuned.about[0]
        replies = talked(models, tmp_path)
    finally:
        close_models(models, 0)
    assert replies == [chatted(adapter), chatted(NANO)]
    assert replies[0] != replies[1], "the adapter does nothing"
    assert replies[1][0] == "Stone Deli", "the nano reads its page"


@pytest.mark.slow
@pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
def test_a_gguf_folder_replies_beside_the_model_that_it_was_made_of(tmp_path):
    models = open_models(str(exported()), str(NANO))
    try:
        assert "run by llama.cpp" in models[0].about[0] and models[0].replier is not models[1].replier
        first, second = talked(models, tmp_path)
    finally:
        close_models(models, 0)
    assert first == second and first[0] == "Stone Deli"


def test_an_option_that_a_gguf_folder_has_no_use_for_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="--dtype has no effect"):
        open_models(str(tmp_path), dtype="float16")


def test_a_conversation_that_is_too_long_is_refused_with_a_sentence():
    (model,) = models = open_models(str(NANO))
    try:
        text = "word " * model.context
        with pytest.raises(UserError, match="start a new one"):
            model.ask(
                [{"role": "user", "content": text}], max_new_tokens=5, temperature=0.0, on_event=queue.Queue().put
            )
    finally:
        close_models(models, 0)
