"""JSON lists of any length, CSV and TSV: rows by their places in the file, and faults by theirs."""

import csv
import json
import pickle
import random
import tracemalloc
from hashlib import sha256

import pytest

from finetune.data.sample import BadRow, DataError
from finetune.data.sources import json_list
from finetune.data.sources.csv_rows import CsvRows
from finetune.data.sources.json_list import find_elements
from finetune.data.sources.rows import JsonRows


def elements(path):
    starts, ends, digest = find_elements(path, "a.json")
    data = path.read_bytes()
    assert digest == sha256(data).hexdigest()
    return [json.loads(data[start:end]) for start, end in zip(starts, ends, strict=True)]


VALUES = [
    *(
        None,
        True,
        False,
        0,
        -1,
        123456789,
        -1.5e-7,
        2.0e30,
        "",
        "text",
        "Ä\u2028😀",
        'quo"te',
        "back\\slash",
        "\ud800",
    ),
    *([], {}, [1, [2, [3]]], {"a": {"b": [1, 2]}, "ä": "ö" * 40}, "x" * 300, ["]", "}", ","]),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1 << 20])
def test_elements_are_found_wherever_the_file_is_cut(tmp_path, monkeypatch, size):
    """Reads of a few bytes cut numbers, escapes, and characters of several bytes at every place."""
    monkeypatch.setattr(json_list, "CHUNK", size)
    draw = random.Random(size)
    for trial in range(60):
        values = [draw.choice(VALUES) for _ in range(draw.randrange(12))]
        indent, ascii_only = draw.choice([None, 0, 2]), draw.random() < 0.5
        text = json.dumps(values, indent=indent, ensure_ascii=ascii_only or "\ud800" in values)
        data = b"\xef\xbb\xbf" * (trial % 2) + draw.choice(["", " \n"]).encode() + text.encode() + b"\n" * (trial % 3)
        (tmp_path / "a.json").write_bytes(data)
        assert elements(tmp_path / "a.json") == values


BROKEN = [
    '[\n{"a": 1},\n{"a": }\n]',
    '[\n{"a": 1}\n{"a": 2}\n]',
    '[{"a": 1},]',
    '[{"a": "x\ny"}]',
    '["\\q"]',
    '["\\u12"]',
    "[1, 2",
    "[1, tru]",
    "[1, -]",
    "[1] 2",
    '["abc',
    "",
    "   \n ",
    "[",
    "hello",
    '{"a" 1}',
    "[1,\n\n  ä]",
    '[{"ä": "ö",\n "b": 1,\n "c"}]',
]


OWN_WORDS = {
    '[\n{"a": 1}\n{"a": 2}\n]': "line 3, column 1: a comma is missing before this {",
    '[{"a": 1},]': "line 1, column 10: a comma too many before ]",
    '[{"a": 1,\n }]': "line 1, column 9: a comma too many before }",
    '[{"a": [1,\n \n]}]': "line 1, column 10: a comma too many before ]",
    '[{"a": 1},\n ,{"a": 1}]': "line 2, column 2: a comma too many",
    "[{'a': 1}]": "line 1, column 3: single quotes: JSON has double ones",
    '[\n{"a": None}]': "line 2, column 7: None is not JSON, write null",
    "[{a: 1}]": "line 1, column 3: the key a needs double quotes around it",
    '[{"a": 1} // one\n]': "line 1, column 11: a comment: JSON has none",
    "[{“a”: 1}]": "line 1, column 3: “ is a typographer's quote",
    '[{"a": "x" "b": 1}]': 'line 1, column 12: a comma is missing before this "',
    '{"a": 1}\n{"a": 2},\n{"a": 3}': "line 2, column 9: a comma between objects that are not in a list",
}
BROKEN += [text for text in OWN_WORDS if text not in BROKEN]


@pytest.mark.parametrize("size", [1, 5, 1 << 20])
@pytest.mark.parametrize("text", BROKEN)
def test_faults_are_told_as_json_tells_them(tmp_path, monkeypatch, text, size):
    monkeypatch.setattr(json_list, "CHUNK", size)
    (tmp_path / "a.json").write_text(text)
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        wanted = OWN_WORDS.get(text, f"line {error.lineno}, column {error.colno}: {error.msg}")
    with pytest.raises(DataError) as caught:
        find_elements(tmp_path / "a.json", "a.json")
    # Whether there are several objects is seen in what was read at once; it is a mebibyte.
    if text != '{"a" 1}' and not (text.startswith("{") and size < 100):
        assert wanted in str(caught.value) or (text == "" and "line 1, column 1" in str(caught.value))
    assert str(caught.value).startswith("a.json: ")


@pytest.mark.parametrize("size", [1, 4, 1 << 20])
def test_bytes_that_are_no_utf8_are_told_by_their_place(tmp_path, monkeypatch, size):
    monkeypatch.setattr(json_list, "CHUNK", size)
    for data, place in ((b'["\xc3\xa4", "\xff"]', 8), (b'\xef\xbb\xbf["\xe2\x82"]', 5), (b'["\xe2\x82', 2)):
        (tmp_path / "a.json").write_bytes(data)
        with pytest.raises(DataError, match=rf"byte {place} is not UTF-8"):
            find_elements(tmp_path / "a.json", "a.json")


def test_a_large_list_is_not_held(tmp_path):
    row = json.dumps({"messages": [{"role": "user", "content": "x" * 2000}]})
    with (tmp_path / "a.json").open("w") as file:
        file.write("[" + ",\n".join([row] * 20_000) + "]")  # 41 MB
    tracemalloc.start()
    rows = JsonRows(tmp_path / "a.json", "a.json")
    assert rows[19_999] == rows[0] == json.loads(row)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000_000
    assert len(pickle.dumps(rows)) < 20_000 * 16 + 1000


def test_a_file_that_changed_is_an_error_of_its_rows(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": 2}]')
    rows = JsonRows(tmp_path / "a.json", "a.json")
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a":')
    assert rows[0] == {"a": 1}
    with pytest.raises(BadRow, match=r"a.json, row 2, row: is not JSON"):
        rows[1]
    assert [type(row) for row in rows.scan(0, 2)] == [dict, BadRow]


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ('{"version": "1", "data": [{"a": 1}]}', 'the rows are under "data", write that list to a file of its own'),
        ('{"data": [{"a": 1}]}', "json.load(open('DIR/a.json'))['data']"),
        ('{\n"messages": [{"role": "user"}]}', "if it is one row, put [ and ] around it"),
        ('{\n"a": 1}', "must hold a list of rows, not an object"),
        ('"x"', "must hold a list of rows, not text"),
    ],
)
def test_a_list_inside_an_object(tmp_path, text, remedy):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError) as caught:
        JsonRows(tmp_path / "a.json", str(tmp_path / "a.json"))
    assert remedy.replace("DIR", str(tmp_path)) in str(caught.value)


# --- CSV -------------------------------------------------------------------------------------------------------------


def test_csv_values_are_text_as_they_stand(tmp_path):
    data = b"\xef\xbb\xbfimage,question,answers\r\n\r\na.png,\xc3\x84?,007\r\n"
    data += b'b.png,"two\nlines, and ""quotes"" \xe2\x80\xa8 \x0b",1.50\r\n\r\nc.png,,"x"'
    (tmp_path / "a.csv").write_bytes(data)
    rows = CsvRows(tmp_path / "a.csv", "a.csv")
    wanted = [
        {"image": "a.png", "question": "Ä?", "answers": "007"},
        {"image": "b.png", "question": 'two\nlines, and "quotes" \u2028 \x0b', "answers": "1.50"},
        {"image": "c.png", "question": None, "answers": "x"},
    ]
    assert list(rows) == list(rows.scan(0, 3)) == wanted
    assert rows[-1] == wanted[2]
    assert [rows.origin(index).row for index in range(3)] == [3, 4, 7]
    assert list(pickle.loads(pickle.dumps(rows))) == wanted
    assert rows.folder == tmp_path
    assert rows.fingerprint() == sha256(data).hexdigest()


def test_csv_as_pythons_reader_has_it(tmp_path):
    draw = random.Random(0)
    letters = ["a", "ö", ",", '"', "\n", "\r\n", "\t", " ", "'", ";", "\u2028"]
    for delimiter, name in ((",", "a.csv"), ("\t", "a.tsv")):
        for _ in range(60):
            records = [["".join(draw.choices(letters, k=draw.randrange(6))) for _ in range(3)] for _ in range(5)]
            with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, delimiter=delimiter).writerows([["x", "y", "z"], *records])
            rows = CsvRows(tmp_path / name, name, delimiter)
            assert [[value or "" for value in row.values()] for row in rows] == records


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "a.csv: is empty; its first line must name the columns"),
        (b"image,,x\n", "its first line must name every column, each once"),
        (b"image,image\n", "its first line must name every column, each once"),
        (b'a,b\n1,2\n3,"x" y\n', "a.csv: line 3: ',' expected after '\"'"),
        (b'a,b\n1,"2\n', "a.csv: line 2: unexpected end of data"),
        (b"a,b\n1,\xff\n", "a.csv: byte 6 is not UTF-8"),
    ],
)
def test_a_bad_csv_file_is_refused(tmp_path, data, reason):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(DataError) as caught:
        CsvRows(tmp_path / "a.csv", "a.csv")
    assert reason in str(caught.value)


def test_a_csv_row_with_other_fields_is_its_own_error(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3,4,5\n6\n7,8\n")
    first, second, third, last = CsvRows(tmp_path / "a.csv", "a.csv").scan(0, 4)
    assert (first, last) == ({"a": "1", "b": "2"}, {"a": "7", "b": "8"})
    assert str(second) == "a.csv, row 3, row: has 3 fields, and the header 2: quote a field that holds ','"
    assert str(third).startswith("a.csv, row 4, row: has 1 fields")


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.csv", "image;question;answers\na.png;What, then?;x\n", ";"),
        ("a.csv", "image;question, if any;answers\na.png;What, then, is it?;x\n", ";"),
        ("a.csv", "image,question;x\na.png,y\n", ","),
        ("a.csv", "image\tquestion\na.png\tWhat; it?\n", "\t"),
        ("a.csv", "image|question\na.png|Q\n", "|"),
        ("a.csv", 'caption\n"one, two; three"\n', ","),
        ("a.tsv", "image,question\na.png,Q\n", ","),
        ("a.txt", "image\tquestion, asked\na.png\tQ\n", "\t"),
        ("a.csv", 'image;question\na.png;"two\nlines; and, more"\n', ";"),
    ],
)
def test_what_divides_the_fields_is_found(tmp_path, name, text, found):
    (tmp_path / name).write_text(text)
    rows, told = CsvRows(tmp_path / name, name), CsvRows(tmp_path / name, name, found)
    assert list(rows) == list(told) and len(rows) == 1
    assert rows.fingerprint() == told.fingerprint()


def test_what_could_divide_the_fields_in_two_ways_is_asked_for(tmp_path):
    (tmp_path / "a.csv").write_text("a;b|c\n1;2|3\n")
    with pytest.raises(DataError, match=r"a.csv: its columns could be divided by ';', '\|'; say which"):
        CsvRows(tmp_path / "a.csv", "a.csv")
    semicolon, bar = (CsvRows(tmp_path / "a.csv", "a.csv", mark) for mark in ";|")
    assert [dict(semicolon[0]), dict(bar[0])] == [{"a": "1", "b|c": "2|3"}, {"a;b": "1;2", "c": "3"}]
    assert semicolon.fingerprint() != bar.fingerprint()


@pytest.mark.parametrize("size", [7, 1 << 20])
def test_objects_one_after_the_other_are_a_list(tmp_path, monkeypatch, size):
    monkeypatch.setattr(json_list, "CHUNK", size if size > 100 else 40)
    (tmp_path / "a.json").write_text('\n{"a":\n 1}\n\n{"a": "ä"}{"a": 3}\n')
    rows = JsonRows(tmp_path / "a.json", "a.json")
    assert list(rows) == [{"a": 1}, {"a": "ä"}, {"a": 3}]


def test_nan_is_a_missing_value(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": NaN, "b": [NaN, 1.5, -Infinity]}]')
    assert JsonRows(tmp_path / "a.json", "a.json")[0] == {"a": None, "b": [None, 1.5, float("-inf")]}
