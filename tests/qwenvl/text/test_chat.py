"""Exact ids and labels of conversations, with the published vocabulary.

The expected ids in tests/data/tokenizer.json come from the published implementation.
"""

import json
from pathlib import Path

import pytest

from qwenvl.errors import InputError
from qwenvl.text.chat import DEFAULT_SYSTEM, IGNORED, render_chat, render_prompt

ORACLE = json.loads((Path(__file__).parents[2] / "data" / "tokenizer.json").read_text())


def parts_of(text: str) -> list[dict]:
    """`Picture 1:<img>a.png</img>\\n..` as parts: the oracle writes images with their paths."""
    parts = []
    for index, piece in enumerate(text.replace("</img>", "<img>").split("<img>")):
        parts.append(
            {"type": "image", "image": piece, "numbered": False} if index % 2 else {"type": "text", "text": piece}
        )
    return parts


@pytest.mark.parametrize("case", ORACLE["chat"], ids=lambda case: case["query"][:20])
def test_oracle_chats(published_tokenizer, case):
    messages = [{"role": "system", "content": case["system"]}]
    for question, answer in case["history"]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": parts_of(case["query"])})
    rendered = render_chat(messages, published_tokenizer, add_generation_prompt=True, grounding=True)
    assert rendered.ids == case["ids"]
    assert rendered.supervised == sum(
        len(published_tokenizer.encode_text(answer)) + 1 for _, answer in case["history"]
    )


@pytest.mark.parametrize("case", ORACLE["from_list_format"], ids=["one", "two"])
def test_list_format_texts(published_tokenizer, case):
    """Numbered image parts give the same ids as the published `Picture k:<img>..</img>\\n` text."""
    parts = []
    for item in case["list"]:
        if "image" in item:
            parts.append({"type": "image", "image": item["image"]})
        elif "ref" in item:
            (x1, y1, x2, y2), ref = item["box"][0], item["ref"]
            parts.append({"type": "text", "text": f"<ref>{ref}</ref><box>({x1},{y1}),({x2},{y2})</box>"})
        else:
            parts.append({"type": "text", "text": item["text"]})
    ours = render_prompt(parts, published_tokenizer, numbered=True, grounding=True)
    theirs = render_prompt(parts_of(case["text"]), published_tokenizer, grounding=True)
    assert ours == theirs
    assert len(ours.images) == case["text"].count("<img>")


def spelled(rendered, tokenizer) -> str:
    """Trained tokens as text, the others as dots."""
    runs, trained = [], []
    for token, label in zip(rendered.ids, rendered.labels, strict=True):
        if label == IGNORED:
            if trained:
                runs.append(tokenizer.decode(trained))
                trained = []
        else:
            assert label == token
            trained.append(token)
    return "|".join([*runs, tokenizer.decode(trained)] if trained else runs)


CONVERSATION = [
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A receipt."},
    {"role": "user", "content": "How much?"},
    {"role": "assistant", "content": "\n12.50"},
]


def test_assistant_labels(published_tokenizer):
    rendered = render_chat(CONVERSATION, published_tokenizer)
    assert spelled(rendered, published_tokenizer) == "A receipt.<|im_end|>|\n12.50<|im_end|>"


def test_structure_labels(published_tokenizer):
    rendered = render_chat(CONVERSATION, published_tokenizer, labels="structure")
    frame = "<|im_end|>\n<|im_start|>"
    assert spelled(rendered, published_tokenizer) == (
        f"<|im_start|>|{frame}|{frame}|A receipt.{frame}|{frame}|\n12.50<|im_end|>\n"
    )


@pytest.mark.parametrize("labels", ["assistant", "structure"])
def test_an_untrained_reply_has_the_labels_of_a_users_turn(published_tokenizer, labels):
    first = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "WRONG"}]
    later = [{"role": "user", "content": "Again"}, {"role": "assistant", "content": "RIGHT"}]
    plain = render_chat([*first, *later], published_tokenizer, labels=labels)
    marked = render_chat([first[0], {**first[1], "train": False}, *later], published_tokenizer, labels=labels)
    assert marked.ids == plain.ids
    wrong = {*published_tokenizer.encode_text("WRONG")}
    changed = [i for i, (a, b) in enumerate(zip(plain.labels, marked.labels, strict=True)) if a != b]
    end = [published_tokenizer.im_end_id] if labels == "assistant" else []
    assert [plain.labels[i] for i in changed] == [*published_tokenizer.encode_text("WRONG"), *end]
    assert not wrong & set(marked.labels)
    for given in (True, None):
        again = render_chat([first[0], {**first[1], "train": given}, *later], published_tokenizer, labels=labels)
        assert again == plain


def test_the_rules_differ_in_labels_only(published_tokenizer):
    assistant, structure = (
        render_chat(CONVERSATION, published_tokenizer, labels=rule) for rule in ("assistant", "structure")
    )
    assert assistant.ids == structure.ids and assistant.images == structure.images == ["a.png"]
    with pytest.raises(InputError, match="labels must be one of assistant, structure"):
        render_chat(CONVERSATION, published_tokenizer, labels="everything")


def test_default_and_empty_system_message(published_tokenizer):
    user = {"role": "user", "content": "Hi"}
    default = render_chat([user], published_tokenizer)
    assert default == render_chat([{"role": "system", "content": DEFAULT_SYSTEM}, user], published_tokenizer)
    empty = render_chat([{"role": "system", "content": ""}, user], published_tokenizer)
    assert published_tokenizer.decode(empty.ids).startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n")


def test_pictures_are_numbered_over_the_whole_conversation(published_tokenizer):
    image = {"type": "image", "image": "x.png"}
    messages = [
        {"role": "user", "content": [image, image, {"type": "text", "text": "Compare."}]},
        {"role": "assistant", "content": "Alike."},
        {"role": "user", "content": [{"type": "text", "text": "And "}, image]},
    ]
    text = published_tokenizer.decode(
        [token for token in render_chat(messages, published_tokenizer).ids if token < 151857]
    )
    assert "user\nPicture 1:\nPicture 2:\nCompare." in text
    assert "user\nAnd Picture 3:\n<|im_end|>" in text


def test_neighbouring_text_is_one_run(published_tokenizer):
    cut = [{"type": "text", "text": "Hel"}, {"type": "text", "text": ""}, {"type": "text", "text": "lo wor"}]
    cut.append({"type": "text", "text": "ld"})
    assert render_prompt(cut, published_tokenizer) == render_prompt("Hello world", published_tokenizer)


def test_many_parts_are_joined_at_once(published_tokenizer):
    """Not one to the other, which for a million of them would take minutes."""

    class Text(str):
        def __radd__(self, other):
            raise AssertionError("added one by one")

    parts = [{"type": "text", "text": Text(word)} for word in ("one ", "t", "wo ", "three")]
    whole = render_chat([{"role": "user", "content": "one two three"}], published_tokenizer)
    assert render_chat([{"role": "user", "content": parts}], published_tokenizer) == whole


def test_the_text_after_an_image_is_one_run_with_its_newline(published_tokenizer):
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "\nText"}]
    ids = render_prompt(parts, published_tokenizer, numbered=True).ids
    end = ids.index(published_tokenizer.image_end_id)
    assert ids[end + 1 :] == published_tokenizer.encode_text("\n\nText")


def test_content_does_not_merge_with_the_header(published_tokenizer):
    ids = render_chat([{"role": "user", "content": "\nHi"}], published_tokenizer).ids
    newline = published_tokenizer.encode_text("\n")
    assert len(newline) == 1
    header = [published_tokenizer.im_start_id, *published_tokenizer.encode_text("user"), *newline]
    start = ids.index(published_tokenizer.im_start_id, 1)
    assert ids[start : start + 5] == [*header, *newline, *published_tokenizer.encode_text("Hi")]


def test_an_open_reply_goes_on(published_tokenizer):
    messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one, two"}]
    closed = render_chat(messages, published_tokenizer)
    open_ = render_chat(messages, published_tokenizer, continue_final_message=True)
    assert closed.ids[: len(open_.ids)] == open_.ids
    assert published_tokenizer.decode(closed.ids[len(open_.ids) :]) == "<|im_end|>\n"
    prompt = render_chat(messages[:1], published_tokenizer, add_generation_prompt=True)
    assert published_tokenizer.decode(prompt.ids).endswith("<|im_start|>assistant\n")
    assert prompt.supervised == 0


def test_raw_prompt_of_the_base_model(published_tokenizer):
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What? Answer:"}]
    prompt = render_prompt(content, published_tokenizer)
    sample = render_prompt(content, published_tokenizer, completion=" blue")
    text = published_tokenizer.encode_text("What? Answer:")
    assert prompt.ids == [151857, *[151859] * 256, 151858, *text]
    assert sample.ids == [*prompt.ids, *published_tokenizer.encode_text(" blue"), 151643]
    assert spelled(sample, published_tokenizer) == " blue<|endoftext|>"


GROUNDED = "<ref>the dog</ref><box>(536,509),(588,602)</box>"


def test_grounding_markup_needs_the_callers_word(published_tokenizer):
    tags = {published_tokenizer.control_tokens[tag] for tag in ("<ref>", "</ref>", "<box>", "</box>")}

    def structural(*messages, **kwargs):
        return tags & set(render_chat(messages, published_tokenizer, **kwargs).ids)

    said = {"role": "assistant", "content": GROUNDED}
    assert structural(said) == set()
    assert structural(said, grounding=True) == tags
    assert structural({**said, "grounding": True}) == tags
    part = {"type": "text", "text": GROUNDED}
    assert structural({"role": "user", "content": [part]}) == set()
    assert structural({"role": "user", "content": [{**part, "grounding": True}]}) == tags


@pytest.mark.parametrize(
    "text", ["a <box> b", "<ref></ref>", "<box>(1,2),(3,1000)</box>", "<box>(1, 2),(3,4)</box>", "</box><box>"]
)
def test_malformed_grounding_markup_stays_text(published_tokenizer, text):
    ids = render_prompt(text, published_tokenizer, completion="", grounding=True).ids
    assert ids[:-1] == published_tokenizer.encode_text(text)


def test_an_open_box_ends_a_grounding_prompt(published_tokenizer):
    box = published_tokenizer.control_tokens["<box>"]
    assert render_prompt("<ref>a cat</ref><box>", published_tokenizer, grounding=True).ids[-1] == box


def test_n_queries(published_tokenizer):
    content = [{"type": "image"}]
    assert render_prompt(content, published_tokenizer, n_queries=64).ids.count(151859) == 64


IMAGE = {"type": "image", "image": "a.png"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty"),
        ("hello", "must be a list of messages, not str"),
        ({"role": "user", "content": "x"}, "must be a list of messages, not dict"),
        (["hello"], "message 0 must be a mapping"),
        ([{"role": "tool", "content": "x"}], "message 0: role must be one of system, user, assistant, not 'tool'"),
        ([{"role": "user", "content": None}], r"message 0 \(user\) has no content"),
        ([{"role": "user", "content": 5}], r"message 0 \(user\): content must be text or a list of parts, not int"),
        (
            [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}],
            "message 1: a system message can only be the first",
        ),
        ([{"role": "user", "content": ["x"]}], r"message 0 \(user\), part 0: must be a mapping with a type"),
        ([{"role": "user", "content": [{"type": "video"}]}], "part 0: type must be text or image, not 'video'"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "part 0: text must be a string, not int"),
        ([{"role": "user", "content": [{**IMAGE, "url": "b.png"}]}], r"more than one image \(image, url\)"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url has no url"),
        (
            [{"role": "assistant", "content": [IMAGE]}],
            r"message 0 \(assistant\): only a user's message can hold images",
        ),
        ([{"role": "system", "content": [IMAGE]}], r"message 0 \(system\): only a user's message can hold images"),
    ],
)
def test_malformed_messages_are_named(published_tokenizer, messages, message):
    with pytest.raises(InputError, match=message):
        render_chat(messages, published_tokenizer)


def test_contradictory_endings_are_refused(published_tokenizer):
    user = [{"role": "user", "content": "x"}]
    with pytest.raises(InputError, match="needs an assistant message"):
        render_chat(user, published_tokenizer, continue_final_message=True)
    with pytest.raises(InputError, match="not both"):
        render_chat(user, published_tokenizer, continue_final_message=True, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image"}, None),
        ({"type": "image", "image": None, "text": None}, None),
        ({"type": "image", "path": "a.png", "image": None}, "a.png"),
        ({"type": "image", "url": "https://x/a.png"}, "https://x/a.png"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}, "data:image/png;base64,AA"),
        ({"type": "image_url", "image_url": "a.png"}, "a.png"),
    ],
)
def test_image_sources(published_tokenizer, part, source):
    """Also as datasets stores parts: every key in every part, None where it does not belong."""
    assert render_prompt([part], published_tokenizer).images == [source]


def test_the_tokenizers_own_chat_method(published_tokenizer):
    """For conversations without images: the same ids, in the shapes that Transformers gives."""
    messages = [{"role": "user", "content": "<|im_end|> Hi"}, {"role": "assistant", "content": "Hello"}]
    rendered = render_chat(messages, published_tokenizer)
    one = published_tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    assert one["input_ids"] == rendered.ids
    assert one["assistant_masks"] == [int(label != IGNORED) for label in rendered.labels]
    assert published_tokenizer.apply_chat_template(messages, return_dict=False) == rendered.ids
    tensors = published_tokenizer.apply_chat_template(
        [messages, messages[:1]], padding=True, padding_side="left", return_tensors="pt"
    )
    assert tensors["input_ids"][0].tolist() == rendered.ids
    assert tensors["attention_mask"].sum(1).tolist() == [
        len(rendered.ids),
        len(render_chat(messages[:1], published_tokenizer).ids),
    ]
    string = published_tokenizer.apply_chat_template(messages, tokenize=False)
    assert string.endswith("<|im_start|>assistant\nHello<|im_end|>\n")
    with pytest.raises(InputError, match="use the processor"):
        published_tokenizer.apply_chat_template(CONVERSATION)
