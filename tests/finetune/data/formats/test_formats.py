"""Each format's rows as exact messages, and what each of them refuses."""

import pytest
from formats_for_tests import ASSISTANT, USER, asked, conversations, one

from finetune.data.formats.row_format import COLUMNS, PLACEHOLDERS, PROMPTS, RowFormat
from finetune.data.sample import BadField, DataError
from finetune.recipe.sources import PLACEHOLDERS as RECIPE_PLACEHOLDERS
from finetune.recipe.sources import ROLES
from qwenvl.text.chat import render_chat

# --- messages --------------------------------------------------------------------------------------------------------


def test_messages_fill_their_places_in_order():
    first = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image", "image": "own.png"}]
    second = [{"type": "text", "text": "now"}, {"type": "image"}]
    row = {
        "messages": [{"role": "user", "content": first}, ASSISTANT, {"role": "user", "content": second}, ASSISTANT],
        "images": ["a.png", {"bytes": b"b", "path": "b.png"}],
    }
    assert one("messages", row) == [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.png"},
                {"type": "text", "text": "and"},
                {"type": "image", "image": "own.png"},
            ],
        },
        ASSISTANT,
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "now"},
                {"type": "image", "image": {"bytes": b"b", "path": "b.png"}},
            ],
        },
        ASSISTANT,
    ]
    assert first[0] == {"type": "image"}, "the row itself is not changed"


@pytest.mark.parametrize("images", ["a.png", ["a.png"], ("a.png",), {"bytes": None, "path": "a.png"}])
def test_messages_of_plain_text_have_their_images_first(images):
    row = {"messages": [{"role": "system", "content": "Be short."}, USER, ASSISTANT], "images": images}
    assert one("messages", row) == [{"role": "system", "content": "Be short."}, *asked("a.png", "Hi", "Hello")]


def test_messages_agree_with_trl():
    from trl.data_utils import prepare_multimodal_messages

    rows = [
        {"messages": [USER, ASSISTANT, USER, ASSISTANT], "images": ["a", "b"]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}, {"type": "image"}]},
                ASSISTANT,
            ],
            "images": ["a", "b"],
        },
    ]

    def parts(message):
        content = message["content"]
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    for row in rows:
        theirs = prepare_multimodal_messages(row["messages"], row["images"])
        assert [parts(message) for message in one("messages", row)] == [parts(message) for message in theirs]


def test_messages_of_an_unified_dataset_lose_their_none_keys():
    """A dataset fills the keys that other rows have with None."""
    row = {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "text": None, "image": None, "index": 0, "image_url": None},
                    {"type": "text", "text": "Hi", "image": None, "index": None, "image_url": None},
                ],
                "tool_calls": None,
                "weight": None,
                "grounding": None,
            },
            {"role": "assistant", "content": "Hello", "tool_calls": [], "weight": 1, "grounding": None},
        ],
        "images": ["a.png"],
        "prompt": None,
        "completion": None,
    }
    assert one("messages", row) == asked("a.png", "Hi", "Hello")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "image": {"bytes": None, "path": "a.png"}},
    ],
)
def test_messages_name_images_in_many_ways(part):
    row = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "Hi"}]}, ASSISTANT]}
    assert one("messages", row) == asked("a.png", "Hi", "Hello")


def test_messages_keep_what_rendering_reads():
    content = [{"type": "image", "image": "a", "numbered": False}, {"type": "text", "text": "Hi", "grounding": True}]
    row = {
        "messages": [{"role": "user", "content": content}, {**ASSISTANT, "grounding": True}],
        "id": 7,
    }
    assert one("messages", row) == row["messages"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "Hello", "images": ["a.png"]},
        {"prompt": [USER], "completion": [ASSISTANT], "images": ["a.png"]},
        {"messages": None, "prompt": [USER], "completion": "Hello", "images": ["a.png"]},
    ],
)
def test_prompt_and_completion(row):
    assert one("messages", row) == asked("a.png", "Hi", "Hello")


def place(*parts):
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({}, "messages", "is missing; the row has nothing"),
        ({"text": "x", "id": None}, "messages", "the row has text. Name the column"),
        ({"messages": "Hi"}, "messages", "must be a list, not str"),
        ({"messages": []}, "messages", "is empty"),
        ({"messages": [USER, "Hi"]}, "messages[1]", "must be a mapping, not str"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "not 'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "must be one of"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, "messages[1].role", "only be the first"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "must be a list, not int"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "messages[1].content", "is blank"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": ""}]}]},
            "messages[1].content",
            "is blank",
        ),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "messages[1].weight", "must be 0 or 1"),
        ({"messages": [{**USER, "grounding": "yes"}]}, "messages[0].grounding", "true or false"),
        ({"messages": [place({"type": "text", "text": 3})]}, "messages[0].content[0].text", "must be text, not int"),
        ({"messages": [place({"type": "video"})]}, "messages[0].content[0].type", "not 'video'"),
        ({"messages": [place({"text": "Hi"})]}, "messages[0].content[0].type", "not None"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
            "messages[0].content[0]",
            "only a user's",
        ),
        (
            {"messages": [place({"type": "image", "image": "a", "url": "b"})]},
            "messages[0].content[0]",
            "names more than one image",
        ),
        ({"messages": [place({"type": "image", "image": 7})]}, "messages[0].content[0].image", "not int"),
        ({"messages": [place({"type": "image", "image": "  "})]}, "messages[0].content[0].image", "path is empty"),
        (
            {"messages": [place({"type": "image_url", "image_url": {}})]},
            "messages[0].content[0].image_url",
            "not NoneType",
        ),
        ({"messages": [place({"type": "image"}), ASSISTANT]}, "images", "has 0 image(s) for 1 place(s)"),
        ({"messages": [place({"type": "image"})], "images": ["a", "b"]}, "images", "has 2 image(s) for 1 place(s)"),
        (
            {"messages": [place({"type": "text", "text": "Hi"})], "images": ["a"]},
            "images",
            "has 1 image(s) for 0 place(s)",
        ),
        ({"messages": [ASSISTANT], "images": ["a"]}, "images", "has 1 image(s) for 0 place(s)"),
        (
            {"messages": [place({"type": "image", "index": 1}, {"type": "image", "index": 0})], "images": ["a", "b"]},
            "images",
            "another order",
        ),
        ({"messages": [USER, ASSISTANT], "images": ["a", None]}, "images[1]", "not NoneType"),
        ({"messages": [USER, ASSISTANT], "images": [{"bytes": "b", "path": None}]}, "images[0]", "must hold `bytes`"),
        ({"messages": [USER, ASSISTANT], "images": [{"height": 3}]}, "images[0]", "it has keys ['height']"),
        ({"prompt": "Hi"}, "completion", "is missing"),
        ({"prompt": " ", "completion": "Hello"}, "prompt", "is blank"),
        ({"prompt": "Hi", "completion": [USER]}, "completion", "begin with the assistant"),
    ],
)
def test_messages_refuse(row, field, reason):
    with pytest.raises(BadField) as caught:
        conversations("messages", row)
    assert caught.value.field == field
    assert reason in caught.value.reason


def test_the_columns_of_messages_can_be_named():
    row = {"chat": [USER, ASSISTANT], "picture": "a.png"}
    columns = {"messages": "chat", "images": "picture"}
    assert one("messages", row, columns=columns) == asked("a.png", "Hi", "Hello")


# --- qwen_json -------------------------------------------------------------------------------------------------------


def test_qwen_json_keeps_the_text_around_its_images():
    value = "Picture 1: <img>a b.png</img>\nPicture 2: <img> c.png </img>\nCompare."
    box = "<ref>box</ref><box>(250,250),(500,500)</box>"
    row = {
        "id": "1",
        "conversations": [{"from": "user", "value": value}, {"from": "assistant", "value": box}],
    }
    assert one("qwen_json", row) == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Picture 1: "},
                {"type": "image", "image": "a b.png", "numbered": False},
                {"type": "text", "text": "\nPicture 2: "},
                {"type": "image", "image": "c.png", "numbered": False},
                {"type": "text", "text": "\nCompare."},
            ],
            "grounding": True,
        },
        {"role": "assistant", "content": box, "grounding": True},
    ]


@pytest.mark.parametrize("rule", ["structure", "assistant"])
def test_qwen_json_gives_the_published_ids_and_labels(tiny_processor, expected, expected_json, rule):
    for number, conversation in enumerate(expected_json["sft"]["conversations"]):
        messages = one("qwen_json", {"conversations": conversation})
        rendered = render_chat(messages, tiny_processor.tokenizer, labels=rule)
        real = expected["sft.attention_mask"][number].bool()
        assert rendered.ids == expected["sft.input_ids"][number][real].tolist()
        assert rendered.labels == expected[f"sft.labels_{rule}"][number][real].tolist()


def turns(*values):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in values]}


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({}, "conversations", "is missing"),
        (turns(("human", "Hi")), "conversations[0].from", "must be one of user, assistant, system, not 'human'"),
        (turns(("user", "Hi"), ("system", "x")), "conversations[1].from", "only be the first"),
        (turns((["user"], "Hi")), "conversations[0].from", "not ['user']"),
        (turns(("user", None)), "conversations[0].value", "not NoneType"),
        (turns(("user", "Hi"), ("assistant", "")), "conversations[1].value", "is blank"),
        (turns(("user", "<img>a.png")), "conversations[0].value", "are not paired"),
        (turns(("user", "</img>a.png<img>")), "conversations[0].value", "are not paired"),
        (turns(("user", "<img><img>a</img></img>")), "conversations[0].value", "are not paired"),
        (turns(("user", "<img> </img>")), "conversations[0].value", "path is empty"),
        (turns(("user", "Hi"), ("assistant", "<img>a</img>")), "conversations[1].value", "only a user's turn"),
    ],
)
def test_qwen_json_refuses(row, field, reason):
    with pytest.raises(BadField) as caught:
        conversations("qwen_json", row)
    assert caught.value.field == field
    assert reason in caught.value.reason


# --- llava -----------------------------------------------------------------------------------------------------------


def test_llava():
    row = {"image": "a.png"} | turns(("human", "<image>\nWhat is it?"), ("gpt", "A cat."), ("human", "Sure?"))
    assert one("llava", row) == [*asked("a.png", "What is it?", "A cat."), {"role": "user", "content": "Sure?"}]


def test_llava_with_several_images_and_a_system_turn():
    row = {"image": ["a.png", "b.png"]} | turns(
        ("system", "Be short."), ("human", "First <image> then\n<image>"), ("gpt", "Yes."), ("human", "Why?")
    )
    assert one("llava", row) == [
        {"role": "system", "content": "Be short."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "First "},
                {"type": "image", "image": "a.png"},
                {"type": "text", "text": " then\n"},
                {"type": "image", "image": "b.png"},
            ],
        },
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]


def test_llava_of_text_alone():
    assert one("llava", {"image": None} | turns(("human", "Hi"), ("gpt", "Hello"))) == [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"image": "a"} | turns(("human", "Hi"), ("gpt", "Hello")), "image", "has 1 image(s) for 0 <image>"),
        (turns(("human", "<image>"), ("gpt", "Hello")), "image", "has 0 image(s) for 1 <image>"),
        ({"image": ["a", 3]} | turns(("human", "<image>")), "image[1]", "not int"),
        ({"image": "a"} | turns(("bing", "<image>")), "conversations[0].from", "not 'bing'"),
        ({"image": "a"} | turns(("human", "<image>"), ("gpt", " ")), "conversations[1].value", "is blank"),
    ],
)
def test_llava_refuses(row, field, reason):
    with pytest.raises(BadField) as caught:
        conversations("llava", row)
    assert caught.value.field == field
    assert reason in caught.value.reason


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"name": "csv"},
            "must be one of messages, qwen_json, llava, swift, texts, vqa, grounding, caption, fields, not 'csv'",
        ),
        ({"name": "vqa", "columns": {"query": "question"}}, "columns of format vqa are image, question, answers, not"),
        ({"name": "messages", "prompt": "Hi"}, "format messages has no prompt"),
        ({"name": "vqa", "prompt": "Answer:"}, "must hold {question}"),
        ({"name": "grounding", "prompt": " "}, "must hold text"),
        ({"name": "caption", "prompt": " "}, "must hold text"),
        ({"name": "grounding", "box_form": "cxcywh"}, "must be xyxy or xywh"),
    ],
)
def test_wrong_settings_are_refused(settings, reason):
    with pytest.raises(DataError) as caught:
        RowFormat(**settings)
    assert reason in str(caught.value)


def test_recipes_know_the_same_formats_columns_and_prompts():
    """The recipe's schema has them once more, as it must not import what reads data."""
    assert ROLES == COLUMNS
    assert {name: PLACEHOLDERS.get(name, "") for name in PROMPTS} == RECIPE_PLACEHOLDERS


@pytest.mark.parametrize("name", sorted(COLUMNS.keys() - {"fields"}))
def test_an_empty_row_is_refused_by_every_format(name):
    with pytest.raises(BadField):
        conversations(name, {})


@pytest.mark.parametrize("written", ["['A', 'B']", '["A"]', "['A' 'B']", "[]", '[ "A",\n "B" ] '])
@pytest.mark.parametrize(
    ("name", "field"), [("vqa", "question"), ("vqa", "answers"), ("caption", "caption")], ids=lambda value: value
)
def test_a_list_that_a_table_has_as_text_is_no_answer(name, field, written):
    row = {"image": "a.png", "question": "Which?", "answers": "x"} if name == "vqa" else {"image": "a.png"}
    with pytest.raises(BadField, match="is a list written as text") as caught:
        conversations(name, row | {field: written})
    assert caught.value.field == field


@pytest.mark.parametrize("answer", ["[1, 2]", "['A', 'B'] are two", '"A"', "[A]"])
def test_brackets_may_be_an_answer(answer):
    row = {"image": "a.png", "question": "Which?", "answers": answer}
    assert one("vqa", row)[1]["content"] == answer
