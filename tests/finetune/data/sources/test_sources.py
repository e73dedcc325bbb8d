"""Every kind of storage gives the same rows, with their origins, and says what is wrong with it."""

import json
import os
import pickle
import tracemalloc
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pytest

from finetune.data.sample import BadRow, DataError
from finetune.data.sources.arrow_rows import ArrowRows
from finetune.data.sources.rows import JsonLinesRows, JsonRows
from finetune.data.sources.sources import read_source
from finetune.errors import MissingFileError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def read(path, **settings):
    given = {"config": None, "split": None, "format": "vqa", "columns": {}, "prompt": None, "box_form": None}
    return read_source(
        SimpleNamespace(
            path=str(path),
            weight=1.0,
            limit=None,
            **{"streaming": False, "encoding": None, "delimiter": None, "part": None, "annotations": None}
            | given
            | settings,
        )
    )


ROWS = [{"image": f"{number}.png", "question": f"Ä {number}?", "answers": ["a", "b"]} for number in range(5)]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]


# --- text files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "lines"),
    [
        ("a.json", json.dumps(ROWS).encode(), [1, 2, 3, 4, 5]),
        ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode(), [1, 2, 3, 4, 5]),
        ("a.json", b"\n".join(LINES), [1, 2, 3, 4, 5]),
        ("a.jsonl", b"\n".join(LINES), [1, 2, 3, 4, 5]),
        ("a.jsonl", b"\n".join(LINES) + b"\n", [1, 2, 3, 4, 5]),
        ("a.jsonl", b"\r\n".join(LINES) + b"\r\n", [1, 2, 3, 4, 5]),
        ("a.jsonl", b"\xef\xbb\xbf" + b"\n".join(LINES), [1, 2, 3, 4, 5]),
        ("a.jsonl", b"\xef\xbb\xbf\n" + b"\n \t\n".join(LINES) + b"\n\n", [2, 4, 6, 8, 10]),
        ("a.ndjson", b"\r\n\r\n" + b"\r\n".join(LINES), [3, 4, 5, 6, 7]),
    ],
)
def test_json_and_json_lines(tmp_path, name, data, lines):
    (tmp_path / name).write_bytes(data)
    rows = read(tmp_path / name)
    assert list(rows) == ROWS
    assert list(rows.scan(1, 4)) == ROWS[1:4]
    assert rows[3] == ROWS[3]
    assert [rows.origin(index).row for index in range(5)] == lines
    assert str(rows.origin(2)) == f"{tmp_path / name}, row {lines[2]}"
    assert rows.folder == tmp_path
    assert list(pickle.loads(pickle.dumps(rows))) == ROWS


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        (b'{"image": "a.png",', "line", "is not JSON (column "),
        (b"{'image': 1}", "line", "is not JSON (column 2: "),
        (b"[1, 2]", "row", "must be an object of columns, not a list"),
        (b'"text"', "row", "not text"),
        (b"null", "row", "not null"),
        (b"3.5", "row", "not a number"),
        (b'{"a": "\xff"}', "line", "byte 7 is not UTF-8"),
        (b'{"image": "a.png", "image": "b.png"}', "image", "stands twice in one object of the row"),
        (b'{"turns": [{"from": "a", "value": 1, "value": 2}]}', "value", "stands twice in one object of the row"),
        (b"[" * 200_000, "line", "cannot be read as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line", "cannot be read as JSON"),
    ],
)
def test_a_bad_line_is_an_error_of_its_own_row(tmp_path, line, field, reason):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([LINES[0], b"", line, LINES[1]]))
    rows = read(tmp_path / "a.jsonl")
    with pytest.raises(BadRow) as caught:
        rows[1]
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}, row 3, {field}: ")
    assert reason in caught.value.reason
    first, bad, last = rows.scan(0, 3)
    assert (first, last) == (ROWS[0], ROWS[1])
    assert bad.args == caught.value.args


def test_a_list_may_hold_what_is_no_row(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, 3]')
    rows = read(tmp_path / "a.json")
    assert rows[0] == {"a": 1}
    with pytest.raises(BadRow, match=r"a.json, row 2, row: must be an object of columns, not a number"):
        rows[1]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.json", b'{\n"data": []\n}', "must hold a list of rows, not an object"),
        ("a.json", b"[\n1,\n2", "not JSON (line 3, column 2"),
        ("a.json", b"", "not JSON (line 1"),
        ("a.json", b"[\xff]", "byte 1 is not UTF-8"),
        ("a.json", b"[" * 200_000, "cannot be read as JSON (it is nested too deeply)"),
        ("a.xlsx", b"PK", "cannot be read as an Excel workbook"),
        ("a.xls", b"", "files of kind .xls are not read"),
        ("a", b"", "files of kind (none) are not read"),
        ("a.parquet", b"PAR1", "cannot be read as Parquet"),
    ],
)
def test_a_bad_file_is_refused_as_a_whole(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["gone.json", "data/gone.parquet", "/gone", "../gone", "C:\\gone"])
def test_a_file_that_is_not_there(name):
    with pytest.raises(MissingFileError, match="there is no file"):
        read(name)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="is a device, pipe or socket"):
        read(tmp_path / "a.jsonl")


def test_of_json_lines_only_the_places_are_kept(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([b'{"text": "' + b"x" * 1000 + b'"}'] * 1000))
    assert len(pickle.dumps(read(tmp_path / "a.jsonl"))) < 17_000 + 1000


# --- Arrow and Parquet -----------------------------------------------------------------------------------------------

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "answers": datasets.List(datasets.Value("string")),
        "images": datasets.List(datasets.Image()),
        "turns": datasets.List({"role": datasets.Value("string"), "image": datasets.Image()}),
        "extra": datasets.Json(),
        "raw": datasets.Value("binary"),
    }
)
STAND_IN = b"8"


def arrow_rows(image=lambda number: b"pixels %d" % number):
    """What the rows of the datasets below are."""
    return [
        {
            "image": None if number == 3 else {"bytes": image(number), "path": f"{number}.png"},
            "question": f"Q{number}",
            "answers": ["a", "b"],
            "images": None if number == 4 else [{"bytes": image(number), "path": None}] * number,
            "turns": [
                {"role": "user", "image": None},
                {"role": "assistant", "image": {"bytes": image(number), "path": "x"}},
            ],
            "extra": {"n": [number, "x"]},
            "raw": image(number),
        }
        for number in range(5)
    ]


@pytest.fixture
def dataset():
    return datasets.Dataset.from_list(arrow_rows(), features=FEATURES)


def stored(kind, dataset, folder):
    if kind == "parquet":
        dataset.to_parquet(folder / "a.parquet")
        return folder / "a.parquet"
    if kind == "folder of parquet":
        dataset.select(range(2)).to_parquet(folder / "a-0.parquet")
        dataset.select(range(2, 5)).to_parquet(folder / "a-1.parquet")
        return folder
    if kind == "splits":
        datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(folder / "saved")
    else:
        dataset.save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


@pytest.mark.parametrize("kind", ["parquet", "folder of parquet", "saved", "splits"])
def test_arrow_rows_are_as_stored(tmp_path, dataset, kind):
    """Images are not decoded: these are none."""
    (tmp_path / "data").mkdir()
    path = stored(kind, dataset, tmp_path / "data")
    rows = read(path)
    assert isinstance(rows, ArrowRows)
    assert list(rows) == arrow_rows()
    assert list(rows.scan(1, 5)) == arrow_rows(lambda number: STAND_IN)[1:]
    assert str(rows.origin(2)) == f"{path}, row 3"
    copied = pickle.loads(pickle.dumps(rows))
    assert list(copied) == arrow_rows()
    assert copied.fingerprint() == read(path).fingerprint()


def test_a_scan_crosses_blocks_and_chunks(tmp_path, monkeypatch, dataset):
    monkeypatch.setattr("finetune.data.sources.arrow_rows.BLOCK", 2)
    many = datasets.concatenate_datasets([dataset, dataset.select([4, 2]), dataset])
    rows = ArrowRows(many, "many", tmp_path)
    wanted = arrow_rows(lambda number: STAND_IN)
    wanted = [*wanted, wanted[4], wanted[2], *wanted]
    for start in range(12):
        for stop in range(start, 13):
            assert list(rows.scan(start, stop)) == wanted[start:stop]


def test_a_scan_leaves_the_bytes_of_images_on_disk(tmp_path):
    pixels = [{"image": {"bytes": bytes(1_000_000), "path": None}, "question": "Q"}] * 20
    features = datasets.Features({name: FEATURES[name] for name in ("image", "question")})
    datasets.Dataset.from_list(pixels, features=features).save_to_disk(tmp_path / "saved")
    rows = read(tmp_path / "saved")
    next(rows.scan(0, 1))
    tracemalloc.start()
    arrow_before = pa.total_allocated_bytes()
    scan = rows.scan(0, 20)
    next(scan)
    arrow_during = pa.total_allocated_bytes()
    assert len(list(scan)) == 19
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert arrow_during - arrow_before < 1_000_000


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_rows_may_say_where_they_came_from(tmp_path, kind):
    origins = [{"file": "a.jsonl", "row": 7}, {"file": "b.jsonl", "row": None}, None, {"file": "c.jsonl", "row": 1}]
    features = {
        "x": datasets.Value("int64"),
        "origin": {"file": datasets.Value("string"), "row": datasets.Value("int64")},
    }
    rows = [{"x": number, "origin": origin} for number, origin in enumerate(origins)]
    data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    path = stored(kind, data, tmp_path)
    rows = read(path)
    wanted = ["a.jsonl, row 7", f"{path}, row 2", f"{path}, row 3", "c.jsonl, row 1"]
    assert [str(rows.origin(index)) for index in range(4)] == wanted
    assert [str(pickle.loads(pickle.dumps(rows)).origin(index)) for index in range(4)] == wanted
    # Not where the column is something else.
    path = stored(kind, data.map(lambda row: {"origin": "web"}, remove_columns="origin"), tmp_path)
    assert str(read(path).origin(0)) == f"{path}, row 1"


def test_splits_are_chosen_by_name(tmp_path, dataset):
    path = stored("splits", dataset, tmp_path)
    assert len(read(path, split="test")) == 1
    with pytest.raises(DataError, match="has no split 'dev' but train, test"):
        read(path, split="dev")


def test_a_damaged_folder_is_refused(tmp_path, dataset):
    path = stored("saved", dataset, tmp_path)
    (path / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="saved: cannot be loaded"):
        read(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: the folder holds neither"):
        read(tmp_path / "empty")


# --- image folders and the hub ---------------------------------------------------------------------------------------


def test_image_folder(tmp_path):
    metadata = [
        {"file_name": "a/1.png", "question": "Q", "answers": "A"},
        {"file_names": ["1.png", "2.png"], "messages": []},
        {"file_name": "1.png", "image": "own.png"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, metadata)))
    rows = read(tmp_path)
    assert rows[0] == {"image": "a/1.png", "question": "Q", "answers": "A"}
    assert rows[1] == {"images": ["1.png", "2.png"], "messages": []}
    assert rows[2]["image"] == "own.png"
    assert rows.folder == tmp_path
    assert str(rows.origin(0)) == f"{tmp_path}/metadata.jsonl, row 1"


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_image_folder_by_kind_of_metadata(tmp_path, name):
    given = [{"file_name": "a/1.png", "question": "Q", "mask_file_name": "m.png"}] * 2
    if name.endswith(".jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, given)))
    elif name.endswith(".csv"):
        (tmp_path / name).write_text("file_name,question,mask_file_name\na/1.png,Q,m.png\na/1.png,Q,m.png\n")
    else:
        datasets.Dataset.from_list(given).to_parquet(tmp_path / name)
    rows = read(tmp_path)
    assert list(rows) == list(rows.scan(0, 2)) == [{"image": "a/1.png", "question": "Q", "mask": "m.png"}] * 2
    assert rows.folder == tmp_path
    assert str(rows.origin(1)) == f"{tmp_path}/{name}, row {3 if name.endswith('.csv') else 2}"
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)
    assert rows.fingerprint() == read(tmp_path).fingerprint()


def test_an_image_folder_with_two_metadata_files_is_refused(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name\n")
    (tmp_path / "metadata.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"holds metadata.jsonl and metadata.csv; keep one of them"):
        read(tmp_path)


def test_a_folder_of_folders_names_them(tmp_path, dataset):
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        dataset.to_parquet(tmp_path / name / "a.parquet")
    with pytest.raises(DataError, match=rf"give one of its folders that hold Parquet files: {tmp_path}/1, "):
        read(tmp_path)


def test_hub_dataset(monkeypatch, dataset, tmp_path):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    rows = read("owner/name", config="small", split="validation[:10]")
    assert asked == [(("owner/name", "small"), {"split": "validation[:10]"})]
    assert list(rows) == arrow_rows()
    assert str(rows.origin(0)) == "owner/name [validation[:10]], row 1"
    assert str(read("owner/name").origin(4)) == "owner/name [train], row 5"


def test_a_folder_here_is_never_looked_for_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(DataError, match="the folder holds neither"):
        read("owner/name")


def test_a_hub_dataset_that_cannot_be_had(monkeypatch, tmp_path):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"owner/name: there is no such file .* \(ConnectionError: no route\)"):
        read("owner/name")


# --- fingerprints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_fingerprint_of_a_text_file_follows_its_content(tmp_path, name):
    data = json.dumps(ROWS).encode() if name == "a.json" else b"\n".join(LINES)
    (tmp_path / name).write_bytes(data)
    kinds = {"a.json": JsonRows, "a.jsonl": JsonLinesRows}
    first = read(tmp_path / name)
    assert isinstance(first, kinds[name])
    os.utime(tmp_path / name, (1, 1))
    assert read(tmp_path / name).fingerprint() == first.fingerprint()
    (tmp_path / name).write_bytes(data.replace(b'"b"', b'"c"'))
    assert read(tmp_path / name).fingerprint() != first.fingerprint()


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_fingerprint_of_arrow_files_follows_their_content(tmp_path, dataset, kind):
    prints = []
    for name, rows in [("one", dataset), ("same", dataset), ("other", dataset.select([1, 0, 2, 3, 4]))]:
        (tmp_path / name).mkdir()
        prints.append(read(stored(kind, rows, tmp_path / name)).fingerprint())
    assert prints[0] != prints[2]
    if kind == "parquet":
        assert prints[0] == prints[1]
