"""Workbooks, WebDataset tars, Parquet with paths, and several files by a pattern."""

import csv
import datetime
import gzip
import io
import json
import tarfile
import zipfile

import datasets
import openpyxl
import pytest
from PIL import Image
from sources_for_tests import source

from finetune.data.sample import UNKNOWN_TEXT, DataError
from finetune.data.samples import Samples
from finetune.data.sources import csv_rows
from finetune.data.sources.sources import read_source
from finetune.errors import MissingFileError, UserError
from finetune.recipe.sources import Source


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def read(path, **settings):
    return read_source(source(path, **settings))


# --- workbooks -------------------------------------------------------------------------------------------------------


def workbook(path, *rows, formats=(), sheets=("Sheet",)):
    """A workbook with these rows in each of the sheets; formats by cell."""
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title in sheets:
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
        for cell, form in dict(formats).items():
            sheet[cell].number_format = form
    book.save(path)
    return path


def test_a_sheet_s_cells_are_what_it_shows(tmp_path):
    rows = [["image", "question", "answers"], ["a.png", "Ä?", "007"], [None], ["b.png", "Q", 12.5], ["c.png", None, 7]]
    rows += [["d.png", "Q", number] for number in (0.125, 1234.5, 0.075, True, 0.1 + 0.2)]
    rows += [["e.png", "Q", datetime.datetime(2024, 5, 4)]]
    formats = {"C4": "0.00", "C6": "0.00", "C7": "#,##0.00", "C8": "0.0%", "C11": "yyyy-mm-dd"}
    found = read(workbook(tmp_path / "a.xlsx", *rows, formats=formats))
    answers = ["007", "12.50", "7", "0.13", "1,234.50", "7.5%", "TRUE", "0.3", "2024-05-04"]
    assert [row["answers"] for row in found] == answers
    assert found[0] == {"image": "a.png", "question": "Ä?", "answers": "007"} and found[2]["question"] is None
    assert [found.origin(number).row for number in range(3)] == [2, 4, 5]
    assert found.folder == tmp_path


@pytest.mark.parametrize("form", ['"$"#,##0.00', "[Red]0", "0.00E+00", "# ?/?"])
def test_a_cell_that_shows_something_else_is_not_text(tmp_path, form):
    file = workbook(tmp_path / "a.xlsx", ["image", "question", "answers"], ["a.png", "Q", 12.4], formats={"C2": form})
    samples = Samples([Source(path=str(file), format="vqa")])
    with pytest.raises(
        UserError, match=r"row 2, answers: the sheet shows this cell in a way that is not known here \(C2"
    ):
        samples[0]
    file = workbook(tmp_path / "b.xlsx", ["caption"], [datetime.datetime(2024, 5, 4)], formats={"A2": "d-mmm-yy"})
    assert read(file)[0] == {"caption": {UNKNOWN_TEXT: "A2, number format d-mmm-yy, value 2024-05-04 00:00:00"}}


@pytest.mark.parametrize("reply", ["json", "value"])
def test_fields_of_a_document_are_what_the_sheet_shows_or_refused(tmp_path, reply):
    day = datetime.datetime(2024, 5, 4)
    rows = [["image", "when", "sum"], ["a.png", day, 12.4], ["b.png", day, 12], ["c.png", "4 May", 1e-9]]
    formats = {"B2": "dd.mm.yyyy", "C2": "0.00", "B3": "yyyy-mm-dd", "C3": '"$"#,##0.00'}
    file = workbook(tmp_path / "a.xlsx", *rows, formats=formats)
    samples = Samples([Source(path=str(file), format="fields", fields=["when", "sum"], reply=reply)])
    assert [f"{problem.origin.row} {problem.field}" for problem in samples.scan(0, len(samples))] == [
        "2 when",
        "3 sum",
        "4 sum",
    ]


def test_sheets(tmp_path):
    file = workbook(tmp_path / "a.xlsx", ["a"], ["x"], sheets=("One", "Two"))
    with pytest.raises(DataError, match=r"a.xlsx: has the sheets One, Two; say which one with `split`"):
        read(file)
    with pytest.raises(DataError, match=r"a.xlsx: has no sheet 'Three' \(split\) but One, Two"):
        read(file, split="Three")
    assert list(read(file, split="Two")) == [{"a": "x"}]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "is empty; its first row must name the columns"),
        ([["a", "a"], ["x", "y"]], "its first row must name every column, each once"),
        ([["a", None, "b"], ["x", "y", "z"]], "cell B2 is in a column without a name"),
        ([["a"], ["x", "y"]], "cell B2 is in a column without a name"),
        ([["a"], ["=1+1"]], "cell A2 holds a formula without its result"),
        ([["a"], ["#N/A"]], "cell A2 holds the error #N/A"),
    ],
)
def test_a_bad_sheet_is_refused(tmp_path, rows, reason):
    with pytest.raises(DataError) as caught:
        read(workbook(tmp_path / "a.xlsx", *rows))
    assert reason in str(caught.value)


def test_no_workbook(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"a.xlsx: cannot be read as an Excel workbook"):
        read(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match=r"encoding is of text files"):
        read(tmp_path / "a.xlsx", encoding="gbk")


# --- tars ------------------------------------------------------------------------------------------------------------


def png(color):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_webdataset_tars(tmp_path):
    for shard in range(2):
        members = []
        for number in range(3):
            told = {"question": f"Q{shard}{number}?", "answers": ["a", "b"], "image": "elsewhere.png"}
            members += [(f"{number:03}.png", png("red")), (f"{number:03}.json", json.dumps(told).encode())]
        tar(tmp_path / f"s{shard}.tar", members)
    rows = read(tmp_path / "s*.tar")
    assert [row["question"] for row in rows] == [f"Q{shard}{number}?" for shard in (0, 1) for number in range(3)]
    assert rows[0]["image"]["bytes"] == png("red") and rows[0]["id"] == "000"
    samples = Samples([Source(path=str(tmp_path / "s0.tar"), format="vqa")])
    assert len(samples) == 3 and samples[1].messages[1]["content"] == "a"
    assert read(tmp_path / "s0.tar").fingerprint() != rows.fingerprint()


def test_captions_and_several_images_of_a_tar(tmp_path):
    members = [("a.1.png", png("red")), ("a.2.png", png("blue")), ("a.txt", "Zwei Bilder ä.".encode())]
    (row,) = read(tar(tmp_path / "a.tar", members))
    assert row["txt"] == "Zwei Bilder ä." and [image["bytes"] for image in row["images"]] == [png("red"), png("blue")]


def test_a_tar_whose_rows_differ_is_refused(tmp_path):
    members = [(f"{number}.{ending}", png("red")) for number, ending in enumerate(["png"] * 6 + ["webp"])]
    with pytest.raises(DataError, match=r"6.webp has an ending that the first rows have not \(png\)"):
        read(tar(tmp_path / "a.tar", members))
    (tmp_path / "b.tar").write_bytes(b"no tar")
    with pytest.raises(DataError, match=r"b.tar: cannot be read as a WebDataset"):
        read(tmp_path / "b.tar")


# --- Parquet with paths, patterns ------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet_with_relative_image_paths(tmp_path, as_struct):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png("red"))
    image = {"bytes": None, "path": "a.png"} if as_struct else "a.png"
    rows = datasets.Dataset.from_dict({"image": [image], "caption": ["red"]})
    rows.to_parquet(tmp_path / "data" / "rows.parquet")
    for path in ("data/rows.parquet", "data/*.parquet", "data"):
        (sample,) = Samples([Source(path=str(tmp_path / path), format="caption")])
        assert sample.messages[0]["content"][0]["image"] == str(tmp_path / "data" / "a.png")


def test_files_by_a_pattern(tmp_path):
    for number, rows in enumerate((2, 0, 3)):
        text = "".join(json.dumps({"image": "a.png", "caption": f"{number}{row}"}) + "\n" for row in range(rows))
        (tmp_path / f"part-{number}.jsonl").write_text(text)
    (tmp_path / "part-9.csv").write_text("image,caption\na.png,90\n")
    rows = read(tmp_path / "part-*")
    assert [row["caption"] for row in rows] == ["00", "01", "20", "21", "22", "90"]
    assert [row["caption"] for row in rows.scan(1, 5)] == ["01", "20", "21", "22"]
    assert str(rows.origin(3)) == f"{tmp_path}/part-2.jsonl, row 2" and rows[-1]["caption"] == "90"
    assert rows.folder == tmp_path
    alone = read(tmp_path / "part-?.jsonl")
    assert len(alone) == 5 and alone.fingerprint() != rows.fingerprint()
    with pytest.raises(MissingFileError, match=r"no file is named like .*/none-\*"):
        read(tmp_path / "none-*")


def test_folders_by_a_pattern(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "x" / name).mkdir(parents=True)
        (tmp_path / "x" / name / "rows.jsonl").write_text(f'{{"image": "{name}/1.png", "caption": "{name}"}}\n')
    rows = read(tmp_path / "x" / "*" / "rows.jsonl")
    assert [row["caption"] for row in rows] == ["a", "b"] and rows.folder == tmp_path / "x"
    assert len(read(tmp_path / "**" / "rows.jsonl")) == 2
    (tmp_path / "odd[1].jsonl").write_text('{"caption": "x"}\n')
    assert len(read(tmp_path / "odd[1].jsonl")) == 1  # what is there is no pattern


# --- what reads as something else ------------------------------------------------------------------------------------


def test_merged_cells_are_refused(tmp_path):
    """Of a merged area only the first cell has a value: the rows below would have none."""
    rows = [["image", "question", "answers"], ["a.png", "Q", "1"], [None, "R", "2"]]
    file = workbook(tmp_path / "a.xlsx", *rows)
    for area, refused in (("A2:A3", True), ("A1:B1", True), ("E1:F2", False)):
        book = openpyxl.load_workbook(file)
        book.active.merge_cells(area)
        book.save(tmp_path / "b.xlsx")
        if refused:
            with pytest.raises(DataError, match=f"b.xlsx: the cells {area} are one.*unmerge them and fill each"):
                read(tmp_path / "b.xlsx")
        else:
            assert len(read(tmp_path / "b.xlsx")) == 2


def test_numbers_of_a_sheet_keep_their_zeros(tmp_path):
    numbers = [7, 7, 1.0, 1.0, -7, 1234567, 7.5]
    formats = ["000", "General", "General", "0.0", "0000", "#,##0", "00.00"]
    cells = {f"A{row}": form for row, form in enumerate(formats, start=2)}
    found = read(workbook(tmp_path / "a.xlsx", ["answers"], *([number] for number in numbers), formats=cells))
    assert [row["answers"] for row in found] == ["007", "7", "1", "1.0", "-0007", "1,234,567", "07.50"]


def test_what_macos_puts_into_tars_and_folders_is_no_row(tmp_path):
    members = [("._000.png", b"\0\5\26\7"), ("000.png", png("red")), ("._000.json", b"\0")]
    members += [("000.json", b'{"caption": "x"}')]
    members += [(".DS_Store", b"x"), ("001.png", png("blue")), ("001.json", b'{"caption": "y"}')]
    rows = read(tar(tmp_path / "a.tar", members))
    assert [row["caption"] for row in rows] == ["x", "y"]
    for name in ("a.jsonl", "._a.jsonl", ".b.jsonl"):
        (tmp_path / name).write_text('{"caption": "x"}\n' if name == "a.jsonl" else "\0")
    for pattern in ("*.jsonl", "**/*.jsonl"):
        assert [row["caption"] for row in read(tmp_path / pattern)] == ["x"]


def test_a_pattern_of_files_that_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "caption": "x"}\n')
    (tmp_path / "a.png").write_bytes(png("red"))
    with pytest.raises(DataError, match=r"a.png"):
        read(tmp_path / "*")
    (tmp_path / "b.csv").write_text("image,caption\na.png,y\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"image": "a.png", "caption": "z"}\n'))
    datasets.Dataset.from_dict({"image": ["a.png"], "caption": ["p"]}).to_parquet(tmp_path / "d.parquet")
    samples = Samples([Source(path=str(tmp_path / "[a-d].[cjp]*[lvzt]"), format="caption")])
    assert [sample.messages[1]["content"] for sample in samples] == ["x", "y", "z", "p"]
    assert {sample.messages[0]["content"][0]["image"] for sample in samples} == {str(tmp_path / "a.png")}


def without(row_format, file, **settings):
    """Why the only row of a file is refused."""
    (bad,) = Samples([Source(path=str(file), format=row_format, **settings)]).scan(0, 1)
    return str(bad)


@pytest.mark.parametrize("kind", ["csv", "xlsx", "parquet", "jsonl"])
def test_an_empty_cell_is_no_missing_column(tmp_path, kind):
    """Which of the two it is tells what to mend: the row, or the recipe's columns."""
    said = []
    for number, row in enumerate(({"image": "a.png", "caption": None}, {"image": "a.png", "text": "x"})):
        file = tmp_path / f"{number}.{kind}"
        if kind == "csv":
            file.write_text("\n".join([",".join(row), ",".join(value or "" for value in row.values())]) + "\n")
        elif kind == "xlsx":
            workbook(file, [*row], [*row.values()])
        elif kind == "parquet":
            schema = datasets.Features({name: datasets.Value("string") for name in row})
            datasets.Dataset.from_list([row], features=schema).to_parquet(file)
        else:
            file.write_text(json.dumps(row) + "\n")
        said.append(without("caption", file))
    assert said[0].endswith("caption: is empty in this row")
    assert said[1].endswith("caption: is missing; the row has image, text. Name the column under `columns`")


def test_long_fields_of_csv(tmp_path, monkeypatch):
    long = "x" * 200_000
    for name, data in (("a.csv", f'caption\n"{long}"\n'), ("b.csv.gz", f"caption,b\n{long},1\n")):
        (tmp_path / name).write_bytes(gzip.compress(data.encode()) if name.endswith("gz") else data.encode())
        assert read(tmp_path / name)[0]["caption"] == long
    csv.field_size_limit(1000)
    try:
        with pytest.raises(DataError, match=r"a.csv: line 2: a field has more than 64 MiB; is its quote closed\?"):
            read(tmp_path / "a.csv")
    finally:
        csv.field_size_limit(csv_rows._LONGEST_FIELD)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_packed_files_have_images_beside_them(tmp_path, kind):
    text = {"csv": "image,caption\na.png,x\n", "jsonl": '{"image": "a.png", "caption": "x"}\n'}
    text["json"] = f"[{text['jsonl']}]"
    (tmp_path / f"rows.{kind}.gz").write_bytes(gzip.compress(text[kind].encode()))
    (sample,) = Samples([Source(path=str(tmp_path / f"rows.{kind}.gz"), format="caption")])
    assert sample.messages[0]["content"][0]["image"] == str(tmp_path / "a.png")


# --- files that swell ------------------------------------------------------------------------------------------------


def test_a_packed_file_that_unpacks_to_far_more_than_data_does(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.data.sources.text_encoding._UNPACKED", 1 << 21)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"a": "' + b"x" * (1 << 24) + b'"}\n'))
    with pytest.raises(DataError, match=r"rows.jsonl.gz: unpacks to more than 200 times its [0-9,]+ bytes"):
        read(tmp_path / "rows.jsonl.gz")
    assert not [path for path in (tmp_path / "cache" / "texts").iterdir() if path.suffix == ".txt"]


def test_a_workbook_that_unpacks_to_far_more_than_data_does(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.data.sources.text_encoding._UNPACKED", 1 << 21)
    workbook(tmp_path / "rows.xlsx", ["a"], ["b"])
    with zipfile.ZipFile(tmp_path / "rows.xlsx", "a", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("xl/more.xml", b" " * (1 << 24))
    monkeypatch.setattr(openpyxl, "load_workbook", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(DataError, match=r"rows.xlsx: unpacks to more than 200 times"):
        read(tmp_path / "rows.xlsx")


def test_a_workbook_with_a_row_that_excel_cannot_have(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.data.sources.workbook._MOST_ROWS", 1000)
    workbook(tmp_path / "rows.xlsx", ["a"], ["b"])
    with zipfile.ZipFile(tmp_path / "rows.xlsx") as packed:
        parts = {name: packed.read(name) for name in packed.namelist()}
    with zipfile.ZipFile(tmp_path / "far.xlsx", "w") as packed:
        for name, data in parts.items():
            packed.writestr(name, data.replace(b'<row r="2"', b'<row r="99999999"'))
    with pytest.raises(DataError, match=r"far.xlsx: has a row beyond 1,000, the last one that Excel has"):
        read(tmp_path / "far.xlsx")
