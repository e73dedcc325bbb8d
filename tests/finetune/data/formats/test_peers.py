"""Layouts that other tools train from: places of images over all turns, ms-swift's objects, marked turns, systems."""

import json

import pytest
from formats_for_tests import ASSISTANT, USER, conversations, one

from finetune.data.sample import BadField

IMAGE_A, IMAGE_B = {"type": "image", "image": "a.png"}, {"type": "image", "image": "b.png"}


def text(value, **flags):
    return {"type": "text", "text": value, **flags}


def said(role, content, **flags):
    return {"role": role, "content": content, **flags}


# --- places of images ------------------------------------------------------------------------------------------------

PLACED = [
    said("user", [IMAGE_A, text("What is red?")]),
    said("assistant", "A square."),
    said("user", [text("And here?"), IMAGE_B]),
    said("assistant", "The same."),
]
IN_TEXT = [
    said("user", "<image>\nWhat is red?"),
    said("assistant", "A square."),
    said("user", "And here?<image>"),
    said("assistant", "The same."),
]


@pytest.mark.parametrize("name", ["messages", "swift"])
def test_places_in_the_texts_of_all_turns(name):
    assert one(name, {"messages": IN_TEXT, "images": ["a.png", "b.png"]}) == PLACED


def test_places_in_text_parts_keep_their_flags():
    content = [text("See <image> there", grounding=True)]
    row = {"messages": [said("user", content), ASSISTANT], "images": "a.png"}
    parts = [text("See ", grounding=True), IMAGE_A, text(" there", grounding=True)]
    assert one("messages", row) == [said("user", parts), ASSISTANT]


@pytest.mark.parametrize("images", [["a.png"], ["a.png"] * 3])
@pytest.mark.parametrize("name", ["messages", "swift"])
def test_other_numbers_of_images_are_refused(name, images):
    with pytest.raises(BadField, match=rf"images: has {len(images)} image\(s\) for 2 place\(s\)"):
        one(name, {"messages": IN_TEXT, "images": images})


def test_a_place_that_the_recipe_calls_text_is_text():
    row = {"messages": [said("user", "Say <image>."), ASSISTANT], "images": ["a.png"]}
    assert one("messages", row, text_places=False) == [said("user", [IMAGE_A, text("Say <image>.")]), ASSISTANT]


def test_llava_reads_images_where_there_is_no_image():
    turns = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Hello"}]
    wanted = [said("user", [IMAGE_A, text("Hi")]), ASSISTANT]
    assert one("llava", {"images": ["a.png"], "conversations": turns}) == wanted
    assert one("llava", {"image": "a.png", "images": None, "conversations": turns}) == wanted


# --- system ----------------------------------------------------------------------------------------------------------

SYSTEM = said("system", "Be short.")
SPOKEN = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]
WITH_SYSTEM = {
    "messages": {"messages": [USER, ASSISTANT]},
    "llava": {"conversations": SPOKEN},
    "swift": {"query": "Hi", "response": "Hello"},
    "texts": {"texts": [{"user": "Hi", "assistant": "Hello"}]},
}


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_a_system_column_is_the_first_message(name):
    assert one(name, {**WITH_SYSTEM[name], "system": "Be short."}) == [SYSTEM, USER, ASSISTANT]
    assert one(name, {**WITH_SYSTEM[name], "system": ""}) == [USER, ASSISTANT]
    assert one(name, {**WITH_SYSTEM[name], "sys": "Be short."}, columns={"system": "sys"})[0] == SYSTEM


def test_the_published_format_has_it_as_grounding_text_like_all_its_turns():
    conversation = one("qwen_json", {"conversations": SPOKEN, "system": "Be short."})
    assert conversation[0] == said("system", "Be short.", grounding=True)


def test_two_systems():
    row = {"messages": [SYSTEM, USER, ASSISTANT], "system": "Be short."}
    assert one("messages", row) == [SYSTEM, USER, ASSISTANT]
    with pytest.raises(BadField, match="system: differs from the system message"):
        one("messages", {**row, "system": "Be long."})


# --- marked turns ----------------------------------------------------------------------------------------------------

CHATS = {
    "messages": lambda user, reply: {"messages": [{**USER, **user}, {**ASSISTANT, **reply}, USER, ASSISTANT]},
    "swift": lambda user, reply: {"messages": [{**USER, **user}, {**ASSISTANT, **reply}, USER, ASSISTANT]},
    "qwen_json": lambda user, reply: {"conversations": [{**SPOKEN[0], **user}, {**SPOKEN[1], **reply}, *SPOKEN]},
    "llava": lambda user, reply: {"conversations": [{**SPOKEN[0], **user}, {**SPOKEN[1], **reply}, *SPOKEN]},
}
FALSE = [(key, value) for key in ("loss", "train", "training", "trainable") for value in (False, 0)]
ZERO = [(key, value) for key in ("loss_scale", "weight") for value in (0, 0.0, False)]


@pytest.mark.parametrize(("key", "value"), FALSE + ZERO)
@pytest.mark.parametrize("name", CHATS)
def test_a_marked_reply_is_context(name, key, value):
    marked = one(name, CHATS[name]({key: value}, {key: value}))
    assert [message.get("train") for message in marked] == [None, False, None, None]
    plain = one(name, CHATS[name]({key: None}, {key: 1}))
    assert [message.get("train") for message in plain] == [None] * 4
    assert [message["content"] for message in marked] == [message["content"] for message in plain]


def test_a_marked_pair_is_context():
    row = {"texts": [{"user": "Hi", "assistant": "No", "loss": False}, {"user": "Hi", "assistant": "Hello"}]}
    assert [message.get("train") for message in one("texts", row)] == [None, False, None, None]


@pytest.mark.parametrize(
    ("user", "reply", "field", "reason"),
    [
        ({}, {"weight": 0.5}, "[1].weight", "must be 0 or 1"),
        ({}, {"loss_scale": 2}, "[1].loss_scale", "must be 0 or 1"),
        ({}, {"train": "no"}, "[1].train", "must be 0 or 1"),
        ({}, {"loss": float("nan")}, "[1].loss", "must be 0 or 1"),
        ({}, {"loss": False, "weight": 1}, "[1]", "to be trained and not to be"),
        ({"train": True}, {}, "[0].train", "only the assistant's turns"),
    ],
)
@pytest.mark.parametrize("name", CHATS)
def test_other_marks_are_refused(name, user, reply, field, reason):
    with pytest.raises(BadField) as caught:
        one(name, CHATS[name](user, reply))
    assert caught.value.field.endswith(field) and reason in caught.value.reason


def test_replies_in_a_prompt_are_context():
    row = {"prompt": [USER, ASSISTANT, USER], "completion": "Hello"}
    assert one("messages", row) == [USER, {**ASSISTANT, "train": False}, USER, ASSISTANT]


# --- swift -----------------------------------------------------------------------------------------------------------


def test_history_comes_first_and_has_places_too():
    row = {
        "query": "And <image>?",
        "response": "Hello",
        "history": [["<image>Hi", "First"]],
        "images": ["a.png", "b.png"],
    }
    assert one("swift", row) == [
        said("user", [IMAGE_A, text("Hi")]),
        said("assistant", "First"),
        said("user", [text("And "), IMAGE_B, text("?")]),
        ASSISTANT,
    ]


def test_images_named_in_the_text_are_read_as_the_published_format_reads_them():
    row = {"query": "Picture 1:<img>a.png</img>\nHi", "response": "Hello", "history": []}
    parts = [text("Picture 1:"), {**IMAGE_A, "numbered": False}, text("\nHi")]
    assert one("swift", row) == [said("user", parts), ASSISTANT]


OBJECTS = {"ref": ["the car"], "bbox": [[64, 48, 320, 240]]}
FILLED = [
    said("user", [IMAGE_A, text("Where is <ref>the car</ref>?")], grounding=True),
    said("assistant", "<box>(100,100),(500,500)</box>", grounding=True),
]


@pytest.mark.parametrize(
    "objects",
    [
        OBJECTS,
        {**OBJECTS, "bbox_type": "real", "image_id": [0], "width": [640], "height": [480]},
        json.dumps(OBJECTS),
        {**OBJECTS, "bbox": [[100, 100, 500, 500]], "bbox_type": "norm1000"},
        {**OBJECTS, "bbox": [[0.1, 0.1, 0.5, 0.5]], "bbox_type": "norm1"},
        [{"caption": "the car", "bbox": [64, 48, 320, 240], "bbox_type": "real", "image": 0}],
        json.dumps([{"caption": "the car"}, {"bbox": [[64, 48, 320, 240]]}]),
    ],
)
def test_objects_fill_their_places(objects):
    row = {"query": "<image>Where is <ref-object>?", "response": "<bbox>", "images": ["a.png"], "objects": objects}
    assert one("swift", row) == FILLED


def test_several_boxes_and_images():
    objects = {"bbox": [[0, 0, 64, 48], [[64, 48, 320, 240], [0, 0, 639, 479]]], "image_id": [1, 0]}
    row = {"query": "<image><image>Where?", "response": "<bbox>, <bbox>", "images": ["a.png", "b.png"]}
    answer = "<box>(0,0),(100,100)</box>, <box>(100,100),(500,500)</box><box>(0,0),(998,997)</box>"
    assert one("swift", {**row, "objects": objects})[1]["content"] == answer


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"objects": {"ref": ["x", "y"], "bbox": [[1, 2, 3, 4]]}}, "objects", "has 2 for 1 <ref-object>"),
        ({"objects": {"ref": ["x"], "bbox": []}}, "objects", "has 0 for 1 <bbox>"),
        ({"objects": {**OBJECTS, "bbox_type": "xywh"}}, "objects.bbox_type", "must be real, norm1000 or norm1"),
        ({"objects": {**OBJECTS, "bbox_type": "norm1"}}, "objects", "is not in 0..1"),
        ({"objects": {**OBJECTS, "bbox": [[320, 240, 64, 48]]}}, "objects.bbox", "wrong way round"),
        ({"objects": {**OBJECTS, "bbox": [[1, 2, 3]]}}, "objects.bbox[0]", "4 numbers, not 3"),
        ({"objects": {**OBJECTS, "bbox": [[1, 2, 9, 2, 9, 8, 1, 8]]}}, "objects.bbox[0]", "has four points"),
        ({"objects": {**OBJECTS, "bbox": [[100, 100, 900, 470]]}}, "objects.bbox", "260 pixels beyond the image"),
        ({"objects": {**OBJECTS, "bbox": [[0.1, 0.1, 0.5, 0.5]]}}, "objects.bbox", "within the first pixel"),
        ({"objects": {**OBJECTS, "image_id": [4]}}, "objects", "image 4, counted from 0, and there are 1"),
        ({"objects": {**OBJECTS, "width": [1280], "height": [960]}}, "objects", "was 1280 x 960 pixels and is 640 x"),
        ({"objects": {**OBJECTS, "width": [640]}}, "objects.width", "a size for each image"),
        ({"objects": {**OBJECTS, "mask": [1]}}, "objects.mask", "is not read"),
        ({"objects": "{"}, "objects", "is text, and not JSON"),
        ({"query": "<image><image>Where is <ref-object>?", "images": ["a", "b"]}, "objects", "nothing says of which"),
        ({"query": "<img>a.png</img><ref-object>"}, "images", "<img> in the text names others"),
        ({"history": [["Hi"]]}, "history[0]", "a question and its answer"),
        ({"history": "Hi"}, "history", "must be a list"),
        ({"response": ""}, "response", "is blank"),
        ({"query": 3}, "query", "must be text"),
        ({"messages": [USER, ASSISTANT]}, "query", "in one of the two ways"),
    ],
)
def test_swift_refuses(changes, field, reason):
    row = {"query": "<image>Where is <ref-object>?", "response": "<bbox>", "images": ["a.png"], "objects": OBJECTS}
    with pytest.raises(BadField) as caught:
        conversations("swift", row | changes)
    assert caught.value.field == field and reason in caught.value.reason


# --- texts -----------------------------------------------------------------------------------------------------------


def test_pairs_are_one_conversation_after_the_images():
    pairs = [{"user": "Hi", "assistant": "Hello", "source": "x"}, {"user": "More?", "assistant": "No."}]
    assert one("texts", {"images": ["a.png", "b.png"], "texts": pairs}) == [
        said("user", [IMAGE_A, IMAGE_B, text("Hi")]),
        ASSISTANT,
        said("user", "More?"),
        said("assistant", "No."),
    ]


@pytest.mark.parametrize(
    ("pair", "field"),
    [
        ({"assistant": "x"}, "texts[0].user"),
        ({"user": "x"}, "texts[0].assistant"),
        ({"user": "x", "assistant": " "},) * 2,
    ],
)
def test_texts_refuse(pair, field):
    with pytest.raises(BadField) as caught:
        one("texts", {"texts": [pair]})
    assert caught.value.field == field if isinstance(field, str) else caught.value.reason == "is blank"
