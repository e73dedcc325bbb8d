"""Every column and key is read, is harmless, is named, or is refused with the way out."""

import pytest
from formats_for_tests import ASSISTANT, USER, one

from finetune.data.formats.document_fields import WantedFields
from finetune.data.formats.row_format import COLUMNS, RowFormat
from finetune.data.sample import BadField

SPOKEN = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]
ROWS = {
    "messages": {"messages": [USER, ASSISTANT], "images": []},
    "qwen_json": {"conversations": SPOKEN},
    "llava": {"conversations": SPOKEN},
    "swift": {"query": "Hi", "response": "Hello"},
    "texts": {"texts": [{"user": "Hi", "assistant": "Hello"}], "images": []},
    "vqa": {"image": "a.png", "question": "Q", "answer": "A"},
    "grounding": {"image": "a.png", "phrase": "x", "box": [0, 0, 1, 1]},
    "caption": {"image": "a.png", "caption": "x"},
    "fields": {"image": "a.png", "total": "x"},
}


def unread(name, row, **settings):
    if name == "fields":
        settings["wanted"] = WantedFields(("total",))
    return RowFormat(name, **settings).unread(row)


@pytest.mark.parametrize("name", COLUMNS)
def test_what_is_read_or_harmless_is_not_named(name):
    more = {"id": 7, "questionId": 3, "sample_idx": 1, "source": "x", "metadata": {"a": 1}, "origin": {"row": 1}}
    empty = {"history": [], "tools": "[]", "system": None, "objects": {}, "videos": None, "weight": 1, "notes": ""}
    assert unread(name, {**more, **empty, **ROWS[name]}) == ()


@pytest.mark.parametrize("name", COLUMNS)
def test_other_columns_are_named(name):
    assert unread(name, {**ROWS[name], "notes": "x", "Score": 0}) == ("Score", "notes")
    assert unread(name, {**ROWS[name], "notes": "x"}, ignore=frozenset({"notes"})) == ()


def test_columns_of_documents_that_are_no_fields_are_named_whatever_they_are_called():
    row = {**ROWS["fields"], "weight": "3 kg", "history": "none", "image_list": "x", "tools": "saw"}
    assert unread("fields", row) == ("history", "image_list", "tools", "weight")
    assert unread("fields", row, ignore=frozenset({"weight", "tools"})) == ("history", "image_list")


@pytest.mark.parametrize(
    "column", ["image_list", "tools", "videos", "sys_prompt", "weight", "assistant_masks", "dialog"]
)
@pytest.mark.parametrize("name", [name for name in COLUMNS if name != "fields"])
def test_what_would_change_training_is_refused(name, column):
    row = {**ROWS[name], column: ["x"]}
    with pytest.raises(BadField, match=rf"data.ignore: \[{column}\]") as caught:
        unread(name, row)
    assert caught.value.field == column and name in caught.value.reason
    assert unread(name, row, ignore=frozenset({column})) == ()


@pytest.mark.parametrize(
    ("name", "column", "remedy"),
    [
        ("messages", "image", "columns (images: image)"),
        ("qwen_json", "image", "format llava"),
        ("vqa", "images", "columns (image: images)"),
        ("messages", "history", "format swift"),
        ("messages", "objects", "format swift"),
        ("messages", "system_prompt", "columns (system: system_prompt)"),
        ("caption", "messages", "use the format that reads it"),
        ("messages", "weight", "mark single turns"),
        ("messages", "input", "into the question"),
    ],
)
def test_the_remedy_is_named(name, column, remedy):
    with pytest.raises(BadField) as caught:
        unread(name, {**ROWS[name], column: 0.5})
    assert remedy in caught.value.reason


def test_an_ignored_column_is_as_if_it_were_not_there():
    row = {"messages": [USER, ASSISTANT], "images": ["a.png"]}
    assert one("messages", row, ignore=frozenset({"images"})) == [USER, ASSISTANT]


def test_the_images_of_the_published_format_may_also_stand_beside_it():
    turns = [{"from": "user", "value": "<img>a.png</img>Hi"}, SPOKEN[1]]
    assert unread("qwen_json", {"image": "a.png", "conversations": turns}) == ()
    with pytest.raises(BadField, match="format llava"):
        unread("qwen_json", {"image": ["a.png", "b.png"], "conversations": turns})


def test_the_path_that_an_image_had_is_named_only():
    assert unread("vqa", {**ROWS["vqa"], "image_path": "b.png"}) == ("image_path",)
    with pytest.raises(BadField, match="image: image_path"):
        unread("vqa", {"image_path": "b.png", "question": "Q", "answer": "A"})


def test_other_names_of_a_column():
    assert unread("vqa", {**ROWS["vqa"], "answers": ["B"]}) == ("answer",)
    assert unread("llava", {"conversations": SPOKEN, "images": ["a.png"]}) == ()
    with pytest.raises(BadField, match="format llava does not read it"):
        unread("llava", {"conversations": SPOKEN, "image": "b.png", "images": ["a.png"]})
    assert unread("messages", {**ROWS["messages"], "prompt": "Hi"}) == ("prompt",)


def test_keys_of_turns_and_parts():
    part = {"type": "text", "text": "Hi", "min_pixels": 3, "detail": "high", "video": None}
    turns = [{"role": "user", "content": [part], "name": "Ann", "mood": "sad"}, {**ASSISTANT, "tool_calls": []}]
    assert unread("messages", {"messages": turns}) == ("messages.mood", "messages.content.min_pixels")
    assert unread("messages", {"messages": turns}, ignore=frozenset({"messages.mood"})) == (
        "messages.content.min_pixels",
    )
    for name, row, field in (
        ("messages", {"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]}, "messages[1].tool_calls"),
        ("messages", {"messages": [{**USER, "content": [{**part, "video": "x"}]}]}, "messages[0].content[0].video"),
        ("messages", {"messages": [{**USER, "images": ["a.png"]}, ASSISTANT]}, "messages[0].images"),
        ("llava", {"conversations": [{**SPOKEN[0], "image": "a.png"}, SPOKEN[1]]}, "conversations[0].image"),
        ("texts", {"texts": [{"user": "Hi", "assistant": "x", "images": ["a.png"]}]}, "texts[0].images"),
    ):
        with pytest.raises(BadField) as caught:
            unread(name, row)
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "text", "text": "Hi", "image": "a.png"}, "an image in a part of type text"),
        ({"type": "image", "image": "a.png", "text": "Hi"}, "a text in a part of type image"),
    ],
)
def test_a_part_is_one_thing(part, reason):
    with pytest.raises(BadField, match=reason):
        one("messages", {"messages": [{"role": "user", "content": [part]}, ASSISTANT]})
