import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from qwenvl import (
    ImageAccess,
    ImageError,
    InputError,
    MissingFileError,
    QwenVLProcessor,
    load_image,
    load_processor,
)
from qwenvl.checkpoint.record import ModelRecord, write_record
from qwenvl.text.chat import render_chat
from qwenvl.views import Views


def asks(*images, text="What is it?"):
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def inputs_of(processor, conversation, **kwargs):
    return processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, add_generation_prompt=True, **kwargs
    )


def test_one_conversation(tiny_processor, tiny_images, expected):
    inputs = inputs_of(tiny_processor, asks(tiny_images[0]), return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    assert torch.allclose(inputs["pixel_values"], expected["pixel_values"][:1], atol=1e-6)


def test_images_come_in_reading_order_over_the_batch(tiny_processor, tiny_images):
    a, b, c = (Image.open(path) for path in tiny_images[:3])
    batch = inputs_of(tiny_processor, [asks(b, a), asks(text="none"), asks(c)])
    apart = tiny_processor.image_processor([b, a, c], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], apart)


def test_lists_without_padding_and_tensors_with(tiny_processor):
    batch = [asks(text="short"), asks(text="a much longer question")]
    lists = inputs_of(tiny_processor, batch)
    assert len({len(ids) for ids in lists["input_ids"]}) == 2
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    padded = inputs_of(tiny_processor, batch, processor_kwargs=options)
    assert torch.equal(padded["input_ids"], inputs_of(tiny_processor, batch, **options)["input_ids"])
    row = padded["input_ids"][0][padded["attention_mask"][0].bool()]
    assert row.tolist() == lists["input_ids"][0]
    assert (padded["input_ids"][0][padded["attention_mask"][0] == 0] == tiny_processor.tokenizer.eod_id).all()
    right = inputs_of(tiny_processor, batch, **{**options, "padding_side": "right", "pad_to_multiple_of": 64})
    assert right["input_ids"].shape[1] % 64 == 0 and right["attention_mask"][0, 0] == 1
    fixed = inputs_of(tiny_processor, batch, padding="max_length", max_length=200, return_tensors="pt")
    assert fixed["input_ids"].shape == (2, 200)


def test_assistant_masks(tiny_processor, tiny_images):
    messages = [*asks(tiny_images[0]), {"role": "assistant", "content": "A box."}]
    inputs = tiny_processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    labels = render_chat(messages, tiny_processor.tokenizer).labels
    assert inputs["assistant_masks"] == [[int(label != -100) for label in labels]]


def test_the_string_path_gives_the_same(tiny_processor, tiny_images):
    messages = asks(*tiny_images[:2], text="<|im_end|> in text")
    string = tiny_processor.apply_chat_template(messages, add_generation_prompt=True)
    by_string = tiny_processor(text=string, images=tiny_images[:2], return_tensors="pt")
    direct = inputs_of(tiny_processor, messages, return_tensors="pt")
    assert by_string.keys() == direct.keys()
    assert all(torch.equal(by_string[name], direct[name]) for name in direct)


def test_only_ids(tiny_processor):
    ids = tiny_processor.apply_chat_template(asks(text="x"), tokenize=True, add_generation_prompt=True)
    assert ids == inputs_of(tiny_processor, asks(text="x"))["input_ids"]
    strings = tiny_processor.apply_chat_template([asks(text="x"), asks(text="y")])
    assert [string.count("<|im_start|>") for string in strings] == [2, 2]


@pytest.mark.parametrize("nested", [False, True])
def test_images_beside_the_messages(tiny_processor, tiny_images, nested):
    place = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    images = [[tiny_images[0]], [tiny_images[1]]] if nested else list(tiny_images[:2])
    batch = inputs_of(tiny_processor, [[place], [place]], processor_kwargs={"images": images})
    apart = tiny_processor.image_processor(tiny_images[:2], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], apart)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], r"0 image\(s\) are given for 2 place"),
        (["a"], r"1 image\(s\) are given for 2 place"),
        ([["a", "b"], []], r"row 0: 2 image\(s\) are given for 1 place"),
    ],
)
def test_images_and_places_differ(tiny_processor, images, message):
    place = {"role": "user", "content": [{"type": "image"}]}
    with pytest.raises(InputError, match=message):
        inputs_of(tiny_processor, [[place], [place]], images=images)


def test_truncation_never_touches_an_image(tiny_processor, tiny_images):
    conversation = asks(tiny_images[0], text="a question that goes on " * 10)
    whole = inputs_of(tiny_processor, conversation)["input_ids"][0]
    end = whole.index(tiny_processor.tokenizer.image_end_id) + 1
    cut = inputs_of(tiny_processor, conversation, truncation=True, max_length=end)
    assert cut["input_ids"] == [whole[:end]]
    for max_length in (end - 1, 100, 5):
        with pytest.raises(InputError, match=f"conversation 0 has {len(whole)} tokens.*cut or drop an image"):
            inputs_of(tiny_processor, conversation, truncation=True, max_length=max_length)


def test_what_images_may_reach(tiny_processor, tiny_images, tmp_path):
    access = ImageAccess(root=tmp_path)
    with pytest.raises(ImageError):
        inputs_of(tiny_processor, asks(str(tiny_images[0])), access=access)
    Image.open(tiny_images[0]).save(tmp_path / "inside.png")
    assert inputs_of(tiny_processor, asks("inside.png"), access=access)["pixel_values"].shape == (1, 3, 112, 112)
    with pytest.raises(ImageError):
        inputs_of(tiny_processor, [{"role": "user", "content": [{"type": "image", "url": "http://127.0.0.1/x.png"}]}])


def test_what_qwen_vl_does_not_know(tiny_processor):
    with pytest.raises(InputError, match="tools"):
        tiny_processor.apply_chat_template(asks(text="x"), tools=[{"name": "f"}])
    with pytest.raises(InputError, match="chat_template"):
        tiny_processor.apply_chat_template(asks(text="x"), chat_template="{{ messages }}")
    assert tiny_processor.apply_chat_template(asks(text="x"), chat_template=tiny_processor.chat_template)
    with pytest.raises(TypeError, match="no_such_option"):
        inputs_of(tiny_processor, asks(text="x"), no_such_option=1)


@pytest.mark.parametrize("road", ["messages", "strings"])
def test_image_placeholders_are_never_labels(tiny_processor, tiny_images, road):
    """The labels of other programs' collators: a copy of the ids, set on the batch."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    images = [str(tiny_images[0])]
    if road == "messages":
        batch = tiny_processor.apply_chat_template(
            [messages], tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"images": [images]}
        )
    else:
        text = tiny_processor.apply_chat_template([messages], tokenize=False)
        batch = tiny_processor(images=[images], text=text, return_tensors="pt")
    ids = batch["input_ids"]
    batch["labels"] = ids.clone()
    pads = ids == tiny_processor.image_token_id
    assert pads.sum() == 256
    assert torch.equal(batch["labels"], ids.masked_fill(pads, -100)) and torch.equal(batch.labels, batch["labels"])
    loaded = pickle.loads(pickle.dumps(batch))  # from a loader's process
    assert torch.equal(loaded["labels"], batch["labels"]) and type(loaded)(dict(loaded)).keys() == batch.keys()


def test_only_images(tiny_processor, tiny_images):
    assert tiny_processor(images=tiny_images[:2])["pixel_values"].shape == (2, 3, 112, 112)
    with pytest.raises(InputError, match="text, images or both"):
        tiny_processor()


def test_save_and_load(tiny_processor, tmp_path):
    tiny_processor.save_pretrained(tmp_path)
    again = QwenVLProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == tiny_processor.to_dict()
    assert again.chat_template == tiny_processor.chat_template
    assert again.tokenizer.get_vocab() == tiny_processor.tokenizer.get_vocab()


def test_what_is_missing_or_damaged_is_named(tiny_processor, tmp_path):
    with pytest.raises(MissingFileError, match="absent cannot be loaded"):
        QwenVLProcessor.from_pretrained(tmp_path / "absent")
    tiny_processor.save_pretrained(tmp_path)
    for name in ("processor_config.json", "tokenizer_config.json"):
        whole = (tmp_path / name).read_text()
        (tmp_path / name).write_text(whole[:-9])
        with pytest.raises(InputError, match=str(tmp_path)) as caught:
            QwenVLProcessor.from_pretrained(tmp_path)
        assert not isinstance(caught.value, MissingFileError)
        (tmp_path / name).write_text(whole)


def test_decode(tiny_processor):
    ids = [tiny_processor.tokenizer.encode_text("Hello"), tiny_processor.tokenizer.encode_text("world")]
    assert tiny_processor.batch_decode(ids) == ["Hello", "world"]


def test_a_saved_processor_that_contradicts_the_model_is_refused(tiny_folder, tmp_path):
    QwenVLProcessor.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    QwenVLProcessor.from_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"n_queries": 64}))
    with pytest.raises(InputError, match=r"processor_config\.json says n_queries 64, but by config\.json .* 256"):
        QwenVLProcessor.from_pretrained(tmp_path)


LOADERS = [load_processor, AutoProcessor.from_pretrained]


@pytest.mark.parametrize("load", LOADERS, ids=["ours", "auto"])
def test_the_system_message_of_training_is_that_of_conversations_without_one(tiny_folder, tmp_path, load):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    write_record(folder, ModelRecord(chat_format="chatml", system="Antworte kurz."))
    trained, plain = load(folder), QwenVLProcessor.from_pretrained(tiny_folder)
    conversation = [{"role": "user", "content": "Was?"}]
    said = [{"role": "system", "content": "Antworte kurz."}, *conversation]
    how = {"tokenize": True, "add_generation_prompt": True}
    assert trained.apply_chat_template(conversation, **how) == plain.apply_chat_template(said, **how)
    assert trained.apply_chat_template(conversation) == plain.apply_chat_template(said)
    # A conversation's own goes before it.
    own = [{"role": "system", "content": "Be long."}, *conversation]
    assert trained.apply_chat_template(own, **how) == plain.apply_chat_template(own, **how)
    trained.save_pretrained(tmp_path / "saved")
    assert "system" not in json.loads((tmp_path / "saved" / "processor_config.json").read_text())


@pytest.mark.parametrize("load", LOADERS, ids=["ours", "auto"])
def test_the_views_of_training_are_those_of_every_image(tiny_folder, tmp_path, tiny_images, load):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    views = Views(True, (1, 2), 0.0)
    write_record(folder, ModelRecord(chat_format="chatml", views=views))
    trained, plain = load(folder), QwenVLProcessor.from_pretrained(tiny_folder)
    assert trained.views == views and plain.views is None
    a, b = (load_image(path) for path in tiny_images[:2])
    written_out = inputs_of(plain, asks(*views.pictures(a), *views.pictures(b)), return_tensors="pt")
    given, string = asks({}, {}), trained.apply_chat_template(asks(a, b), add_generation_prompt=True)
    for message in given:
        for part in message["content"]:
            part.pop("image", None)
    for inputs in (
        inputs_of(trained, asks(a, b), return_tensors="pt"),
        inputs_of(trained, given, images=[a, b], return_tensors="pt"),
        inputs_of(trained, [given, given], images=[[a, b], [a, b]], return_tensors="pt"),
        trained(images=[a, b], text=string, return_tensors="pt"),
        trained(images=[[a, b]], text=[string], return_tensors="pt"),
    ):
        rows = len(inputs["input_ids"])
        assert torch.equal(inputs["input_ids"], written_out["input_ids"].expand(rows, -1))
        assert torch.equal(inputs["pixel_values"], written_out["pixel_values"].repeat(rows, 1, 1, 1))
    assert torch.equal(trained(images=[a, b])["pixel_values"], written_out["pixel_values"])


def test_counts_that_forget_the_views_are_refused(tiny_processor, tiny_images, monkeypatch):
    monkeypatch.setattr(tiny_processor, "views", Views(True, (1, 2), 0.0))
    string = tiny_processor.apply_chat_template(asks(tiny_images[0]))
    with pytest.raises(
        InputError, match=r"text 0: it has 1 image placeholder.* each image takes 3 \(the page and its"
    ):
        tiny_processor(images=tiny_images[:1], text="<img></img>What?")
    with pytest.raises(InputError, match=r"3 image\(s\) are given for 1 place.* give whole images, not their parts"):
        tiny_processor(images=tiny_images[:3], text=string)
    with pytest.raises(InputError, match=r"0 image\(s\) are given for 1 place"):
        tiny_processor(text=string)
