"""What a question becomes: the exact ids of chat and base prompts, and solved examples before them."""

from pathlib import Path

import pytest
from questions_for_tests import CONVERSATION, ROWS, ask, source, write

from finetune.data.sample import DataError
from finetune.errors import UserError
from finetune.evaluation.questions import Questions
from finetune.evaluation.tasks import TASKS, custom_task, find_task
from qwenvl.text.chat import render_chat

N_QUERIES = 3


@pytest.fixture(scope="module")
def tokenizer(tiny_processor):
    return tiny_processor.tokenizer


def written(question, tokenizer):
    """The prompt with its control tokens, and the names of its image files."""
    rendered = question.render(tokenizer, N_QUERIES)
    text = tokenizer.decode(rendered.ids)
    assert text.count("<img>") == len(rendered.images)
    image = f"<img>{'<imgpad>' * N_QUERIES}</img>"
    return text.replace(image, "[image]"), [str(path).rsplit("/", 1)[-1] for path in rendered.images]


def in_chat(text):
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )


ASKED = {
    "docvqa": ("What?", "What? Answer:"),
    "textvqa": ("What?", "What? Answer:"),
    "ocrvqa": ("Who?", "Who? Answer:"),
    "refcoco": ("<ref>dog</ref>", "<ref>dog</ref><box>"),
    "screenspot": ("<ref>close</ref>", "<ref>close</ref><box>"),
    "flickr30k": ("Describe the image in English:", "Describe the image in English:"),
    "multiple_choice": (
        "What?\nA. dog\nB. 4\nAnswer with the letter of the right option.",
        "Question: What?\nOptions: A. dog\nB. 4\nAnswer:",
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_question_as_a_chat_and_as_raw_text(tmp_path, tokenizer, name):
    chat, base = (ask(tmp_path, name, ROWS[name], style=style)[0] for style in ("chat", "base"))
    assert written(chat, tokenizer) == (in_chat(f"Picture 1:[image]\n{ASKED[name][0]}"), ["a.png"])
    assert written(base, tokenizer) == (f"[image]{ASKED[name][1]}", ["a.png"])


def test_the_exact_ids_of_a_base_prompt(tmp_path, tokenizer):
    image = [tokenizer.image_start_id, *[tokenizer.image_pad_id] * N_QUERIES, tokenizer.image_end_id]
    ids = ask(tmp_path, "docvqa", ROWS["docvqa"], style="base")[0].render(tokenizer, N_QUERIES).ids
    assert ids == [*image, *tokenizer.encode_text("What? Answer:")]
    # Tags are tokens, and so is the open box that the model goes on after.
    ids = ask(tmp_path, "refcoco", ROWS["refcoco"], style="base")[0].render(tokenizer, N_QUERIES).ids
    ref, end_ref, box = (tokenizer.control_tokens[token] for token in ("<ref>", "</ref>", "<box>"))
    assert ids == [*image, ref, *tokenizer.encode_text("dog"), end_ref, box]


def test_the_exact_ids_of_a_chat_prompt_are_those_of_training(tmp_path, tokenizer):
    question = ask(tmp_path, "refcoco", ROWS["refcoco"])[0]
    content = [{"type": "image", "image": "x"}, {"type": "text", "text": "<ref>dog</ref>"}]
    trained = [{"role": "user", "content": content, "grounding": True}, {"role": "assistant", "content": "x"}]
    ids = question.render(tokenizer, N_QUERIES).ids
    whole = render_chat(trained, tokenizer, n_queries=N_QUERIES).ids
    assert ids == whole[: len(ids)] and tokenizer.control_tokens["<ref>"] in ids


def test_text_that_looks_like_a_token_or_a_place_stays_text_where_that_is_allowed(tmp_path, tokenizer):
    said = "{options} <|im_end|> <box>(1,2),(3,4)</box> {question}"
    row, allowed = ROWS["docvqa"] | {"question": said}, {"markup_as_text": ["<|im_end|>", "<box>"]}
    with pytest.raises(DataError, match=r"row 1, messages\[0\]: <\|im_end\|>, <box> look like markup"):
        ask(tmp_path, "docvqa", row, style="base")
    question = ask(tmp_path, "docvqa", row, style="base", **allowed)[0]
    ids = question.render(tokenizer, N_QUERIES).ids
    assert ids[N_QUERIES + 2 :] == tokenizer.encode_text(f"{said} Answer:")
    assert not set(ids[N_QUERIES + 2 :]) & set(tokenizer.control_tokens.values())
    marked = ask(tmp_path, "docvqa", row, style="base", grounding=True, **allowed)[0]
    assert tokenizer.control_tokens["<box>"] in marked.render(tokenizer, N_QUERIES).ids


def test_a_prompt_of_ones_own_is_the_same_for_both(tmp_path, tokenizer):
    prompt = {"source_with": {"prompt": "Look: {question}"}}
    assert written(ask(tmp_path, "docvqa", ROWS["docvqa"], **prompt)[0], tokenizer)[0].count("\nLook: What?<|im_end|>")
    base = ask(tmp_path, "docvqa", ROWS["docvqa"], style="base", **prompt)[0]
    assert written(base, tokenizer)[0] == "[image]Look: What?"


def test_conversations_keep_their_turns_and_images(tmp_path, tokenizer):
    task = custom_task("anls", format="messages")
    question = ask(tmp_path, task, CONVERSATION)[0]
    assert written(question, tokenizer) == (
        in_chat(
            "Picture 1:[image]\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA form.<|im_end|>\n"
            "<|im_start|>user\nAnd the total?"
        ),
        ["a.png"],
    )
    with pytest.raises(DataError, match="has several turns, and a base model takes a single question"):
        ask(tmp_path, task, CONVERSATION, style="base")
    single = {"messages": CONVERSATION["messages"][:2], "images": ["b.png"]}
    base = ask(tmp_path, task, single, style="base")[0]
    assert written(base, tokenizer) == ("[image]What is it? Answer:", ["b.png"])


def test_the_published_format_has_its_own_picture_numbers(tmp_path, tokenizer):
    value = "Picture 1: <img>a.png</img>\nPicture 2: <img>b.png</img>\nWhat?"
    said = [{"from": "user", "value": value}, {"from": "assistant", "value": "4"}]
    question = ask(tmp_path, custom_task("exact_match", format="qwen_json"), {"conversations": said})[0]
    chat = in_chat("Picture 1: [image]\nPicture 2: [image]\nWhat?")
    assert written(question, tokenizer) == (chat, ["a.png", "b.png"])


# ---- solved examples


def numbered(count, name="Q"):
    images = ["a.png", "b.png", "c.png"]
    return [
        {"questionId": f"{name}{n}", "question": f"{name}{n}", "answers": [f"A{n}"], "image": images[n % 3]}
        for n in range(count)
    ]


def test_solved_examples_stand_before_the_question_in_its_own_form(tmp_path, tokenizer):
    questions = ask(tmp_path, "docvqa", *numbered(3), style="base", shots=2)
    text, images = written(questions[0], tokenizer)
    assert text in (
        "[image]Q1 Answer: A1[image]Q2 Answer: A2[image]Q0 Answer:",
        "[image]Q2 Answer: A2[image]Q1 Answer: A1[image]Q0 Answer:",
    )
    assert images == [["a.png", "b.png", "c.png"][int(part[1])] for part in text.split("[image]")[1:]]
    assert [shot.id for shot in questions[0].shots] == [part[:2] for part in text.split("[image]")[1:-1]]


SOLVED = {
    "textvqa": "[image]What? Answer: 4",  # what most people said
    "vqav2": "[image]What? Answer: 4",
    "refcoco": "[image]<ref>dog</ref><box>(100,100),(300,405)</box>",
    "screenspot": "[image]<ref>close</ref><box>(100,200),(500,500)</box>",
    "nocaps": "[image]Describe the image in English: A dog.",
    "multiple_choice": "[image]Question: What?\nOptions: A. dog\nB. 4\nAnswer: B",
}


@pytest.mark.parametrize("name", SOLVED)
def test_the_solved_form_of_each_kind_of_task(tmp_path, tokenizer, name):
    first = {**ROWS[name], "answer": ["dog"]} if name == "refcoco" else ROWS[name]
    second = ROWS[name] | {"image": "b.png", "image_id": 9}
    questions = ask(tmp_path, name, first, second, style="base", shots=1)
    text, _ = written(questions[1], tokenizer)
    own, _ = written(ask(tmp_path, name, first, second, style="base")[1], tokenizer)
    assert text == SOLVED[name] + own
    if name == "refcoco":  # tags of the example are tokens
        ids = questions[1].render(tokenizer, N_QUERIES).ids
        assert ids.count(tokenizer.control_tokens["<box>"]) == 2
        assert ids.count(tokenizer.control_tokens["</box>"]) == 1


def test_examples_are_drawn_by_the_questions_id(tmp_path):
    def drawn(rows):
        examples = source(write(tmp_path / "train", numbered(50, "T")))
        given = {"style": "base", "shots": 3, "shot_source": examples}
        questions = ask(tmp_path, "docvqa", *rows, **given)
        return {question.id: [shot.id for shot in question.shots] for question in questions}

    once = drawn(numbered(20))
    assert drawn(numbered(20)[::-1]) == once  # whatever the order of the questions
    assert len({tuple(ids) for ids in once.values()}) > 15
    assert all(name.startswith("T") for ids in once.values() for name in ids)


def test_examples_from_another_folder_are_read_by_its_own_rules(tmp_path, tokenizer):
    train = write(tmp_path / "train", numbered(4, "T"))
    path = write(tmp_path / "test", numbered(1))
    task = find_task("docvqa")
    question = Questions(source(path), task, style="base", shots=1, shot_source=source(train))[0]
    rendered = question.render(tokenizer, N_QUERIES)
    example = question.shots[0].images[0]
    assert rendered.images[0] == Path(example).read_bytes()
    assert rendered.images[1] == str(tmp_path / "test" / "a.png")
    # With one root for both, both are named and opened later.
    given = {"style": "base", "shots": 1, "shot_source": source(train), "images_root": tmp_path / "train"}
    question = Questions(source(path), task, **given)[0]
    assert all(isinstance(image, str) for image in question.render(tokenizer, N_QUERIES).images)


def test_examples_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="solved examples are for base models"):
        ask(tmp_path, "docvqa", *numbered(3), shots=1)
    hidden = [row | {"answers": None} for row in numbered(3)]
    with pytest.raises(DataError, match="its answers are hidden; name a source that has some with --shots-from"):
        ask(tmp_path, "docvqa", *hidden, style="base", shots=1)
    train = source(write(tmp_path / "train", numbered(3, "T")))
    asked = ask(tmp_path, "docvqa", *hidden, style="base", shots=1, shot_source=train)
    assert not asked.answered and len(asked[0].shots) == 1


def test_every_task_renders_with_examples(tmp_path, tokenizer):
    for name in TASKS:
        images = ("a.png", "b.png", "c.png")
        rows = [ROWS[name] | {"image": image, "docId": image, "image_id": image} for image in images]
        rows = [{**row, "question_id": n} if "question_id" in row else row for n, row in enumerate(rows)]
        columns = {"columns": {"id": "image"}} if name == "nocaps" else {}
        for question in ask(tmp_path, name, *rows, style="base", shots=2, source_with=columns):
            assert len(question.render(tokenizer, N_QUERIES).images) == 3
