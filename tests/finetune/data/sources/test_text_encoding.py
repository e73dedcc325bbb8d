"""Files that are not plain UTF-8: followed where they say so themselves, read as the recipe says, or refused."""

import gzip
import json
import pickle

import datasets
import pytest
from sources_for_tests import source

from finetune.data.sample import BadRow, DataError
from finetune.data.sources import text_encoding
from finetune.data.sources.sources import read_source
from finetune.errors import UserError
from finetune.recipe import RecipeError, parse_recipe

ROWS = [
    {"image": "a.png", "question": "红色的是什么？", "answers": "方块"},
    {"image": "b.png", "question": "Ä", "answers": "ö"},
]
CHINESE = ROWS[:1] * 3


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def read(path, **settings):
    return read_source(source(path, **settings))


def written(kind, rows):
    if kind == ".json":
        return json.dumps(rows, ensure_ascii=False, indent=1)
    if kind == ".jsonl":
        return "\n" + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    mark = {".csv": ",", ".tsv": "\t", ".txt": "\t"}[kind]
    return "".join(mark.join(line) + "\r\n" for line in [list(rows[0]), *(row.values() for row in rows)])


KINDS = [".json", ".jsonl", ".csv", ".tsv", ".txt"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_says_itself_is_followed(tmp_path, kind, encoding):
    (tmp_path / f"a{kind}").write_bytes(written(kind, ROWS).encode(encoding))
    rows = read(tmp_path / f"a{kind}")
    assert list(rows) == list(rows.scan(0, 2)) == list(pickle.loads(pickle.dumps(rows))) == ROWS
    assert rows.folder == tmp_path and rows.name == str(tmp_path / f"a{kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_other_encodings_are_read_as_the_recipe_says(tmp_path, kind):
    plain, other = tmp_path / f"plain{kind}", tmp_path / f"a{kind}"
    plain.write_bytes(written(kind, CHINESE).encode())
    other.write_bytes(written(kind, CHINESE).encode("gbk"))
    rows = read(other, encoding="GBK")
    assert list(rows) == CHINESE
    # The same rows in another encoding are the same data: lines and digest are those of the text.
    assert rows.fingerprint() == read(plain).fingerprint()
    assert [rows.origin(i).row for i in range(3)] == [read(plain).origin(i).row for i in range(3)]
    with pytest.raises(DataError) as caught:
        read(other)
    assert "is not UTF-8; give the file's encoding with `encoding` (gb18030 reads '红色的是什么？" in str(caught.value)


def test_a_copy_is_made_once_and_anew_where_the_file_changes(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_bytes(written(".jsonl", CHINESE).encode("gbk"))
    first = read(file, encoding="gbk")
    with monkeypatch.context() as patched:
        patched.setattr(text_encoding, "_decoded", lambda *_, **__: pytest.fail("decoded again"))
        assert list(read(file, encoding="gbk")) == list(first)
    file.write_bytes(written(".jsonl", CHINESE[:2]).encode("gbk"))
    assert list(read(file, encoding="gbk")) == CHINESE[:2]


@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_characters_that_are_cut_by_a_read(tmp_path, monkeypatch, size):
    monkeypatch.setattr(text_encoding, "_CHUNK", size)
    for encoding in ("utf-16", "gb18030", "utf-8-sig", "shift_jis"):
        rows = [{"q": "これは何？"}] * 2
        (tmp_path / "a.json").write_bytes(json.dumps(rows, ensure_ascii=False).encode(encoding))
        assert list(read(tmp_path / "a.json", encoding=encoding)) == rows
    (tmp_path / "a.json").write_bytes(b'["\xff\x30"]')
    with pytest.raises(DataError, match=r"a.json: byte 2 is not gb18030; give the encoding"):
        read(tmp_path / "a.json", encoding="gb18030")


def test_an_encoding_that_is_not_the_file_s(tmp_path):
    """What would be read as other words without an error is refused, as far as the file shows it."""
    (tmp_path / "a.csv").write_bytes(written(".csv", ROWS).encode())
    with pytest.raises(DataError, match=r"a.csv: is UTF-8, and encoding says iso8859-1, in which it would read as"):
        read(tmp_path / "a.csv", encoding="latin-1")
    (tmp_path / "a.csv").write_bytes(written(".csv", ROWS).encode("utf-16"))
    with pytest.raises(DataError, match=r"a.csv: begins as a UTF-16 file does, and encoding says cp1252"):
        read(tmp_path / "a.csv", encoding="cp1252")
    (tmp_path / "a.csv").write_bytes(b"image,question,answers\na,b,c\n")
    assert len(read(tmp_path / "a.csv", encoding="cp1252")) == 1


def test_one_bad_line_among_good_ones_is_its_own_error(tmp_path):
    lines = [json.dumps({"a": "ä"}, ensure_ascii=False).encode(encoding) for encoding in ("utf-8", "latin-1", "utf-8")]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = read(tmp_path / "a.jsonl")
    assert rows[0] == rows[2] == {"a": "ä"}
    with pytest.raises(BadRow, match=r"row 2, line: cannot be read as JSON \(byte 7 is not UTF-8\)"):
        rows[1]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_files(tmp_path, kind):
    (tmp_path / f"a{kind}.gz").write_bytes(gzip.compress(written(kind, ROWS).encode()))
    assert list(read(tmp_path / f"a{kind}.gz")) == ROWS
    packed = gzip.compress(written(kind, CHINESE).encode("gbk"))
    (tmp_path / f"b{kind}.gz").write_bytes(packed)
    assert list(read(tmp_path / f"b{kind}.gz", encoding="gbk")) == CHINESE
    (tmp_path / f"c{kind}.gz").write_bytes(packed[:-9])
    with pytest.raises(DataError, match=rf"c{kind}.gz: cannot be unpacked"):
        read(tmp_path / f"c{kind}.gz", encoding="gbk")
    assert sorted(path.suffix for path in (tmp_path / "cache" / "texts").iterdir() if path.suffix != ".lock") == [
        *(".txt", ".txt")
    ]


def test_rows_by_another_name(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS))
    assert list(read(tmp_path / "a.jsonl")) == ROWS
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row, indent=2) for row in ROWS))
    assert list(read(tmp_path / "b.jsonl")) == ROWS
    (tmp_path / "c.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert list(read(tmp_path / "c.json")) == ROWS


@pytest.mark.parametrize(("name", "key"), [("a.json", {"delimiter": ";"}), ("a.parquet", {"encoding": "gbk"})])
def test_keys_that_say_nothing_about_a_file(tmp_path, name, key):
    (tmp_path / name).write_text("[{}]")
    with pytest.raises(UserError, match=rf"{name}: {next(iter(key))} is of .* files; remove it"):
        read(tmp_path / name, **key)


def test_keys_of_a_recipe():
    text = "model: {path: x}\noutput: y\ndata: {train: {path: a.csv, format: vqa, encoding: %s, delimiter: %s}}"
    source = parse_recipe(text % ("shift_jis", "'\t'")).data.train[0]
    assert (source.encoding, source.delimiter) == ("shift_jis", "\t")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text % ("guess", "'\"'"))
    assert {problem.key for problem in caught.value.problems} == {"data.train.0.encoding", "data.train.0.delimiter"}
    with pytest.raises(RecipeError, match="base64"):
        parse_recipe(text % ("base64", ";"))
