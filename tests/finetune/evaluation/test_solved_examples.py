"""Solved examples are of other images and other documents than the question, and the same ones in every run."""

import json

import datasets
import pytest
from PIL import Image
from questions_for_tests import ROWS, ask, source, write

from finetune.data.sample import DataError
from finetune.evaluation.questions import Questions
from finetune.evaluation.tasks import find_task

DOCVQA = find_task("docvqa")
PAGES = 4


def rows(count=12, image="{page}.png", **columns):
    """Questions about PAGES pages in turn; `columns` are functions of the question's number."""
    return [
        {"questionId": n, "question": f"Q{n}", "answers": [f"A{n}"], "image": image.format(page=n % PAGES)}
        | {name: value(n) for name, value in columns.items()}
        for n in range(count)
    ]


def paint(folder):
    """Four different pages."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in range(PAGES):
        Image.new("RGB", (20, 10), (60 * page, 0, 0)).save(folder / f"{page}.png")
    return folder


def pages_of(questions) -> list[set[int]]:
    """The pages that each question's examples are about."""
    return [{int(shot.id) % PAGES for shot in question.shots} for question in questions]


def test_no_example_is_about_the_page_of_its_question(tmp_path):
    questions = ask(paint(tmp_path), DOCVQA, *rows(), style="base", shots=9)
    for number, pages in enumerate(pages_of(questions)):
        assert pages == set(range(PAGES)) - {number % PAGES}
    assert all(len({shot.id for shot in question.shots}) == 9 for question in questions)
    # Nor where the same file is named once more; and the same ones are drawn.
    path = tmp_path / "data.jsonl"
    again = Questions(source(path), DOCVQA, style="base", shots=9, shot_source=source(path))
    assert [[shot.id for shot in question.shots] for question in again] == [
        [shot.id for shot in question.shots] for question in questions
    ]


@pytest.mark.parametrize("column", ["docId", "ucsf_document_id", "image_id", "imgname"])
def test_no_example_is_of_the_document_of_its_question(tmp_path, column):
    """Each question has an image file of its own: only the column says that they are pages of one document."""
    paint(tmp_path)
    for n in range(12):
        Image.new("RGB", (20, 10), (0, 20 * n, 9)).save(tmp_path / f"own{n}.png")
    asked = [row | {"image": f"own{n}.png", column: f"doc {n % PAGES}"} for n, row in enumerate(rows())]
    for number, pages in enumerate(pages_of(ask(tmp_path, DOCVQA, *asked, style="base", shots=9))):
        assert number % PAGES not in pages
    # A column of one's own takes the place of all of these.
    asked = [row | {column: "the same", "report": n % PAGES} for n, row in enumerate(asked)]
    given = {"style": "base", "shots": 9, "source_with": {"columns": {"document": "report"}}}
    assert all(
        number % PAGES not in pages for number, pages in enumerate(pages_of(ask(tmp_path, DOCVQA, *asked, **given)))
    )
    with pytest.raises(DataError, match=r"of its 12 questions, 0 are about .*too few for 9.*--column document=NAME"):
        ask(tmp_path, DOCVQA, *asked, style="base", shots=9)


def test_a_column_of_documents_that_is_missing_is_told(tmp_path):
    with pytest.raises(DataError, match="row 1 has no report, which the columns name as its document"):
        ask(paint(tmp_path), DOCVQA, *rows(), style="base", shots=1, source_with={"columns": {"document": "report"}})


def test_the_same_image_in_another_file_or_inside_the_data_is_known_by_its_content(tmp_path):
    paint(tmp_path)
    for n in range(12):
        (tmp_path / f"copy{n}.png").write_bytes((tmp_path / f"{n % PAGES}.png").read_bytes())
    copies = [row | {"image": f"copy{n}.png"} for n, row in enumerate(rows())]
    questions = ask(tmp_path, DOCVQA, *copies, style="base", shots=9)
    assert all(number % PAGES not in pages for number, pages in enumerate(pages_of(questions)))
    # As the datasets library stores them, all under one name.
    inside = [
        row | {"image": {"bytes": (tmp_path / row["image"]).read_bytes(), "path": "image.png"}} for row in copies
    ]
    stored = datasets.Dataset.from_list(inside)
    stored.cast_column("image", datasets.Image()).to_parquet(tmp_path / "inside.parquet")
    questions = Questions(source(tmp_path / "inside.parquet"), DOCVQA, style="base", shots=9)
    assert all(number % PAGES not in pages for number, pages in enumerate(pages_of(questions)))
    # Too few by their content is known once the examples are drawn, which is before weights are loaded.
    questions = Questions(source(tmp_path / "inside.parquet"), DOCVQA, style="base", shots=10)
    with pytest.raises(
        DataError, match=r"of its 12 questions, 9 are about other images and documents than question 0"
    ):
        questions[0]


def test_an_example_whose_image_cannot_be_read_is_not_shown(tmp_path):
    asked = rows()
    asked[1]["image"] = "gone.png"
    questions = ask(paint(tmp_path), DOCVQA, *asked, style="base", shots=8, look_for_images=False)
    assert all(shot.id != "1" for question in questions for shot in question.shots)


def test_too_few_examples_are_told_with_their_number(tmp_path):
    with pytest.raises(
        DataError, match=r"of its 12 questions, 9 are about other images .* question 0, too few for 10"
    ):
        ask(paint(tmp_path), DOCVQA, *rows(), style="base", shots=10)
    [one] = rows(1)
    with pytest.raises(DataError, match="of its 1 questions, 0 are about"):
        ask(tmp_path, DOCVQA, one, style="base", shots=1)


def test_examples_of_another_source_are_checked_in_the_same_way(tmp_path):
    train = write(paint(tmp_path), rows(8), "train.jsonl")
    questions = ask(tmp_path, DOCVQA, *rows(), style="base", shots=6, shot_source=source(train))
    assert all(number % PAGES not in pages for number, pages in enumerate(pages_of(questions)))
    with pytest.raises(DataError, match=r"train.jsonl: of its 8 questions, 6 are about other images"):
        ask(tmp_path, DOCVQA, *rows(), style="base", shots=7, shot_source=source(train))


def test_phrases_of_one_picture_are_no_examples_for_each_other(tmp_path):
    boxed = [
        ROWS["refcoco"] | {"question_id": n, "image": image} for n, image in enumerate(("a.png", "b.png", "a.png"))
    ]
    questions = ask(tmp_path, "refcoco", *boxed, style="base", shots=2)
    assert [question.id for question in questions] == ["0.1", "0.2", "1.1", "1.2", "2.1", "2.2"]
    for question in questions:
        assert {shot.images[0] for shot in question.shots}.isdisjoint(question.images)


def test_the_draw_does_not_depend_on_the_order_of_the_questions(tmp_path):
    write(paint(tmp_path), rows(), "train.jsonl")
    drawn = []
    for order in (1, -1):
        questions = ask(
            tmp_path, DOCVQA, *rows()[::order], style="base", shots=3, shot_source=source(tmp_path / "train.jsonl")
        )
        drawn.append({question.id: [shot.id for shot in question.shots] for question in questions})
    assert drawn[0] == drawn[1] and len({json.dumps(ids) for ids in drawn[0].values()}) > 6
