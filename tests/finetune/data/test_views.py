"""data.views in everything that reads data: what is shown, what it costs, what is refused, what is read once."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recipes_for_tests import write_recipe

from finetune.batches.collate import Collator
from finetune.batches.image_request import ImageRequest, image_key
from finetune.data.checks.checking import look_at, refusal
from finetune.data.checks.image_check import open_images
from finetune.data.images.image_files import image_paths
from finetune.data.prepare import prepare
from finetune.data.reading import open_samples, rules_of
from finetune.data.summary import describe_long
from finetune.errors import UserError
from finetune.recipe import RecipeError, load_recipe
from finetune.replies.image_features import ImageStore
from finetune.terminal import say_nothing
from finetune.vision_cache.cache import ImageHandles
from finetune.vision_cache.run_images import SampleImages
from qwenvl import ImageAccess, load_image
from qwenvl.images import images
from qwenvl.views import PagePart, Views

VIEWS = {"page": True, "grid": [2, 1], "overlap": 0.25}
THREE = Views(True, (2, 1), 0.25)


@pytest.fixture
def folder(tmp_path):
    draw = np.random.default_rng(0)
    for name, size in {"a.png": (40, 30), "b.png": (21, 64)}.items():
        Image.fromarray(draw.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def decoded(monkeypatch):
    """How many images were decoded so far."""
    decode, count = images.decode, []
    monkeypatch.setattr(images, "decode", lambda *given, **options: count.append(1) or decode(*given, **options))
    return count


def vqa(*names, ask="Q"):
    return {
        "images": list(names),
        "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": "A"}],
    }


def read(folder: Path, rows, processor, row_format="messages", **data):
    """Samples, rules and what the check found, as a recipe with `data` reads them."""
    file = folder / "rows.jsonl"
    source = {"path": str(file), "format": row_format}
    data = {"views": VIEWS, "images_root": str(folder), "train": source, **data}
    recipe_file = write_recipe(folder, evaluate=None, **{f"data__{key}": value for key, value in data.items()})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(recipe_file, [])
    samples, rules = open_samples(recipe, recipe.data.train), rules_of(recipe, processor)
    return samples, rules, look_at(samples, rules, show_progress=False, processes=1)


def collate(samples, rules, processor, *indices):
    return Collator(samples, rules, processor.image_processor)([{"sample": index} for index in indices])


def test_a_batch_is_what_the_processor_makes_of_the_conversations(folder, tiny_processor, decoded):
    samples, rules, checked = read(folder, [vqa("a.png"), vqa("b.png", "a.png")], tiny_processor)
    assert checked.images.tolist() == [3, 6] and not checked.problems
    batch = collate(samples, rules, tiny_processor, 0, 1)
    assert len(decoded) == 3  # each image of each row once
    tiny_processor.views = THREE
    try:
        for index, span in ((0, slice(0, 3)), (1, slice(3, 9))):
            asked = tiny_processor.apply_chat_template(
                list(samples[index].messages), tokenize=True, return_dict=True, return_tensors="pt"
            )
            rows = torch.split(batch["input_ids"][0], batch["sequence_lengths"].tolist())
            assert torch.equal(rows[index], asked["input_ids"][0])
            theirs = tiny_processor.image_processor(
                [load_image(source) for source in rules.fit(samples[index].messages).rendered.images],
                return_tensors="pt",
                do_normalize=False,
            )
            assert torch.equal(batch["pixel_values"][span], theirs["pixel_values"])
            # From a string and the whole images, as other programs do.
            string = tiny_processor.apply_chat_template(list(samples[index].messages))
            again = tiny_processor(images=list(image_paths(samples[index])), text=string, return_tensors="pt")
            assert torch.equal(again["input_ids"], asked["input_ids"])
            assert torch.equal(again["pixel_values"], asked["pixel_values"])
    finally:
        tiny_processor.views = None
    assert batch["sequence_images"].tolist() == [3, 6]


def test_what_a_row_costs_is_said_with_the_key(folder, tiny_processor):
    rows = [vqa("a.png", "b.png")]
    _, rules, checked = read(folder, rows, tiny_processor, max_length=500)
    error = refusal(checked, rules)
    (tokens,) = [long.tokens for long in checked.dropped_long]
    pictures = 6 * (rules.n_queries + 2)
    assert error is not None and str(error.problems[0]).endswith(
        f"row 1, length: {tokens:,} tokens, more than max_length=500 ({pictures:,} of them are 6 pictures: "
        "data.views makes 3 of an image; fewer parts (data.views.grid), or a larger max_length)"
    )
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    frames[0].save(folder / "two.tif", save_all=True, append_images=frames[1:])
    _, rules, checked = read(
        folder, [vqa("two.tif")], tiny_processor, max_length=500, pages={"first": 2}, on_long="drop_turns"
    )
    assert (
        "data.pages shows 1 pages more and data.views makes 3 of an image; fewer pages" in checked.dropped_long[0].cost
    )
    _, rules, checked = read(folder, [vqa("two.tif")], tiny_processor, max_length=100, pages={"first": 2}, views=None)
    assert "2 pictures: data.pages shows 1 pages more; fewer pages (data.pages.first)" in checked.dropped_long[0].cost
    _, rules, checked = read(folder, [vqa("a.png")], tiny_processor, max_length=100, views=None)
    assert checked.dropped_long[0].cost == ""


def test_samples_beyond_what_the_model_was_made_for_are_told(folder, tiny_processor):
    _, rules, checked = read(folder, [vqa("a.png"), vqa("b.png", "a.png")], tiny_processor, max_length=None)
    longest, pictures = int(checked.lengths[1]), 6 * (rules.n_queries + 2)
    said = describe_long(checked, rules, 1000)
    assert said.startswith(
        f"1 samples are longer than the model's seq_length of 1,000 tokens, the longest has {longest:,}, "
        f"{pictures:,} of them for 6 pictures (data.views): "
    )
    assert describe_long(checked, rules, 2048) == ""
    assert "pictures (data.pages): " in describe_long(checked, replace(rules, views=None), 1000, pages=True)
    assert f"{longest:,}: beyond" in describe_long(checked, replace(rules, views=None), 1000)


def test_texts_that_name_a_picture_that_moves_are_refused(folder, tiny_processor):
    rows = [
        vqa("a.png", "b.png", ask="Is Picture 2 as tall as Picture 1?"),
        vqa("a.png", "b.png", ask="Look at Picture 4, the page: is it tall?"),
        vqa("a.png", ask="Is Picture 1 tall? And Picture 2?"),
    ]
    _, _, checked = read(folder, rows, tiny_processor, on_bad_row="skip")
    assert [str(problem.origin.row) for problem in checked.problems] == ["1"]
    assert "says 'Picture 2', and image 2 is another picture with data.views" in checked.problems[0].reason
    turns = [{"from": "user", "value": "Picture 1: <img>a.png</img>\nPicture 2: <img>b.png</img>\nBoth?"}]
    turns.append({"from": "assistant", "value": "A"})
    samples, rules, checked = read(folder, [{"conversations": turns}], tiny_processor, "qwen_json")
    assert not checked.problems
    text = tiny_processor.tokenizer.decode(rules.fit(samples[0].messages).rendered.ids)
    assert [f"Picture {number}: <img>" in text for number in (1, 6, 7)] == [True, True, False]


def test_boxes_are_of_the_page(folder, tiny_processor):
    row = {"image": "a.png", "phrase": "dog", "boxes": [3, 4, 15, 20]}
    boxes = {"path": str(folder / "rows.jsonl"), "format": "grounding", "box_form": "xyxy"}
    samples, rules, _ = read(folder, [row], tiny_processor, train=boxes)
    plain = replace(rules, views=None)
    one, other = (rule.fit(samples[0].messages).rendered for rule in (rules, plain))
    decode = tiny_processor.tokenizer.decode
    assert decode(one.ids).rpartition("assistant")[2] == decode(other.ids).rpartition("assistant")[2]
    assert one.images[0] == other.images[0] == str(folder / "a.png")
    turns = [{"from": "user", "value": "<img>a.png</img>Q"}, {"from": "assistant", "value": "<box>(1,2),(3,4)</box>"}]
    alone = {**VIEWS, "page": False}
    _, _, checked = read(
        folder, [{"conversations": turns}], tiny_processor, "qwen_json", views=alone, on_bad_row="skip"
    )
    assert "boxes are of the whole page, and data.views.page: false" in checked.problems[0].reason
    for changes in ({"train": boxes}, {"grounding": True}):
        with pytest.raises(RecipeError, match="boxes are of the whole page, which is not among the pictures"):
            read(folder, [row], tiny_processor, views=alone, **changes)


def test_too_many_pictures_are_refused_before_they_are_written(folder, tiny_processor):
    many = vqa(*["a.png"] * 900)
    _, _, checked = read(folder, [many], tiny_processor, on_bad_row="skip", max_length=None)
    assert "there are 2,700 in one row" in checked.problems[0].reason


@pytest.mark.parametrize(
    ("views", "said"),
    [
        ({"grid": [1, 1]}, r"data.views.grid: a grid of \[1, 1\] is the whole page"),
        ({"grid": [2]}, "data.views.grid"),
        ({"grid": [2, 9]}, "data.views.grid.1: expected a whole number, at least 1 and at most 8, found 9"),
        ({"grid": "2x2"}, "data.views.grid"),
        ({"overlap": 0.9}, "data.views.overlap"),
        ({"parts": 4}, "data.views.parts"),
    ],
)
def test_other_values_are_refused(folder, tiny_processor, views, said):
    with pytest.raises(RecipeError, match=said):
        read(folder, [vqa("a.png")], tiny_processor, views=views)


def test_the_data_is_the_same_data(folder, tiny_processor):
    """What tells rows and files apart knows no views: the recipe does."""
    rows = [vqa("a.png", "b.png")]
    found = [read(folder, rows, tiny_processor, views=views) for views in (VIEWS, None)]
    (samples, _, checked), (plain, _, other) = found
    assert samples.fingerprint() == plain.fingerprint()
    assert checked.digests.tolist() == other.digests.tolist()
    assert list(image_paths(samples[0])) == [str(folder / "a.png"), str(folder / "b.png")]


def test_the_image_check_opens_each_image_once(folder, tiny_processor, decoded):
    (folder / "bad.png").write_bytes((folder / "a.png").read_bytes()[:200])
    rows = [vqa("a.png", "b.png"), vqa("b.png", "bad.png"), vqa("a.png")]
    samples, rules, checked = read(folder, rows, tiny_processor)
    opened = open_images(samples, checked, rules, show_progress=False, processes=1)
    assert opened.opened == len(decoded) == 3 and opened.samples == (1,)
    assert [problem.field for problem in opened.problems] == ["images[1]"]


def test_turns_are_left_out_with_all_pictures_of_their_images(folder, tiny_processor, decoded):
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"Q{n}"}]} for n in (1, 2)]
    reply = {"role": "assistant", "content": "A"}
    row = {"messages": [turns[0], reply, turns[1], reply], "images": ["a.png", "b.png"]}
    samples, rules, checked = read(folder, [row], tiny_processor, max_length=900, on_long="drop_turns")
    assert checked.images.tolist() == [3] and len(checked.shortened) == 1
    fitted = rules.fit(samples[0].messages)
    assert fitted.rendered.images == THREE.pictures(str(folder / "b.png"))
    assert open_images(samples, checked, rules, show_progress=False, processes=1).opened == len(decoded) == 1
    assert [request.source for request in SampleImages(samples, checked, rules, [0])[0]] == fitted.rendered.images


def test_keys_tell_parts_from_the_page_and_from_other_views(folder):
    access, handles = ImageAccess(root=folder), ImageHandles("", "")
    data = (folder / "a.png").read_bytes()
    others = [Views(True, (2, 1), 0.2), Views(True, (1, 2), 0.25)]
    for source in ("a.png", data, {"bytes": data, "path": None}, {"bytes": None, "path": "a.png"}):
        sources = [*THREE.pictures(source), *(PagePart(source, views, 1) for views in others)]
        for key in (image_key, handles.of):
            assert len({key(one, access) for one in sources}) == len(sources)
            # The same pixels, whether the page is among the pictures or not.
            assert key(sources[1], access) == key(PagePart(source, replace(THREE, page=False), 1), access)
    before = handles.of(PagePart("a.png", THREE, 1), access)
    Image.new("RGB", (3, 3)).save(folder / "a.png")
    assert handles.of(PagePart("a.png", THREE, 1), access) != before


def test_replies_decode_each_image_once(folder, tiny_model, tiny_processor, decoded):
    access = ImageAccess(root=folder)
    requests = {
        image_key(source, access): ImageRequest(source, access, "row 1")
        for name in ("a.png", "b.png")
        for source in THREE.pictures(name)
    }
    with ImageStore(tiny_model, tiny_processor.image_processor) as store:
        features = store.features(requests)
    assert len(decoded) == 2 and len(features) == 6 == store.encoded


def test_prepared_data_has_each_page_once_and_needs_the_views(folder, tiny_processor):
    read(folder, [vqa("a.png", "b.png")], tiny_processor)
    said: list[str] = []
    recipe = load_recipe(folder / "recipe.yaml", [])
    prepare(recipe, folder / "prepared", say=lambda label, text: said.append(str(text)))
    assert "  views:" in said and "    - 2" in said
    source = {"path": str(folder / "prepared" / "train"), "format": "messages"}
    file = write_recipe(folder / "again", evaluate=None, data__train=source, data__views=VIEWS)
    again = load_recipe(file, [])
    samples, rules = open_samples(again, again.data.train), rules_of(again, tiny_processor)
    original = open_samples(recipe, recipe.data.train)
    one = collate(samples, rules, tiny_processor, 0)
    other = collate(original, rules, tiny_processor, 0)
    assert torch.equal(one["input_ids"], other["input_ids"]) and torch.equal(
        one["pixel_values"], other["pixel_values"]
    )
    assert [part["type"] for part in samples[0].messages[0]["content"]] == ["image", "image", "text"]
    with pytest.raises(UserError, match=r"--image-size 150: with data.views the model sees each part .* 196 for"):
        prepare(recipe, folder / "small", 150, say_nothing)
