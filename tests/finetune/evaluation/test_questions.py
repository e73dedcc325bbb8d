"""Rows as questions: what each task reads, ids, groups, hidden answers, what is wrong with rows."""

import json
import pickle

import datasets
import pytest
from questions_for_tests import CONVERSATION, ROWS, TEN, ask, source, write

from finetune.data.sample import DataError
from finetune.errors import UserError
from finetune.evaluation.questions import Questions
from finetune.evaluation.tasks import TASKS, custom_task, find_task
from qwenvl.images.images import ImageAccess, load_image


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


WANTED = {
    "docvqa": ("337", "What?", ("4", "four"), None),
    "infographicvqa": ("98313", "What?", ("4",), None),
    "chartqa": ("row 1", "What?", ("4",), "human"),
    "textvqa": ("34602", "What?", tuple(TEN), None),
    "vqav2": ("5", "What?", tuple(TEN), None),
    "ocrvqa": ("row 1.1", "Who?", ("me",), None),
    "gqa": ("201", "What?", ("4",), None),
    "refcoco": ("9.1", "dog", ("<box>(100,100),(300,405)</box>",), None),
    "refcoco+": ("9.1", "dog", ("<box>(100,100),(300,405)</box>",), None),
    "refcocog": ("9.1", "dog", ("<box>(100,100),(300,405)</box>",), None),
    "flickr30k": ("row 1", "Describe the image in English:", ("A dog.", "The dog runs."), None),
    "nocaps": ("8", "Describe the image in English:", ("A dog.",), None),
    "screenspot": ("row 1", "close", ("<box>(100,200),(500,500)</box>",), "icon"),
    "multiple_choice": ("row 1", "What?", ("B",), None),
    "fields": ("row 1", "What is the total?", ("4",), None),
}


@pytest.mark.parametrize("name", TASKS)
def test_each_task_reads_the_columns_of_its_public_data(tmp_path, name):
    questions = ask(tmp_path, name, ROWS[name])
    question = questions[0]
    assert (question.id, question.text, question.answers, question.group) == WANTED[name]
    assert str(question.origin) == f"{tmp_path / 'data.jsonl'}, row 1"
    assert list(question.images) == [str(tmp_path / "a.png")] and len(question.images) == 1
    assert load_image(question.images[0], access=question.access).size == (200, 100)
    assert questions.answered and not questions.problems
    assert len(questions) == (2 if name in ("ocrvqa", "refcoco", "refcoco+", "refcocog") else 1)


def test_the_gold_answer_itself_scores_1(tmp_path):
    for name in TASKS:
        questions = ask(tmp_path, name, ROWS[name], ROWS[name] | {"image": "b.png", "question_id": 2})
        scores = questions.task.score_all(questions, [question.answers[0] for question in questions])
        if questions.task.metric == "cider_d":
            assert scores.total == 0.0  # both images have the same captions: nothing is rare
        else:
            assert scores.values == [1.0] * len(questions)


def test_boxes_are_in_pixels_of_the_upright_image(tmp_path):
    question = ask(tmp_path, "refcoco", ROWS["refcoco"])[1]
    assert (question.id, question.text) == ("9.2", "the dog")
    assert (question.box, question.image_size) == ((20, 10, 60, 40.5), (200, 100))
    screen = ask(tmp_path, "screenspot", ROWS["screenspot"])[0]
    assert (screen.box, screen.image_size) == (pytest.approx((20, 20, 100, 50)), (200, 100))
    corners = custom_task("grounding", format="grounding")
    row = {"image": "a.png", "phrase": "dog", "box": [20, 10, 60, 40.5]}
    assert ask(tmp_path, corners, row, source_with={"box_form": "xyxy"})[0].box == (20, 10, 60, 40.5)
    with pytest.raises(DataError, match="box_form does not say which"):
        ask(tmp_path, corners, row)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("0", "A"), (1, "B"), ("b", "B"), ("C", "C"), ("three", "C"), ("2", "C"), (" A ", "A")],
)
def test_the_gold_option_is_a_number_a_letter_or_a_text(tmp_path, answer, letter):
    row = ROWS["multiple_choice"] | {"options": ["1", "2", "three"], "answer": answer}
    question = ask(tmp_path, "multiple_choice", row)[0]
    assert (question.answers, question.options) == ((letter,), ("1", "2", "three"))


@pytest.mark.parametrize(("answer", "letter"), [("(B)", "B"), ("c.", "C"), ("Ａ", "A"), ("cafe\u0301", "B")])
def test_the_gold_option_may_have_its_marks_and_any_form_of_unicode(tmp_path, answer, letter):
    row = ROWS["multiple_choice"] | {"options": ["tea", "caf\u00e9", "rice"], "answer": answer}
    assert ask(tmp_path, "multiple_choice", row)[0].answers == (letter,)


def test_a_gold_option_that_may_be_two_is_refused(tmp_path):
    row = ROWS["multiple_choice"] | {"options": ["3", "4", "5", "6"]}
    task = custom_task("multiple_choice")
    with pytest.raises(DataError, match=r"is '3', the text of one option and the number .from 0. of another: write"):
        ask(tmp_path, task, row | {"answer": "3"})
    assert ask(tmp_path, task, row | {"answer": 3})[0].answers == ("D",)
    assert ask(tmp_path, "multiple_choice", row | {"answer": "3"})[0].answers == ("D",)  # AI2D's are numbers
    assert ask(tmp_path, task, row | {"options": ["0", "1"], "answer": "1"})[0].answers == ("B",)  # both say the same
    with pytest.raises(DataError, match="the text of several options"):
        ask(tmp_path, task, row | {"options": ["a b", "a b"], "answer": "a b"})


def test_parquet_with_images_inside_stays_lazy(tmp_path):
    write(tmp_path, [])
    image = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    rows = [ROWS["docvqa"] | {"image": image, "questionId": number} for number in range(3)]
    features = datasets.Dataset.from_list(rows).features | {"image": datasets.Image()}
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(tmp_path / "d.parquet")
    questions = Questions(source(tmp_path / "d.parquet"), find_task("docvqa"))
    assert questions.ids == ["0", "1", "2"]
    read = []
    rows_type = type(questions._rows)

    class Watched(rows_type):
        def __getitem__(self, index):
            read.append(index)
            return rows_type.__getitem__(self, index)

    questions._rows.__class__ = Watched
    kept = list(questions)
    assert [question.answers for question in kept] == [("4", "four")] * 3
    assert read == []  # no image was read
    assert kept[1].images[0]["bytes"] == image["bytes"]
    assert read == [1]


def test_questions_pickle_to_loader_workers(tmp_path):
    questions = ask(tmp_path, "docvqa", ROWS["docvqa"])
    again = pickle.loads(pickle.dumps(questions))
    assert again[0].text == "What?" and list(again[0].images) == list(questions[0].images)
    assert again.fingerprint() == questions.fingerprint()
    with pytest.raises(IndexError, match="there are 1 questions, no index 1"):
        questions[1]
    assert questions[-1].id == "337"


def test_ids_are_the_datas_own_and_each_once(tmp_path):
    row = ROWS["nocaps"]
    assert ask(tmp_path, "nocaps", row, row, row | {"image_id": None}).ids == ["8", "8 (row 2)", "row 3"]
    ocr = ROWS["ocrvqa"]
    rows = ["", ocr | {"name": "x"}, ocr | {"name": "x"}]
    questions = ask(tmp_path, "ocrvqa", *rows, source_with={"columns": {"id": "name"}})
    assert questions.ids == ["x.1", "x.2", "x (row 2).1", "x (row 2).2"]
    assert ask(tmp_path, "ocrvqa", *rows).ids == ["row 2.1", "row 2.2", "row 3.1", "row 3.2"]  # lines of the file


def test_columns_and_limit_and_prompt_of_the_source(tmp_path):
    rows = [{"picture": "a.png", "q": f"Q{number}", "gold": "4", "k": "x"} for number in range(5)]
    columns = {"image": "picture", "question": "q", "answers": "gold", "group": "k"}
    given = {"columns": columns, "limit": 2, "format": "vqa"}
    questions = ask(tmp_path, "docvqa", *rows, source_with=given)
    assert [question.text for question in questions] == ["Q0", "Q1"]
    assert {question.group for question in questions} == {"x"}
    first = ask(tmp_path, "docvqa", *rows, source_with=given | {"prompt": "Read: {question}"})[0]
    assert first.messages[0]["content"][-1]["text"] == "Read: Q0" and first.text == "Q0"
    with pytest.raises(UserError, match=r"must hold \{question\}: 'Read'"):
        ask(tmp_path, "docvqa", *rows, source_with=given | {"prompt": "Read"})
    with pytest.raises(DataError, match="there is no role quesion; did you mean question"):
        ask(tmp_path, "docvqa", *rows, source_with={"columns": {"quesion": "q"}})
    with pytest.raises(DataError, match="task docvqa reads format vqa, not messages"):
        ask(tmp_path, "docvqa", *rows, source_with={"format": "messages"})


def test_what_the_fingerprint_follows(tmp_path):
    rows = [ROWS["ocrvqa"], ROWS["ocrvqa"] | {"image": "b.png"}]
    base = ask(tmp_path, "ocrvqa", *rows).fingerprint()
    assert ask(tmp_path, "ocrvqa", *rows).fingerprint() == base
    others = [
        ask(tmp_path, "ocrvqa", *rows, rows[0]),
        ask(tmp_path, "ocrvqa", *rows, source_with={"limit": 1}),
        ask(tmp_path, "ocrvqa", *rows, source_with={"prompt": "{question}?"}),
        ask(tmp_path, "ocrvqa", *rows, style="base"),
        ask(tmp_path, "ocrvqa", *rows, style="base", shots=1),
        ask(tmp_path, "ocrvqa", *rows, grounding=True),
    ]
    assert len({base, *(other.fingerprint() for other in others)}) == 7


# ---- hidden answers


@pytest.mark.parametrize("hidden", [None, [], [""], ["", " "]])
def test_a_split_whose_answers_are_hidden_is_known(tmp_path, hidden):
    questions = ask(tmp_path, "docvqa", ROWS["docvqa"] | {"answers": hidden})
    assert not questions.answered
    assert questions[0].answers == ()
    with pytest.raises(ValueError, match="337: its answer is hidden"):
        questions.task.score_all(questions, ["4"])


@pytest.mark.parametrize("name", ["refcoco", "flickr30k", "multiple_choice", "ocrvqa"])
def test_every_kind_of_answer_may_be_hidden(tmp_path, name):
    role = {"refcoco": "bbox", "flickr30k": "caption", "multiple_choice": "answer", "ocrvqa": "answers"}[name]
    questions = ask(tmp_path, name, ROWS[name] | {role: None})
    assert not questions.answered and not questions[0].answers and questions[0].box is None


def test_answers_that_are_hidden_here_and_there_are_an_error(tmp_path):
    rows = [ROWS["docvqa"] | {"answers": None if number in (1, 3) else ["4"]} for number in range(5)]
    with pytest.raises(DataError, match="the answers of 2 rows are hidden") as caught:
        ask(tmp_path, "docvqa", *rows)
    assert [problem.origin.row for problem in caught.value.problems] == [2, 4]
    questions = ask(tmp_path, "docvqa", *rows, on_bad_row="skip")
    assert questions.answered and questions.ids == ["337", "337 (row 3)", "337 (row 5)"]
    assert [question.origin.row for question in questions] == [1, 3, 5]
    assert [str(problem).split(", ", 1)[1] for problem in questions.problems] == [
        "row 2, answers: are hidden",
        "row 4, answers: are hidden",
    ]


# ---- bad rows


def bad(name, **change):
    row = {**ROWS[name], **change}
    return name, {key: value for key, value in row.items() if value is not ...}


@pytest.mark.parametrize(
    ("task_and_row", "place", "reason"),
    [
        (bad("docvqa", answers=...), "answers", "is missing; the row has questionId, question, docId, image"),
        (bad("docvqa", question=...), "question", "is missing; the row has questionId, answers"),
        (bad("docvqa", image=...), "image", "is missing"),
        (bad("docvqa", image=[]), "image", "holds no image"),
        (bad("docvqa", image="../x.png"), "images[0]", "there is no file"),
        (bad("docvqa", image="none.png"), "images[0]", "none.png'"),
        (bad("docvqa", image="http://x.org/a.png"), "images[0]", "is a URL"),
        (bad("docvqa", answers=["4", 4]), "answers[1]", "must be text, not int"),
        (bad("docvqa", answers="['4', 'four']"), "answers", "is a list written as text"),
        (bad("docvqa", question='["Which?"]'), "question", "is a list written as text"),
        (bad("docvqa", questionId=1.5), "questionId", "must be text or a whole number, not float"),
        (bad("chartqa", human_or_machine=...), "human_or_machine", "is missing"),
        (bad("textvqa", answers=["4", "4", "4"]), "answers", "compares with those of at least 4 people"),
        (bad("ocrvqa", answers=["me"]), "answers", "must be a list of 2, one for each question, not a list of 1"),
        (bad("ocrvqa", questions=[]), "questions", "must be text or a list of texts, not a list of 0"),
        (bad("ocrvqa", questions=["Who?", " "]), "questions[1]", "is blank"),
        (bad("refcoco", bbox=[1, 2, 3]), "bbox", "must be a list of 4 numbers"),
        (bad("refcoco", bbox=[900, 2, 3, 4]), "bbox", "wholly outside the image"),
        (bad("refcoco", bbox=[1, 2, -3, 4]), "bbox", "negative size"),
        (bad("refcoco", answer=["<box>"]), "answer[0]", "control token"),
        (bad("screenspot", bbox=[10, 20, 100, 50]), "bbox", "are not fractions of the image"),
        (bad("flickr30k", caption=...), "caption", "is missing"),
        (bad("multiple_choice", options=["one"]), "options", "must be a list of 2 to 26 texts"),
        (bad("multiple_choice", answer="2"), "answer", "must be a number from 0 to 1, a letter or an option's text"),
        (bad("multiple_choice", answer="cat"), "answer", "must be a number from 0 to 1"),
    ],
)
def test_a_bad_row_is_told_by_file_row_and_field(tmp_path, task_and_row, place, reason):
    name, row = task_and_row
    with pytest.raises(DataError) as caught:
        ask(tmp_path, name, ROWS[name], row)
    [problem] = caught.value.problems
    assert (problem.origin.row, problem.field) == (2, place)
    assert reason in problem.reason
    assert f"of 2 rows, 1 cannot be asked as task {name}" in str(caught.value)


def test_bad_rows_are_told_together_or_left_out_and_listed(tmp_path):
    rows = [ROWS["docvqa"], "no JSON", ROWS["docvqa"] | {"image": "x.png"}, ROWS["docvqa"] | {"questionId": 8}]
    with pytest.raises(DataError, match="of 4 rows, 2 cannot be asked") as caught:
        ask(tmp_path, "docvqa", *rows)
    assert [problem.origin.row for problem in caught.value.problems] == [2, 3]
    questions = ask(tmp_path, "docvqa", *rows, on_bad_row="skip")
    assert questions.ids == ["337", "8"]
    assert [problem.origin.row for problem in questions.problems] == [2, 3]
    with pytest.raises(DataError, match="none of the 1 rows can be asked"):
        ask(tmp_path, "docvqa", rows[2], on_bad_row="skip")
    with pytest.raises(DataError, match="holds no rows"):
        ask(tmp_path, "docvqa")


def test_images_stay_within_their_root(tmp_path):
    folder = tmp_path / "inner"
    row = ROWS["docvqa"] | {"image": "../a.png"}
    write(tmp_path, [])
    with pytest.raises(DataError, match="lies outside"):
        ask(folder, "docvqa", row)
    beside = ROWS["docvqa"] | {"image": "a.png"}
    path = write(folder / "sub", [beside], "d.jsonl")
    for given in ({"images_root": folder / "sub"}, {"access": ImageAccess(root=folder / "sub")}):
        question = Questions(source(path), find_task("docvqa"), **given)[0]
        assert question.access.root == folder / "sub" and question.images[0] == str(folder / "sub" / "a.png")


# ---- data of one's own


def test_a_conversation_is_asked_up_to_its_last_reply(tmp_path):
    task = custom_task("anls", format="messages")
    question = ask(tmp_path, task, CONVERSATION)[0]
    assert (question.text, question.answers) == ("And the total?", ("12.40",))
    assert [message["role"] for message in question.messages] == ["user", "assistant", "user"]
    assert list(question.images) == [str(tmp_path / "a.png")]
    assert task.score(question, "12.4") == pytest.approx(0.8)
    only_asked = {"messages": CONVERSATION["messages"][:3], "images": ["a.png"]}
    with pytest.raises(DataError, match="messages: does not end with an assistant's reply"):
        ask(tmp_path, task, only_asked)
    with pytest.raises(DataError, match="messages: asks nothing before its last reply"):
        ask(tmp_path, task, {"messages": CONVERSATION["messages"][1:2]})


def test_the_published_and_the_llava_format_are_asked_too(tmp_path):
    said = [{"from": "user", "value": "Picture 1: <img>a.png</img>\nWhat?"}, {"from": "assistant", "value": "4"}]
    question = ask(tmp_path, custom_task("exact_match", format="qwen_json"), {"conversations": said})[0]
    assert question.text == "Picture 1: \nWhat?" and question.answers == ("4",)
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "4"}]
    row = {"image": "a.png", "talk": said}
    llava = custom_task("exact_match", format="llava")
    question = ask(tmp_path, llava, row, source_with={"columns": {"conversations": "talk"}})[0]
    assert question.text == "What?" and list(question.images) == [str(tmp_path / "a.png")]


def test_a_gold_reply_with_a_box_is_a_gold_box(tmp_path):
    task = custom_task("grounding", format="qwen_json")
    asked = {"from": "user", "value": "Picture 1: <img>a.png</img>\nWhere?"}
    reply = {"from": "assistant", "value": "<ref>dog</ref><box>(100,100),(300,400)</box>"}
    question = ask(tmp_path, task, {"conversations": [asked, reply]})[0]
    assert (question.box, question.image_size) == (pytest.approx((20, 10, 60, 40)), (200, 100))
    assert task.score(question, "<box>(100,100),(300,390)</box>") == 1.0
    no_box = {"conversations": [asked, {"from": "assistant", "value": "there"}]}
    with pytest.raises(DataError, match="its last reply holds no box: 'there'"):
        ask(tmp_path, task, no_box)


def conversation(answer):
    said = [{"from": "user", "value": "Picture 1: <img>a.png</img>\nWhat?"}, {"from": "assistant", "value": answer}]
    return {"conversations": said}


def test_a_gold_reply_is_compared_without_its_boxes_as_replies_are(tmp_path):
    task = custom_task("exact_match", format="qwen_json")
    reply = "<ref>the dog</ref><box>(1,2),(3,4)</box> sleeps"
    question = ask(tmp_path, task, conversation(reply))[0]
    assert question.answers == ("the dog sleeps",)
    assert task.score(question, reply) == task.score(question, "The dog sleeps") == 1.0
    with pytest.raises(
        DataError, match="holds nothing but boxes, and exact_match compares texts: use metric grounding"
    ):
        ask(tmp_path, task, conversation("<box>(1,2),(3,4)</box>"))
    with pytest.raises(DataError, match="is blank"):
        ask(tmp_path, task, conversation(" "))


def test_a_blank_answer_among_others_makes_no_empty_reply_right(tmp_path):
    question = ask(tmp_path, "docvqa", ROWS["docvqa"] | {"answers": ["", "4"]})[0]
    assert question.answers == ("4",) and find_task("docvqa").score(question, "") == 0.0
    assert len(ask(tmp_path, "textvqa", ROWS["textvqa"] | {"answers": [""] * 3 + ["4"] * 7})[0].answers) == 10


def test_rows_are_read_anew_and_a_change_is_told(tmp_path):
    questions = ask(tmp_path, "ocrvqa", ROWS["ocrvqa"])
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(ROWS["ocrvqa"] | {"questions": ["Who?"], "answers": ["me"]}) + "\n")
    with pytest.raises(ValueError, match="row 1, row: has fewer questions than it had"):
        questions[1]
