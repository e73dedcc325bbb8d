"""Format `fields`: documents in rows, their fields in columns, as questions or as one JSON reply."""

import json

import pytest
from formats_for_tests import asked, conversations, one

from finetune.data.formats.document_fields import WantedFields
from finetune.data.formats.row_format import RowFormat
from finetune.data.sample import BadField, DataError
from finetune.data.samples import Samples
from finetune.recipe.sources import Source

ROW = {"image": "a.png", "no": "A-17", "date": "", "total": 12.5, "paid": True, "count": 3}


def wanted(*names, **given):
    return {"wanted": WantedFields(names, **given)}


def reply(row, *names, **given):
    return one("fields", row, **wanted(*names, reply="json", **given))[1]["content"]


def test_a_question_for_each_field_that_has_a_value():
    found = conversations("fields", ROW, **wanted("no", "date", "total", "paid", "count"))
    assert found == [
        asked("a.png", "What is the no?", "A-17"),
        asked("a.png", "What is the total?", "12.5"),
        asked("a.png", "What is the paid?", "true"),
        asked("a.png", "What is the count?", "3"),
    ]
    row_format = RowFormat("fields", **wanted("no", "date", "total", "paid", "count"))
    assert row_format.count(ROW) == 4 and row_format.counts_rows
    nulls = conversations("fields", ROW, **wanted("date", missing="write_null"))
    assert nulls == [asked("a.png", "What is the date?", "null")]


def test_one_json_reply_in_the_order_that_was_chosen():
    text = "Read these fields of the document and reply in JSON: total, date, no"
    given = '{"total": "12.5", "date": null, "no": "A-17"}'
    assert one("fields", ROW, **wanted("total", "date", "no", reply="json")) == asked("a.png", text, given)
    assert reply(ROW, "date", "no", missing="leave_out") == '{"no": "A-17"}'
    assert reply({**ROW, "no": "Zoë “1”"}, "no") == '{"no": "Zoë “1”"}'


def test_json_in_columns():
    lines = [{"item": "tea", "price": 2.5, "note": None}, {"item": "rice", "price": 5, "note": "x"}]
    expected = [{"item": "tea", "price": "2.5", "note": None}, {"item": "rice", "price": "5", "note": "x"}]
    assert json.loads(reply({"image": "a", "lines": lines}, "lines")) == {"lines": expected}
    del expected[0]["note"]
    assert json.loads(reply({"image": "a", "lines": lines}, "lines", missing="leave_out")) == {"lines": expected}
    # As text, it is JSON only where the recipe says so, and its numbers stay as written.
    row = {"image": "a", "lines": '[{"price": 12.40}]'}
    assert reply(row, "lines") == '{"lines": "[{\\"price\\": 12.40}]"}'
    assert reply(row, "lines", nested=("lines",)) == '{"lines": [{"price": "12.40"}]}'
    assert (
        conversations("fields", row, **wanted("lines", nested=("lines",)))[0][1]["content"] == '[{"price": "12.40"}]'
    )


def test_columns_have_other_names_and_several_images():
    row = {"file": ["a.png", "b.png"], "Rechnungs-Nr.": "7"}
    found = one("fields", row, columns={"image": "file", "no": "Rechnungs-Nr."}, **wanted("no"))
    assert [part.get("image") for part in found[0]["content"]] == ["a.png", "b.png", None]
    assert found[1]["content"] == "7"


def test_phrasings_are_drawn_by_the_row_and_not_by_its_values():
    phrasings = [f"{word} {{field}}" for word in ("What is", "Read", "Give")]
    given = RowFormat("fields", **wanted("no", "total", prompts=phrasings))

    def said(number, row=ROW):
        return [turns[0]["content"][1]["text"] for turns in given.conversations(row, lambda _: (1, 1), number)]

    drawn = [said(number) for number in range(60)]
    assert drawn == [said(number, {**ROW, "no": "other"}) for number in range(60)]
    assert {texts[0] for texts in drawn} == {f"{word} no" for word in ("What is", "Read", "Give")}
    assert any(texts[0].split()[0] != texts[1].split()[0] for texts in drawn)  # each field has its own draw


def test_prompts_by_field_and_for_json():
    prompts = {"total": ["How much is it?"], "no": "Number, please."}
    found = conversations("fields", ROW, **wanted("no", "total", "count", prompts=prompts))
    texts = [turns[0]["content"][1]["text"] for turns in found]
    assert texts == ["Number, please.", "How much is it?", "What is the count?"]
    found = one("fields", ROW, **wanted("no", "total", reply="json", prompts="Only {fields}, as JSON."))
    assert found[0]["content"][1]["text"] == "Only no, total, as JSON."


@pytest.mark.parametrize(
    ("row", "names", "reason"),
    [
        ({"no": "1"}, ["no"], "image: is missing"),
        ({"image": [], "no": "1"}, ["no"], "image: holds no image"),
        ({"image": "a", "no": "1"}, ["no", "totl"], "totl: is missing; the row has image, no. Name the column"),
        ({"image": "a", "no": "", "date": None}, ["no", "date"], "fields: none of no, date has a value"),
        ({"image": "a", "no": float("nan")}, ["no"], "none of no has a value"),
        ({"image": "a", "no": float("inf")}, ["no"], "no: must be text, a number, or JSON of these, not float"),
        ({"image": "a", "no": b"x"}, ["no"], "not bytes"),
        ({"image": "a", "no": {"x": {1, 2}}}, ["no"], "no.x: must be text"),
    ],
)
def test_rows_that_cannot_be_read(row, names, reason):
    with pytest.raises(BadField) as caught:
        conversations("fields", row, **wanted(*names))
    assert reason in str(caught.value)
    assert RowFormat("fields", **wanted(*names)).count(row) == 1


@pytest.mark.parametrize("text", ["tea", '{"a": 1', "{'a': 1}", "[" * 100_000, '{"a": ' * 40 + "1" + "}" * 40])
def test_json_columns_that_are_none(text):
    with pytest.raises(BadField, match=r"^x.*(is named under `nested` and is not JSON|has more than 32 levels)"):
        reply({"image": "a", "x": text}, "x", nested=("x",))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"names": ()}, "none is named"),
        ({"names": ("a", "a")}, "a is named twice"),
        ({"names": ("id",)}, "id is a role of its own"),
        ({"names": ("a",), "nested": ("b",)}, "nested: b is not among the fields"),
        ({"names": ("a",), "prompts": ["What?"]}, r"prompts: one has no {field}"),
        ({"names": ("a",), "prompts": {"b": "x"}}, "prompts: b is not among"),
        ({"names": ("a",), "prompts": []}, "prompts: one is blank"),
        ({"names": ("a",), "prompts": {"a": "x"}, "reply": "json"}, "are given by field"),
    ],
)
def test_settings_that_make_no_sense(given, reason):
    with pytest.raises(DataError, match=reason):
        WantedFields(**given)


def test_samples_of_a_spreadsheet(tmp_path):
    (tmp_path / "rows.csv").write_text("file,no,total\na.png,007,1\nb.png,,2\nc.png,9,\n")
    path, columns = str(tmp_path / "rows.csv"), {"image": "file"}
    read = Samples([Source(path=path, format="fields", columns=columns, fields=["no", "total"])])
    replies = [(sample.origin.row, sample.messages[1]["content"]) for sample in read]
    assert [text for _, text in replies] == ["007", "1", "2", "9"]
    assert [sample.messages[1]["content"] for sample in read.scan(1, 4)] == ["1", "2", "9"]
    other = Source(
        path=str(tmp_path / "rows.csv"), format="fields", columns=columns, fields=["no", "total"], reply="json"
    )
    assert len(Samples([other])) == 3 and Samples([other]).fingerprint() != read.fingerprint()
