"""Image parts as several pictures: their numbers, those that a text writes itself, and the ids of a conversation."""

import pytest

from qwenvl import InputError
from qwenvl.text.chat import IGNORED, render_chat, render_prompt
from qwenvl.text.chat_string import read_string, write_chat
from qwenvl.text.image_parts import put_pictures
from qwenvl.views import Views

PAIR = Views(page=True, grid=(1, 2), overlap=0.0)
PARTS_ALONE = Views(page=False, grid=(1, 2), overlap=0.0)


@pytest.fixture
def tiny_tokenizer(tiny_processor):
    return tiny_processor.tokenizer


def image(source, **flags):
    return {"type": "image", "image": source, **flags}


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def test_the_ids_are_those_of_a_conversation_with_so_many_images(tiny_tokenizer):
    reply = {"role": "assistant", "content": "Two."}
    asked = [user(image("a"), text("How many?")), reply, user(text("And here? "), image("b")), reply]
    shown = [
        user(*map(image, PAIR.pictures("a")), text("How many?")),
        reply,
        user(text("And here? "), *map(image, PAIR.pictures("b"))),
        reply,
    ]
    one, other = (
        render_chat(messages, tiny_tokenizer, n_queries=4, views=views)
        for messages, views in ((asked, PAIR), (shown, None))
    )
    assert one == other and one.images == [*PAIR.pictures("a"), *PAIR.pictures("b")]
    assert "Picture 6:" in tiny_tokenizer.decode(one.ids) and "Picture 7:" not in tiny_tokenizer.decode(one.ids)
    assert [label for label in one.labels if label != IGNORED] == 2 * [
        *tiny_tokenizer.encode_text("Two."),
        tiny_tokenizer.im_end_id,
    ]
    string = write_chat(asked, views=PAIR)
    assert string == write_chat(shown) and read_string(string, tiny_tokenizer, n_queries=4).ids == one.ids


def test_raw_prompts_have_pictures_without_numbers(tiny_tokenizer):
    content = [image("a"), text("How many? Answer:")]
    one = render_prompt(content, tiny_tokenizer, n_queries=4, views=PARTS_ALONE)
    assert one == render_prompt(
        [*map(image, PARTS_ALONE.pictures("a")), text("How many? Answer:")], tiny_tokenizer, n_queries=4
    )
    assert len(one.images) == 2 and "Picture" not in tiny_tokenizer.decode(one.ids)


def test_images_that_are_given_later_keep_their_places(tiny_tokenizer):
    rendered = render_chat(
        [user({"type": "image"}, text("Q"))], tiny_tokenizer, views=PAIR, add_generation_prompt=True
    )
    assert rendered.images == PAIR.pictures(None)


@pytest.mark.parametrize("space", ["", " "])
def test_numbers_that_a_text_writes_are_written_anew(tiny_tokenizer, space):
    own = [
        user(
            text(f"Picture 1:{space}"),
            image("a", numbered=False),
            text(f"\nPicture 2:{space}"),
            image("b", numbered=False),
            text("\nCompare."),
        )
    ]
    if not space:  # the numbers of the row are those that rendering writes
        rendered = render_chat([user(image("a"), image("b"), text("Compare."))], tiny_tokenizer, views=PAIR)
        assert rendered == render_chat(own, tiny_tokenizer, views=PAIR)
    written = write_chat(own, views=PAIR)
    assert "".join(f"Picture {number}:{space}<img></img>\n" for number in range(1, 7)) + "Compare." in written


def test_pictures_without_numbers_follow_one_another():
    assert "user\n<img></img><img></img><img></img>\nQ" in write_chat(
        [user(image("a", numbered=False), text("\nQ"))], views=PAIR
    )


def test_a_number_that_is_not_the_images_own_is_refused():
    with pytest.raises(InputError, match=r"message 0, part 1: the text before it says Picture 3, and it is image 1"):
        put_pictures([[text("Picture 3: "), image("a", numbered=False)]], PAIR.pictures)


@pytest.mark.parametrize("content", [None, 3, [3], [{"type": "image", "image": "a", "url": "b"}], [{"type": "x"}]])
def test_malformed_messages_are_refused_as_without_views(content):
    said = []
    for views in (None, PAIR):
        with pytest.raises(InputError) as error:
            write_chat([{"role": "user", "content": content}], views=views)
        said.append(str(error.value).replace(" (user)", ""))
    assert said[0] == said[1]
