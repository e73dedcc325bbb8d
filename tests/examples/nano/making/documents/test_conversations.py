"""The conversations of the generator about its documents: true, in the format, of every kind."""

import re
from dataclasses import replace

import numpy as np
import pytest

from examples.nano.making.documents import phrasings
from examples.nano.making.documents.conversations import KINDS, kinds_of
from examples.nano.making.documents.families import FAMILIES
from examples.nano.making.documents.write import Plan, conversations_of, document_of
from finetune.data.formats.messages import COLUMNS, messages
from finetune.errors import UserError
from qwenvl.text.grounding import parse_grounding


def asked(family, kinds, count, per_image=3, split="train"):
    """Conversations about `count` documents of a family, those documents' own."""
    plan = Plan(split, (family,), tuple(kinds), count, per_image)
    return [found for index in range(count) for found in conversations_of(plan, index)]


def said(conversation):
    """The texts of a conversation's turns."""
    return ["".join(part.get("text", "") for part in message["content"]) for message in conversation.messages]


@pytest.mark.parametrize(("family", "kind"), [(family, kind) for family in FAMILIES for kind in kinds_of(family)])
def test_conversations_are_in_the_format(family, kind):
    made = asked(family, [kind], 6)
    assert made
    for conversation in made:
        assert conversation.kind == kind
        row = {"messages": conversation.messages, "images": ["a.png"] * len(conversation.documents)}
        (read,) = messages(row, {name: name for name in COLUMNS})
        assert [message["role"] for message in read] == ["user", "assistant"] * (2 if kind == "two_turn" else 1)
        assert len(conversation.documents) == (2 if kind == "two_images" else 1)
        assert conversation.answers == [said(conversation)[-1]]
        for message, text in zip(conversation.messages, said(conversation), strict=True):
            assert text.isascii()
            assert "{" not in text
            assert not parse_grounding(text).problems
            assert bool(message.get("grounding")) == ("<ref>" in text or "<box>" in text)


def test_of_each_kind_one_comes_before_a_second():
    plan = Plan("train", ("receipt",), tuple(KINDS), 1, per_image=8)
    for index in range(5):
        found = [conversation.kind for conversation in conversations_of(plan, index)]
        assert sorted(found) == sorted(kinds_of("receipt"))


def test_a_kind_that_a_family_does_not_have_is_refused():
    with pytest.raises(UserError, match="shapes has none of transcribe, but count"):
        asked("shapes", ["transcribe"], 1)


def test_each_field_is_asked_for_once_before_any_is_again():
    for family in ("form", "label"):  # they have fields only
        for index in range(6):
            plan = Plan("train", (family,), ("question",), 1, per_image=99)
            fields = [field for field in document_of(plan, index).fields if field.names]
            made = conversations_of(replace(plan, per_image=len(fields)), index)
            assert sorted(said(one)[-1] for one in made) == sorted(field.value for field in fields)


def test_grounding_and_reading_of_boxes_name_a_field():
    for family in FAMILIES:
        for conversation in asked(family, ["ground", "read_box"], 15):
            (document,) = conversation.documents
            question, reply = said(conversation)
            text = question if conversation.kind == "read_box" else reply
            (region,) = parse_grounding(text).regions
            box = region.to_pixels(*document.image.size)
            near = [
                field
                for field in document.fields
                if np.abs(np.subtract(field.box, (box.x1, box.y1, box.x2, box.y2))).max() < 0.2
            ]
            assert near
            if conversation.kind == "read_box":
                assert reply in {field.value for field in near}
            else:
                phrase = re.fullmatch("<ref>(?:the )?(.+)</ref>", question)[1]
                assert any(phrase in (*field.names, field.value) for field in near)


def test_questions_are_answered_with_what_is_printed():
    for family in (family for family in FAMILIES if "question" in kinds_of(family)):
        for conversation in asked(family, ["question", "two_turn"], 15):
            text = "\n".join(conversation.documents[0].lines)
            for reply in said(conversation)[1::2]:
                assert reply in text, (said(conversation), text)


def test_yes_and_no_come_about_as_often_and_are_true():
    answers = []
    for family in ("form", "label", "boarding"):  # what their fields are called holds no values
        for conversation in asked(family, ["yes_no"], 25):
            question, reply = said(conversation)
            values = [re.escape(field.value) for field in conversation.documents[0].fields]
            is_printed = re.search(rf"(^|\s)({'|'.join(values)})(\s|\?|$)", question) is not None
            assert is_printed == (reply == "Yes"), question
            answers.append(reply)
    assert 0.4 < answers.count("Yes") / len(answers) < 0.6


def test_shapes_are_counted_and_named():
    for conversation in asked("shapes", ["count", "colour", "yes_no"], 60):
        (document,) = conversation.documents
        question, reply = said(conversation)
        shapes = [field.value.split() for field in document.fields]
        words = set(re.findall("[a-z]+", question.lower()))
        words |= {word.removesuffix("es") if word == "crosses" else word.removesuffix("s") for word in words}
        fitting = [
            (colour, kind)
            for colour, kind in shapes
            if (colour in words or not words & COLOUR_WORDS) and (kind in words or not words & SHAPE_WORDS)
        ]
        match conversation.kind:
            case "count":
                assert reply == str(len(fitting)), question
            case "colour":
                assert [colour for colour, _ in fitting] == [reply]
            case "yes_no":
                assert (reply == "Yes") == bool(fitting), question


COLOUR_WORDS = {"red", "green", "blue", "yellow", "orange", "purple", "black", "pink"}
SHAPE_WORDS = {"circle", "square", "triangle", "diamond", "cross", "ring"}


def test_two_pictures_are_compared_rightly():
    compared = 0
    for conversation in asked("receipt", ["two_images"], 60, per_image=1):
        question, reply = said(conversation)
        dearer = phrasings.COMPARE_OWN["receipt", "total"]
        if question in dearer or re.search("higher (total|sum)|(total|sum) higher", question):
            totals = [
                next(field for field in document.fields if field.key == "total") for document in conversation.documents
            ]
            first = totals[0].amount > totals[1].amount
            assert reply == f"{totals[0].value} and {totals[1].value}: Picture {1 if first else 2}"
            compared += 1
        elif ": Picture" not in reply:
            number = re.search("Picture ([12])", question)
            assert any(reply in line for line in conversation.documents[int(number[1]) - 1].lines)
    assert compared >= 8


def test_facts_are_true_of_the_whole_page():
    for conversation in asked("receipt", ["fact"], 30):
        question, reply = said(conversation)
        fields = conversation.documents[0].fields
        prices = {field.label: field.amount for field in fields if field.key == "price"}
        if question.startswith("How many"):
            assert reply == str(len(prices))
        else:
            best = max if "dearest" in question or "most" in question else min
            assert prices[reply] == best(prices.values()), question
