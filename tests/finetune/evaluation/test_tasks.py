"""Tasks as data: that they fit the formats, how replies are read, what their scores are made of."""

import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest

from finetune.data.formats import caption, grounding
from finetune.data.formats.names import CONVERSATIONS
from finetune.data.formats.row_format import COLUMNS
from finetune.data.sample import Origin
from finetune.errors import UserError
from finetune.evaluation.question import Question
from finetune.evaluation.tasks import TASKS, Scores, check_prompt, custom_task, find_task, published_task
from qwenvl import ImageAccess


def question(number=0, answers=("4",), style="chat", **given):
    defaults = {"box": None, "image_size": None, "group": None, "images": (), "messages": ()}
    return Question(
        id=f"q{number}",
        origin=Origin("a.jsonl", number + 1),
        text="What?",
        answers=tuple(answers),
        access=ImageAccess(),
        style=style,
        **defaults | given,
    )


def test_every_task_fits_its_format():
    assert list(TASKS) == [task.name for task in TASKS.values()]
    for task in TASKS.values():
        assert set(task.columns) <= {*COLUMNS[task.format], "id", "group", "options"}
        for style in ("chat", "base"):
            check_prompt(task, task.prompt(style))
        assert task.is_grounding == (task.format == "grounding") == (task.box_form is not None)
        assert not task.mean_of_groups or "group" in task.columns
        assert ("options" in task.columns) == (task.metric == "multiple_choice")
        assert "<|endoftext|>" in task.stop
        assert hash(task.name) and all(field.name for field in fields(task))


def test_the_prompts_are_those_of_training_and_of_the_published_evaluation():
    assert TASKS["docvqa"].base_prompt == "{question} Answer:"
    assert TASKS["docvqa"].chat_prompt == "{question}"
    assert TASKS["refcoco"].base_prompt == "<ref>{phrase}</ref><box>"
    assert TASKS["refcoco"].chat_prompt == grounding.DEFAULT_PROMPT
    assert TASKS["flickr30k"].base_prompt == TASKS["flickr30k"].chat_prompt == caption.DEFAULT_PROMPT
    lengths = {"docvqa": 100, "chartqa": 100, "ocrvqa": 100, "textvqa": 10, "vqav2": 10, "gqa": 10, "refcoco": 28}
    assert {name: TASKS[name].max_new_tokens for name in lengths} == lengths
    assert TASKS["nocaps"].max_new_tokens == 30


@pytest.mark.parametrize(
    ("name", "meant"),
    [("refcoc", "refcoco"), ("DocVQA", "docvqa"), ("chartsqa", "chartqa"), ("refcoco_plus", "refcoco"), ("zzz", "")],
)
def test_an_unknown_task_is_told_with_the_nearest_names(name, meant):
    with pytest.raises(UserError) as caught:
        find_task(name)
    assert f"there is no task {name!r}; " in str(caught.value)
    assert "The tasks are docvqa, " in str(caught.value)
    assert (f"did you mean {meant}" in str(caught.value)) == bool(meant)


def test_names_are_known_without_the_heavy_libraries():
    heavy = ("torch", "transformers", "datasets")
    code = f"import sys, finetune.evaluation.tasks; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- replies


@pytest.mark.parametrize(
    ("reply", "chat", "base"),
    [
        (" 12.40\n", "12.40", "12.40"),
        ("12.40<|im_end|>\n<|im_start|>user", "12.40", "12.40"),
        ("12.40<|endoftext|>13", "12.40", "12.40"),
        ("It is:\n12.40", "It is:\n12.40", "It is:"),
        ("\n12 Question: who? Answer: me", "12 Question: who? Answer: me", "12"),
        ("12<img>x</img>who?", "12<img>x</img>who?", "12"),
        ("<ref>12.40</ref><box>(1,2),(3,4)</box>", "12.40", "12.40"),
        ("a < b", "a < b", "a < b"),
        ("", "", ""),
    ],
)
def test_the_answer_within_a_reply(reply, chat, base):
    task = find_task("docvqa")
    assert task.extract(reply) == chat
    assert task.extract(reply, "base") == base
    for style, answer in (("chat", chat), ("base", base)):
        assert task.extract(answer, style) == answer


def test_boxes_stay_where_they_are_the_answer():
    reply = "<ref>dog</ref><box>(1,2),(3,4)</box><|im_end|>"
    assert find_task("refcoco").extract(reply) == reply.removesuffix("<|im_end|>")
    assert find_task("flickr30k").extract(f"A {reply} runs.<|im_end|>") == "A dog"


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Yes, it is a red car.", "yes"),
        ("The man is holding a frisbee", "frisbee"),
        ("a cup of tea", "cup"),
        ("banana tree", "banana tree"),
        ("island", "island"),
        ("left!", "left"),
        ("a", "a"),
        ("", ""),
    ],
)
def test_gqa_cuts_sentences_down_to_what_they_name(reply, answer):
    task = find_task("gqa")
    assert task.extract(reply) == answer
    assert task.extract(answer) == answer
    assert find_task("ocrvqa").extract(reply) == reply


# ---- scores


def test_each_metric_scores_its_question():
    ten = ["4"] * 6 + ["5"] * 4
    assert find_task("docvqa").score(question(answers=["forty", "four"]), "fourt") == pytest.approx(0.8)
    assert find_task("chartqa").score(question(answers=["9", "4"]), "4.1") == 1.0
    assert find_task("textvqa").score(question(answers=ten), "Four.") == 1.0
    assert find_task("ocrvqa").score(question(answers=["Yes"]), "yes") == 1.0
    assert find_task("gqa").score(question(answers=["dog"]), "It is a dog.") == 1.0
    boxed = question(answers=["<box>(0,0),(500,500)</box>"], box=(0, 0, 50, 100), image_size=(100, 200))
    assert find_task("refcoco").score(boxed, "(0,0),(500,500)</box>") == 1.0
    assert find_task("refcoco").score(boxed, "nothing") == 0.0
    assert find_task("screenspot").score(boxed, "<box>(490,490),(500,500)</box>") == 1.0
    choice = question(answers=["B"], options=("dog", "cat"))
    assert find_task("multiple_choice").score(choice, "(B) cat") == 1.0


def test_a_base_models_reply_is_cut_before_it_is_scored():
    run_on = "4\nQuestion: What? Answer: 5"
    assert find_task("ocrvqa").score(question(style="base"), run_on) == 1.0
    assert find_task("ocrvqa").score(question(style="chat"), run_on) == 0.0


def test_chartqa_is_the_mean_of_its_two_halves():
    groups = ["human", "augmented", "augmented", "augmented"]
    questions = [question(number, group=group) for number, group in enumerate(groups)]
    scores = find_task("chartqa").score_all(questions, ["4", "4", "7", "7"])
    assert scores == Scores(
        "relaxed_accuracy",
        [1, 1, 0, 0],
        pytest.approx((1 + 1 / 3) / 2),
        {"augmented": pytest.approx(1 / 3), "human": 1},
    )
    assert find_task("chartqa").score_all(questions[1:], ["4", "7", "7"]).total == pytest.approx(1 / 3)


def test_groups_are_reported_and_do_not_weigh_where_the_score_is_a_plain_mean():
    boxed = {"box": (0, 0, 10, 10), "image_size": (100, 100), "answers": ["<box>(0,0),(100,100)</box>"]}
    questions = [question(number, group=group, **boxed) for number, group in enumerate(["icon", "text", "text"])]
    scores = find_task("screenspot").score_all(questions, ["(0,0),(9,9)", "", ""])
    assert (scores.total, scores.groups) == (pytest.approx(1 / 3), {"icon": 1.0, "text": 0.0})


def test_captions_are_scored_together_as_tokens():
    questions = [question(0, ["A dog runs.", "A dog is running."]), question(1, ["Two cats sleep!", "cats"])]
    scores = find_task("flickr30k").score_all(questions, ["a dog runs", "Two cats sleep."])
    assert scores.metric == "cider_d" and scores.groups == {}
    assert scores.total == pytest.approx(np.mean(scores.values)) and min(scores.values) > 1
    with pytest.raises(ValueError, match="use score_all"):
        find_task("flickr30k").score(questions[0], "a dog")


def test_what_cannot_be_scored_is_named():
    with pytest.raises(ValueError, match="q7: its answer is hidden"):
        find_task("docvqa").score(question(7, []), "4")
    with pytest.raises(ValueError, match="q1: its captions are hidden"):
        find_task("nocaps").score_all([question(0), question(1, [])], ["a", "b"])
    with pytest.raises(ValueError, match="1 replies to 2 questions"):
        find_task("docvqa").score_all([question(0), question(1)], ["4"])
    with pytest.raises(ValueError, match="no questions"):
        find_task("docvqa").score_all([], [])


def test_the_aggregate_can_be_taken_of_resampled_questions():
    task, values = find_task("chartqa"), np.array([1.0, 0.0, 1.0, 1.0])
    groups = np.array(["human", "human", "augmented", "augmented"])
    assert task.aggregate(values, groups) == 0.75
    assert task.aggregate(values[[0, 0, 2]], groups[[0, 0, 2]]) == 1.0
    assert task.aggregate(values[[1, 1]], groups[[1, 1]]) == 0.0  # a resample may miss a group
    assert task.aggregate(values[[1, 2, 3]], np.array([0, 1, 1])) == 0.5
    assert find_task("docvqa").aggregate(values) == 0.75
    with pytest.raises(ValueError, match="give the group of each question"):
        task.aggregate(values)
    with pytest.raises(ValueError, match="no questions"):
        task.aggregate(np.array([]), np.array([]))


# ---- tasks of one's own


def test_a_custom_task_has_the_published_form_unless_told_otherwise():
    task = custom_task("anls")
    assert (task.name, task.metric, task.format, task.columns) == ("custom", "anls", "vqa", {})
    assert (task.base_prompt, task.chat_prompt, task.max_new_tokens) == ("{question} Answer:", "{question}", 100)
    assert custom_task("grounding", format="grounding").base_prompt == "<ref>{phrase}</ref><box>"
    assert custom_task("grounding", format="grounding").max_new_tokens == 28
    assert custom_task("cider_d", format="caption").max_new_tokens == 30
    assert custom_task("exact_match", format="qwen_json").chat_prompt == ""
    asked = custom_task("anls", "Read: {question}", 7)
    assert (asked.base_prompt, asked.chat_prompt, asked.max_new_tokens) == ("Read: {question}", "Read: {question}", 7)
    assert custom_task("multiple_choice").metric == "multiple_choice"
    for format_name in CONVERSATIONS:
        assert custom_task("grounding", format=format_name).is_grounding


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric": "anl"}, "metric 'anl' is unknown; did you mean anls?"),
        ({"metric": "bleu"}, "The metrics are anls, relaxed_accuracy"),
        ({"metric": "anls", "format": "csv"}, "format must be one of vqa, caption, grounding, fields, messages"),
        ({"metric": "grounding"}, "metric grounding needs data of format grounding, messages"),
        ({"metric": "vqa_score", "format": "messages"}, "metric vqa_score needs data of format vqa, not messages"),
        ({"metric": "anls", "prompt": "What?"}, "must hold {question}: 'What\\?'"),
        ({"metric": "multiple_choice", "prompt": "{question}"}, "must hold {options}"),
        ({"metric": "grounding", "format": "grounding", "prompt": "Find it"}, "must hold {phrase}"),
        ({"metric": "cider_d", "format": "caption", "prompt": " "}, "must hold text"),
        ({"metric": "anls", "format": "llava", "prompt": "{question}"}, "format llava has no prompt"),
        ({"metric": "anls", "max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
    ],
)
def test_a_custom_task_that_makes_no_sense_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        custom_task(**given)


# ---- as published


def test_published_scores_are_computed_as_the_scripts_do():
    boxed = question(answers=["<box>(0,0),(999,999)</box>"], box=(0, 0, 100, 200), image_size=(100, 200), style="base")
    refcoco = published_task(find_task("refcoco"))
    assert refcoco.score(boxed, "(0,0),(999,999)</box>") == 1.0
    assert refcoco.score(boxed, "(999,999),(0,0)</box>") == 0.0 and refcoco.unread(boxed, "(999,999),(0,0)") is None
    assert find_task("refcoco").score(boxed, "(999,999),(0,0)</box>") == 1.0
    chartqa = published_task(find_task("chartqa"))
    assert (
        chartqa.score(question(answers=["53.2"]), "56")
        == 1.0
        > find_task("chartqa").score(question(answers=["53.2"]), "56")
    )
    gqa = published_task(find_task("gqa"))
    assert gqa.score(question(answers=["tree"]), "banana tree") == 1.0
    assert find_task("gqa").score(question(answers=["tree"]), "banana tree") == 0.0


def test_published_a_reply_is_taken_to_its_end_without_its_tags_alone():
    task = published_task(find_task("ocrvqa"))
    assert task.extract(" 4\nQuestion: What?", "base") == "4\nQuestion: What?"
    assert task.extract("<ref>dog</ref><box>(1,2),(3,4)</box>", "base") == "dog(1,2),(3,4)"
    assert find_task("ocrvqa").extract("<ref>dog</ref><box>(1,2),(3,4)</box>", "base") == "dog"


@pytest.mark.parametrize(
    ("name", "fewest", "most"),
    [("docvqa", 1, 100), ("textvqa", 1, 10), ("refcoco", 10, 28), ("nocaps", 8, 30), ("multiple_choice", 0, 1)],
)
def test_published_lengths(name, fewest, most):
    task = published_task(find_task(name))
    assert (task.min_new_tokens, task.max_new_tokens, task.stop) == (fewest, most, ())
    assert task.chat_prompt == task.base_prompt


# ---- replies that cannot be read


@pytest.mark.parametrize(
    ("name", "reply", "given", "why"),
    [
        ("docvqa", " <|im_end|>", {}, "are empty"),
        ("docvqa", "4", {}, None),
        ("chartqa", "four", {"answers": ["4", "5%"]}, "are no number, where the answer is one"),
        ("chartqa", "1,000", {"answers": ["1000"]}, "are no number, where the answer is one"),
        ("chartqa", "4.1", {"answers": ["4"]}, None),
        ("chartqa", "four", {"answers": ["4", "four"]}, None),
        ("refcoco", "(1,2),(3,4)</box>", {}, None),
        ("refcoco", "to the left", {}, "hold no box"),
        ("screenspot", "<box>(1,2)</box>", {}, "hold no box"),
        ("multiple_choice", "B", {"options": ("dog", "cat")}, None),
        ("multiple_choice", "答案是B", {"options": ("dog", "cat")}, None),
        ("multiple_choice", "A or B", {"options": ("dog", "cat")}, "choose none of the options, or several"),
        ("flickr30k", "A dog.", {}, None),
    ],
)
def test_why_a_reply_could_not_be_read(name, reply, given, why):
    assert find_task(name).unread(question(**given), reply) == why


# ---- questions that no reply can get right


def boxed(*box):
    return question(answers=["<box>(1,1),(9,9)</box>"], box=box, image_size=(100, 200))


@pytest.mark.parametrize(
    ("name", "questions", "told"),
    [
        (
            "textvqa",
            [question(answers=["Paris"] * 10), question(answers=["rome"] * 10)],
            "1 questions cannot be answered",
        ),
        ("textvqa", [question(answers=["rome"] * 10)], None),
        ("flickr30k", [question(answers=["A dog."])], "cider_d is 0 whatever is said"),
        ("flickr30k", [question(answers=["A dog."])] * 2, None),
        (
            "refcoco",
            [boxed(5, 5, 5, 50), boxed(90, 0, 200, 200), boxed(0, 0, 9, 9)],
            "2 questions have a gold box that no",
        ),
        ("screenspot", [boxed(5, 5, 5, 5)], None),
        ("docvqa", [question()], None),
    ],
)
def test_questions_that_no_reply_can_get_right_are_told(name, questions, told):
    notes = find_task(name).notes(questions)
    assert [told in note for note in notes] == ([] if told is None else [True])
