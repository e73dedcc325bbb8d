"""The columns of public datasets, as their cards give them, become conversations."""

import pytest
from formats_for_tests import asked, conversations, one

from finetune.data.formats.row_format import RowFormat
from finetune.data.sample import BadField
from finetune.errors import UserError
from qwenvl.text.chat import render_chat

IMAGE = {"bytes": b"...", "path": "a.jpg"}


def test_docvqa_columns():
    row = {
        "questionId": 337,
        "question": "what is the date mentioned in this letter?",
        "question_types": ["handwritten", "form"],
        "image": IMAGE,
        "docId": 279,
        "answers": ["1/8/93", "1/8/1993"],
    }
    assert one("vqa", row) == asked(IMAGE, row["question"], "1/8/93")


def test_chartqa_columns():
    row = {"image": IMAGE, "query": "How many bars?", "label": ["14"], "human_or_machine": 0}
    columns = {"question": "query", "answers": "label"}
    assert one("vqa", row, columns=columns) == asked(IMAGE, "How many bars?", "14")


def test_textvqa_columns_take_what_most_people_said():
    answers = ["nokia", "Nokia", "samsung", "samsung", "", " ", "samsung", "nokia", "lg", "phone"]
    row = {"image": IMAGE, "question": "Brand?", "answers": answers, "ocr_tokens": ["NOKIA"], "image_id": "x"}
    assert one("vqa", row) == asked(IMAGE, "Brand?", "samsung")


def test_ocrvqa_columns_give_a_sample_for_each_question():
    row = {"image": IMAGE, "questions": ["Who wrote it?", "Is it new?"], "answers": ["Ada", ["No", "Yes", "Yes"]]}
    columns = {"question": "questions"}
    assert conversations("vqa", row, columns=columns) == [
        asked(IMAGE, "Who wrote it?", "Ada"),
        asked(IMAGE, "Is it new?", "Yes"),
    ]
    assert RowFormat("vqa", columns).count(row) == 2


def test_vqa_takes_the_column_answer_and_a_prompt():
    row = {"image": "a.png", "question": "What? {x}", "answer": "This"}
    prompt = "{question} Answer in {one} word."
    assert one("vqa", row, prompt=prompt) == asked("a.png", "What? {x} Answer in {one} word.", "This")


def test_refcoco_evaluation_columns():
    """Expressions in `answer`, the box as x, y, width, height; several expressions for one box."""
    row = {"image": IMAGE, "question": "Describe.", "answer": ["red car", "car"], "bbox": [64, 48.0, 256, 192]}
    columns = {"phrase": "answer", "box": "bbox"}
    assert conversations("grounding", row, columns=columns, box_form="xywh") == [
        asked(IMAGE, f"<ref>{phrase}</ref>", "<box>(100,100),(500,500)</box>", grounding=True)
        for phrase in ("red car", "car")
    ]
    assert RowFormat("grounding", columns, box_form="xywh").count(row) == 2


def test_refcoco_training_columns():
    """Corners in pixels, expressions with their tokens, and a path."""
    row = {
        "sentences": [{"raw": "The red Car", "sent": "the red car", "sent_id": 1, "tokens": ["the", "red", "car"]}],
        "bbox": [64.0, 48.0, 320.0, 240.0],
        "image_path": "coco/train2014/1.jpg",
    }
    columns = {"image": "image_path", "phrase": "sentences", "box": "bbox"}
    assert one("grounding", row, columns=columns, prompt="Find {phrase}.") == asked(
        "coco/train2014/1.jpg", "Find the red car.", "<box>(100,100),(500,500)</box>", grounding=True
    )


def test_grounding_reads_as_the_published_evaluation(tiny_processor):
    """The ids from `<ref>` to the closing box are those of the evaluation's raw text, the turns' frame aside."""
    tokenizer = tiny_processor.tokenizer
    row = {"image": "a", "phrase": "car", "box": [64, 48, 320, 240]}
    ids = render_chat(one("grounding", row), tokenizer, n_queries=1).ids
    control = [tokenizer.control_tokens[tag] for tag in ("<ref>", "</ref>", "<box>", "</box>")]
    assert [i for i in ids if i in control] == control


def test_flickr30k_columns_give_a_sample_for_each_caption():
    row = {"image": IMAGE, "caption": ["A dog.", "A brown dog."], "sentids": ["1", "2"], "filename": "1.jpg"}
    prompt = "Describe the image in English:"
    assert conversations("caption", row) == [asked(IMAGE, prompt, text) for text in row["caption"]]
    assert one("caption", {"image": "a", "caption": "A cat."}, prompt="Say.") == asked("a", "Say.", "A cat.")


@pytest.mark.parametrize(
    ("name", "row", "field", "reason"),
    [
        ("vqa", {"question": "Q", "answers": "A"}, "image", "is missing; the row has question, answers"),
        ("vqa", {"image": 5, "question": "Q", "answers": "A"}, "image", "not int"),
        ("vqa", {"image": "a", "answers": "A"}, "question", "is missing"),
        ("vqa", {"image": "a", "question": " ", "answers": "A"}, "question", "is blank"),
        ("vqa", {"image": "a", "question": 5, "answers": "A"}, "question", "not int"),
        ("vqa", {"image": "a", "question": "Q"}, "answers", "is missing"),
        ("vqa", {"image": "a", "question": "Q", "answers": []}, "answers", "holds no answer"),
        ("vqa", {"image": "a", "question": "Q", "answers": ["", " "]}, "answers", "holds no answer"),
        ("vqa", {"image": "a", "question": "Q", "answers": ["A", 3]}, "answers[1]", "not int"),
        ("vqa", {"image": "a", "question": "Q", "answers": 3}, "answers", "not int"),
        ("vqa", {"image": "a", "question": [], "answers": []}, "question", "is empty"),
        ("vqa", {"image": "a", "question": ["Q", "R"], "answers": ["A"]}, "answers", "must be a list of 2"),
        ("vqa", {"image": "a", "question": ["Q"], "answers": "A"}, "answers", "not str"),
        ("vqa", {"image": "a", "question": ["Q", None], "answers": ["A", "B"]}, "question[1]", "not NoneType"),
        ("vqa", {"image": "a", "question": ["Q", "R"], "answers": ["A", ""]}, "answers[1]", "is blank"),
        ("grounding", {"image": "a", "box": [0, 0, 1, 1]}, "phrase", "is missing"),
        ("grounding", {"image": "a", "phrase": "x"}, "box", "is missing"),
        ("grounding", {"image": "a", "phrase": "x", "box": [0, 0, 1]}, "box", "not 3 values"),
        ("grounding", {"image": "a", "phrase": "x", "box": "0,0,1,1"}, "box", "not str"),
        ("grounding", {"image": "a", "phrase": "x", "box": [0, 0, "1", 1]}, "box[2]", "not str"),
        ("grounding", {"image": "a", "phrase": "x", "box": [0, 0, True, 1]}, "box[2]", "not bool"),
        ("grounding", {"image": "a", "phrase": "x", "box": [0, 0, float("nan"), 1]}, "box", "finite"),
        ("grounding", {"image": "a", "phrase": "x", "box": [5, 5, 1, 1]}, "box", "wrong way round"),
        ("grounding", {"image": "a", "phrase": "x", "box": [700, 5, 710, 9]}, "box", "wholly outside"),
        ("grounding", {"image": "a", "phrase": "</ref><box>", "box": [0, 0, 1, 1]}, "phrase", "control token"),
        ("grounding", {"image": "a", "phrase": ["x", ""], "box": [0, 0, 1, 1]}, "phrase[1]", "is blank"),
        ("grounding", {"image": "a", "phrase": [], "box": [0, 0, 1, 1]}, "phrase", "is empty"),
        ("grounding", {"image": "a", "phrase": {"raw": "x"}, "box": [0, 0, 1, 1]}, "phrase", "not NoneType"),
        ("caption", {"image": "a", "caption": []}, "caption", "is empty"),
        ("caption", {"image": "a", "caption": ["x", 3]}, "caption[1]", "not int"),
        ("caption", {"image": "a", "caption": {"text": "x"}}, "caption", "not dict"),
    ],
)
def test_columns_refuse(name, row, field, reason):
    with pytest.raises(BadField) as caught:
        conversations(name, row)
    assert caught.value.field == field
    assert reason in caught.value.reason


def test_an_image_whose_size_cannot_be_had_is_a_bad_row():
    def no_size(source):
        raise UserError(f"there is no file {source!r}")

    with pytest.raises(BadField, match="image: there is no file 'a'"):
        RowFormat("grounding").conversations({"image": "a", "phrase": "x", "box": [0, 0, 1, 1]}, no_size)
