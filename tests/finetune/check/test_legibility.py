"""The warning of small text: by the model's picture, with data.views by its parts, on a sample that is bounded."""

import json

import pytest
from recipes_for_tests import IMAGES, write_recipe

from examples.nano.making.documents.document import make_document
from finetune.check import legibility
from finetune.check.findings import look_before_training
from finetune.check.legibility import LEAST, Legibility, Page
from finetune.data.sample import Origin
from finetune.recipe import load_recipe
from qwenvl.views import Views

TWO, THREE = Views(grid=(2, 2)), Views(grid=(3, 3))
ORIGIN = Origin("a.jsonl", 3)


@pytest.mark.parametrize(
    ("size", "views", "seen"),
    [
        ((448, 448), None, 10),
        ((896, 448), None, 5),
        ((448, 896), None, 5),
        ((448, 448), TWO, 19),
        ((896, 448), TWO, 9.5),
        ((448, 448), THREE, 28),
        ((1792, 448), Views(grid=(1, 4), overlap=0), 10),
    ],
)
def test_letters_as_the_model_sees_them(size, views, seen):
    assert Page(ORIGIN, size, 10.0).seen(448, views) == pytest.approx(seen, rel=0.01)


@pytest.mark.parametrize(
    ("letter", "views", "said"),
    [
        (6.0, None, ""),
        (5.9, None, "data.views: {page: true, grid: [2, 2], overlap: 0.1} shows parts; or crop"),
        (2.5, None, "grid: [3, 3]"),
        (2.5, TWO, "448 x 448 pixels of its largest part (the page and its 2 x 2 parts, overlap 0.1), such as"),
        (1.0, None, "letters of 1 become 1.0); crop the images"),
    ],
)
def test_the_warning_names_an_example_and_a_remedy(letter, views, said):
    found = Legibility(9, 30, [Page(ORIGIN, (448, 448), 20.0), Page(ORIGIN, (448, 448), letter)], 448, views)
    if not said:
        assert found.warning == ""
        return
    assert said in found.warning
    assert "1 of 9 images looked at (of 30 rows)" in found.warning and "a.jsonl, row 3" in found.warning


def pages(tmp_path, count, size, **changes):
    """A recipe of the tiny model on registers of that size; a row in two is a photograph, or has no image."""
    rows = []
    for index in range(count):
        path = tmp_path / f"{index}.png"
        make_document("register", seed=0, split="train", index=index, image_size=size, difficulty=0).image.save(path)
        images = [[str(path)], [str(IMAGES[0])], []][index % 3] if index else [str(path)]
        turns = [{"role": "user", "content": "Read."}, {"role": "assistant", "content": "It."}]
        rows.append(json.dumps({"messages": turns, "images": images}) + "\n")
    (tmp_path / "pages.jsonl").write_text("".join(rows))
    source = {"path": str(tmp_path / "pages.jsonl"), "format": "messages"}
    return load_recipe(write_recipe(tmp_path, data__train=[source], data__images_root="/", **changes))


def test_a_check_looks_at_some_pages(tmp_path):
    found = look_before_training(pages(tmp_path, 9, 300), samples=0, images=False, processes=1).legibility["train"]
    side = found.side
    assert (found.looked_at, found.rows, len(found.pages)) == (6, 6, 3)
    assert {page.size for page in found.pages} == {(300, 300)}
    assert len(found.hard) == 3 * (9.2 * side / 300 < LEAST)


def test_the_sample_is_bounded_in_number_and_time(tmp_path, monkeypatch):
    recipe = pages(tmp_path, 9, 140)
    given = []
    monkeypatch.setattr("finetune.check.findings.look_at_letters", lambda *args: given.append(args))
    look_before_training(recipe, samples=0, images=False, processes=1)
    (arguments,) = given
    assert legibility.look_at_letters(*arguments, most_pages=2).looked_at == 2
    assert legibility.look_at_letters(*arguments, most_seconds=-1).looked_at == 0
