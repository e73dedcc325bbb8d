"""Hub datasets as streams: what is fetched, how often, and what a broken stream leaves. No network: a local folder
stands for the hub."""

import json
from types import SimpleNamespace

import datasets
import pytest

from finetune.data.sample import DataError
from finetune.data.samples import Samples
from finetune.data.sources import streams
from finetune.data.sources.sources import read_source
from finetune.data.sources.streams import stream_folder
from finetune.errors import Failed

ROWS = 60


TEXT = {"encoding": None, "delimiter": None, "part": None, "annotations": None}


def source(limit=None, split=None, **settings):
    given = {"path": "owner/name", "config": None, "format": "vqa", "columns": {}, "prompt": None, "box_form": None}
    return SimpleNamespace(
        **given | {"weight": 1.0, "limit": limit, "split": split, "streaming": True, **TEXT} | settings
    )


def row(number):
    """As it is stored: the bytes are no image, and are not to be decoded."""
    image = {"bytes": b"pixels %d" % number, "path": f"{number}.png"}
    return {"image": image, "question": f"Q{number}", "answers": ["a"]}


class Hub:
    """A hub with one dataset of two Parquet files, whose rows it counts as they are pulled."""

    def __init__(self, folder):
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "question": datasets.Value("string"),
                "answers": datasets.List(datasets.Value("string")),
            }
        )
        data = datasets.Dataset.from_list([row(number) for number in range(ROWS)], features=features)
        folder.mkdir()
        for name, part in (("train-0", range(25)), ("train-1", range(25, ROWS))):
            data.select(part).to_parquet(folder / f"{name}.parquet", batch_size=10)
        self.folder, self.pulled, self.asked, self.revision = folder, 0, 0, "abc"
        self.break_after = None  # rows
        self.load = datasets.load_dataset_builder

    def load_dataset_builder(self, path, config):
        assert (path, config) == ("owner/name", None)
        self.asked += 1
        builder = self.load(str(self.folder))
        builder.hash = self.revision
        make = builder.as_streaming_dataset
        builder.as_streaming_dataset = lambda split: self.counted(make(split=split))
        return builder

    def counted(self, stream):
        hub = self

        class Counted:
            features = stream.features

            def decode(self, enable):
                return hub.counted(stream.decode(enable))

            def load_state_dict(self, state):
                stream.load_state_dict(state)

            def state_dict(self):
                return stream.state_dict()

            def __iter__(self):
                for given in stream:
                    if hub.pulled == hub.break_after:
                        raise ConnectionResetError("peer is gone")
                    hub.pulled += 1
                    yield given

        return Counted()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    monkeypatch.setattr(streams, "BLOCK_ROWS", 4)
    monkeypatch.setattr(streams, "PART_ROWS", 8)
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(datasets, "load_dataset_builder", hub.load_dataset_builder)
    return hub


def test_exactly_limit_rows_are_pulled_and_read_as_any_others(hub):
    rows = read_source(source(30))
    assert hub.pulled == 30
    assert list(rows) == [row(number) for number in range(30)]
    assert rows[29] == row(29)
    assert str(rows.origin(29)) == "owner/name [train], row 30"
    assert [given["image"]["bytes"] for given in rows.scan(3, 5)] == [b"8", b"8"]
    samples = Samples([source(30)])
    assert len(samples) == 30
    assert samples[7].messages[0]["content"][0]["image"] == row(7)["image"]
    folder = stream_folder("owner/name", None, "train")
    assert sorted(file.name for file in folder.glob("part-*")) == [f"part-0000{n}.arrow" for n in range(4)]


def test_what_is_here_is_not_fetched_again(hub):
    first = read_source(source(20)).fingerprint()
    hub.pulled = hub.asked = 0
    assert list(read_source(source(20))) == [row(number) for number in range(20)]
    assert list(read_source(source(7))) == [row(number) for number in range(7)]
    assert (hub.pulled, hub.asked) == (0, 0)  # not even asked for
    # More are the further ones, and the first ones are what they were.
    assert list(read_source(source(33))) == [row(number) for number in range(33)]
    assert hub.pulled == 13
    assert read_source(source(20)).fingerprint() == first != read_source(source(33)).fingerprint()
    assert list(read_source(source())) == [row(number) for number in range(ROWS)]
    assert hub.pulled == ROWS - 20
    assert len(read_source(source())) == len(read_source(source(1000))) == ROWS
    assert (hub.pulled, hub.asked) == (ROWS - 20, 2)


def test_a_broken_stream_is_continued(hub):
    hub.break_after = 27
    with pytest.raises(Failed, match=r"the stream broke after 24 rows \(ConnectionResetError: peer is gone\)"):
        read_source(source(40))
    hub.break_after = None
    hub.pulled = 0
    rows = read_source(source(40))
    assert hub.pulled == 40 - 24
    assert list(rows) == [row(number) for number in range(40)]
    assert rows.fingerprint() == _fetched_in_one_go(hub, 40)


def _fetched_in_one_go(hub, limit):
    folder = stream_folder("owner/name", None, "train")
    folder.rename(folder.with_name("other"))
    return read_source(source(limit)).fingerprint()


@pytest.mark.parametrize("where", ["_write_arrow", "write_text"])
def test_a_killed_fetch_is_continued(hub, monkeypatch, where):
    """Between any two of its writes: of parts and of the state."""

    class Killed(BaseException):
        pass

    real, calls = getattr(streams, where), []

    def dying(*args):
        calls.append(args)
        if len(calls) == 3:
            raise Killed
        real(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(streams, where, dying)
        read_source(source(40))
    hub.pulled = 0
    assert list(read_source(source(40))) == [row(number) for number in range(40)]
    assert hub.pulled == 40 - 16


def test_a_dataset_that_was_changed_is_not_mixed(hub):
    read_source(source(20))
    hub.revision = "def"
    with pytest.raises(DataError, match="was changed on the hub since its first 20 rows were fetched; delete "):
        read_source(source(30))
    assert len(read_source(source(20))) == 20


def test_damage_is_found(hub):
    read_source(source(20))
    folder = stream_folder("owner/name", None, "train")
    part = folder / "part-00001.arrow"
    data = part.read_bytes()
    for damaged in (data[: len(data) // 2], b""):
        part.write_bytes(damaged)
        with pytest.raises(DataError, match=r"part-00001.arrow is missing or damaged: delete "):
            read_source(source(20))
    part.write_bytes(data)
    (folder / "stream.json").write_text("{")
    with pytest.raises(DataError, match=r"stream.json is damaged"):
        read_source(source(20))


def test_rows_of_unknown_columns(hub, monkeypatch):
    """A stream of JSON may not know its columns; they are those of its first rows."""

    def stream(rows):
        made = datasets.IterableDataset.from_generator(lambda: iter(rows))
        builder = SimpleNamespace(hash="abc", as_streaming_dataset=lambda split: made)
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, config: builder)

    stream([{"a": number, "b": None if number % 2 else "x"} for number in range(10)])
    assert [given["b"] for given in read_source(source(split="one"))] == ["x", None] * 5
    stream([{"a": 1}] * 5 + [{"a": 1, "new": 2}])
    with pytest.raises(DataError, match=r"\[two\]: row 6 has new, which the first rows have not"):
        read_source(source(split="two"))
    stream([{"a": 1}] * 5 + [{"a": "text"}])
    with pytest.raises(DataError, match=r"\[three\]: rows 5 to 6 do not fit the first ones"):
        read_source(source(split="three"))
    stream([])
    with pytest.raises(DataError, match=r"\[four\]: holds no rows"):
        read_source(source(split="four"))


def test_what_cannot_be_streamed_is_refused(hub, tmp_path):
    with pytest.raises(DataError, match=r"\[train\[:10\]\]: cannot be streamed .* take a part of one with limit"):
        read_source(source(split="train[:10]"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"a": 1}))
    for path in ("a.jsonl", "hub"):
        with pytest.raises(DataError, match=f"{path}: streaming fetches rows from the hub, and this is here already"):
            read_source(source(path=path))
    with pytest.raises(FileNotFoundError):
        read_source(source(path="gone.jsonl"))
