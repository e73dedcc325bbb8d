"""Chat asks as the model was trained: its prompt, its system message, its markup."""

import shutil

import pytest
from recipes_for_tests import TINY

from finetune.chat import terminal_chat as chat_module
from finetune.chat.conversation import Answer, Conversation
from finetune.errors import UserError
from qwenvl.checkpoint.record import ModelRecord, write_record


@pytest.fixture
def tuned(tmp_path):
    """The tiny checkpoint with a record; takes the fields of the record."""

    def tuned(**fields):
        folder = tmp_path / "tuned"
        shutil.copytree(TINY, folder)
        write_record(folder, ModelRecord(chat_format="chatml", **fields))
        return folder

    return tuned


def said_by(capsys, model, **settings):
    """What `chat` says about how it asks."""
    chat_module.chat(str(model), once="What is the total?", max_new_tokens=2, **settings)
    return capsys.readouterr().err


@pytest.fixture
def asked(monkeypatch):
    """The messages that a model is asked, which then replies nothing."""
    messages = []

    def generate(conversation, prompt, images, max_new_tokens, on_text):
        messages.append(conversation.tokenizer.decode(prompt.ids))
        return Answer("", len(prompt.ids), True, False)

    monkeypatch.setattr(Conversation, "_generate", generate)
    return messages


def test_a_question_is_put_into_the_prompt_of_training(tuned, asked, capsys):
    folder = tuned(prompts={"vqa": ("{question} Answer in one word.",)}, system="Read the receipt.")
    said = said_by(capsys, folder)
    assert "put into the prompt '{question} Answer in one word.' (as it was trained; --prompt plain" in said
    assert asked[-1].startswith("<|im_start|>system\nRead the receipt.<|im_end|>")
    assert "after the system message 'Read the receipt.' (as it was trained; --system" in said
    assert "user\nWhat is the total? Answer in one word.<|im_end|>" in asked[-1]
    assert "system message" not in said_by(capsys, folder, prompt="plain", system="Be brief.")
    assert "system\nBe brief.<|im_end|>" in asked[-1] and "user\nWhat is the total?<|im_end|>" in asked[-1]
    said_by(capsys, folder, prompt="Q: {question}")
    assert "user\nQ: What is the total?<|im_end|>" in asked[-1]


@pytest.mark.parametrize(
    "prompts",
    [
        {},
        {"vqa": ("{question}",)},
        {"vqa": ("{question} One word.", "{question} Answer:")},
        {"vqa": ("{question} One word.",), "messages": ()},
        {"caption": ("Describe the image.",)},
    ],
)
def test_without_one_prompt_of_training_a_question_is_asked_as_typed(tuned, asked, capsys, prompts):
    folder = tuned(prompts=prompts)
    said = said_by(capsys, folder)
    assert "put into the prompt" not in said
    templates = [template for of_format in prompts.values() for template in of_format]
    assert ("asked as typed: it was trained with" in said) is (len(prompts) > 1 or len(templates) > 1)
    assert ("rows with prompts of their own" in said) is ("messages" in prompts)
    assert "user\nWhat is the total?<|im_end|>" in asked[-1]
    if prompts != {"vqa": ("{question}",)}:
        with pytest.raises(UserError, match=r"--prompt.*(no single prompt|there is no \{question\})"):
            said_by(capsys, folder, prompt="trained")


def test_a_prompt_without_a_place_for_the_message_is_refused(tuned, capsys):
    with pytest.raises(UserError, match=r"--prompt: there is no \{question\} or \{phrase\} in 'Answer:'"):
        said_by(capsys, tuned(), prompt="Answer:")
