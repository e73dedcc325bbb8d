"""Data that the operating system or a library cannot read: an error that names the file, the reason and a remedy."""

import errno
import os
import pickle
from pathlib import Path

import datasets
import pytest
import sources_for_tests

from finetune.data.sample import DataError
from finetune.data.samples import Samples
from finetune.data.sources import streams
from finetune.data.sources.sources import read_source
from finetune.errors import Interrupted, MissingFileError, UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def source(path, **settings):
    return sources_for_tests.source(path, settings.pop("format", "caption"), **settings)


def deny(monkeypatch, denied: Path, number=errno.EACCES):
    """As root, permissions keep nobody out: let the system calls themselves refuse the path."""

    def refusing(call):
        def refuse(path, *args, **kwargs):
            if Path(path) == denied:
                raise OSError(number, os.strerror(number), str(path))
            return call(path, *args, **kwargs)

        return refuse

    monkeypatch.setattr(Path, "open", refusing(Path.open))
    monkeypatch.setattr(os, "scandir", refusing(os.scandir))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_file_without_permission(tmp_path, monkeypatch, name):
    (tmp_path / name).write_text("image,caption\nx.png,x\n")
    deny(monkeypatch, tmp_path / name)
    with pytest.raises(DataError) as caught:
        read_source(source(tmp_path / name))
    assert str(caught.value).startswith(f"cannot read {tmp_path / name}: you have no permission")
    assert str(caught.value).endswith("Check the path and its permissions, or give another one")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_folder_without_permission(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.parquet").touch()
    deny(monkeypatch, tmp_path / "data")
    with pytest.raises(DataError, match=f"cannot read {tmp_path / 'data'}: you have no permission"):
        read_source(source(tmp_path / "data"))


def test_the_metadata_of_a_folder_without_permission(tmp_path, monkeypatch):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "a"}\n')
    deny(monkeypatch, tmp_path / "metadata.jsonl")
    with pytest.raises(DataError, match=rf"cannot read {tmp_path / 'metadata.jsonl'}: you have no permission"):
        read_source(source(tmp_path))


def test_names_that_are_none(tmp_path):
    with pytest.raises(DataError, match="the name is too long"):
        read_source(source("x" * 5000 + ".jsonl"))
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(MissingFileError, match=r"link.jsonl is a symbolic link to .*gone.jsonl, which does not exist"):
        read_source(source(tmp_path / "link.jsonl"))
    with pytest.raises(MissingFileError, match=r"loop.jsonl"):
        read_source(source(tmp_path / "loop.jsonl"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(MissingFileError, match="there is no file"):
        read_source(source(tmp_path / "file" / "a.jsonl"))
    with pytest.raises(MissingFileError, match="there is no file"):
        read_source(source("a\0.jsonl"))


def test_folders_and_files_of_other_kinds(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=r"folder.jsonl: the folder holds neither"):
        read_source(source(tmp_path / "folder.jsonl"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1, it says")
    with pytest.raises(DataError, match=r"a.parquet: cannot be read as Parquet"):
        read_source(source(tmp_path / "a.parquet"))
    (tmp_path / "latin.csv").write_bytes("image,caption\na.png,\xe4\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.csv: byte 20 is not UTF-8; give the file's encoding with `encoding`"):
        read_source(source(tmp_path / "latin.csv"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"image": "x.png", "caption": "x"}\n'),
        ("a.json", '[\n{"image": "x.png", "caption": "x"}]'),
        ("a.csv", "image,caption\nx.png,x\n"),
    ],
)
def test_a_file_that_is_gone_meanwhile(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    samples = Samples([source(tmp_path / name)])
    assert samples[0].messages[-1]["content"] == "x"
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"cannot read {tmp_path / name}: it does not exist"):
        samples[0]
    with pytest.raises(DataError, match=f"cannot read {tmp_path / name}: it does not exist"):
        list(samples.scan(0, 1))


@pytest.mark.parametrize("streaming", [False, True])
def test_an_interrupt_is_no_fault_of_the_hub(monkeypatch, streaming):
    def interrupted(*args, **kwargs):
        raise Interrupted(15, saved=False)

    monkeypatch.setattr(datasets, "load_dataset", interrupted)
    monkeypatch.setattr(datasets, "load_dataset_builder", interrupted)
    with pytest.raises(Interrupted):
        read_source(source("owner/name", streaming=streaming, limit=3))


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot keep the streamed rows in .*cache.*set HF_HOME"):
        streams.read_stream("owner/name", None, None, 3)


def test_a_damaged_state_of_a_stream(tmp_path):
    folder = streams.stream_folder("owner/name", None, "train")
    folder.mkdir(parents=True)
    for text in ("{", "[]", '{"dataset": "owner/name"}', "\xff"):
        (folder / streams.STATE_FILE).write_text(text, encoding="latin-1")
        with pytest.raises(DataError, match=r"stream.json is damaged .*delete .* to fetch the rows again"):
            streams.read_stream("owner/name", None, None, 3)
