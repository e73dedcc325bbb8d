"""The checkpoints' folder: what is written, in which order it reaches the disk, what is found and what is pruned."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from finetune.files.atomic_writes import remove, write_text, writing_folder
from finetune.run.checkpoints import (
    DamagedCheckpoint,
    Found,
    checkpoint_path,
    clean_partials,
    find_last_good,
    prune,
    step_of,
    verify,
    writing,
)


def save(checkpoints: Path, step: int, text: str = "weights") -> Path:
    final = checkpoint_path(checkpoints, step)
    with writing(final) as partial:
        (partial / "weights").write_text(text)
    return final


def damage(checkpoint: Path):
    (checkpoint / "weights").write_text("WEIGHTS")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_names():
    assert checkpoint_path("run/checkpoints", 20) == Path("run/checkpoints/step-20")
    assert [step_of(name) for name in ("a/step-0", "step-20", Path("step-1000"))] == [0, 20, 1000]
    for other in ("step-", "step-020", "step--1", "step-20.tmp", ".step-20", "checkpoint-20", "step-²", "adapter"):
        assert step_of(other) is None


def test_manifest(tmp_path):
    with writing(tmp_path / "checkpoints" / "step-20") as partial:
        assert partial.is_dir()
        assert not list(partial.iterdir())
        assert partial.parent == tmp_path / "checkpoints"
        (partial / "empty").touch()
        (partial / "tokenizer").mkdir()
        (partial / "tokenizer" / "qwen.tiktoken").write_bytes(b"IQ== 0\n")
        assert not (tmp_path / "checkpoints" / "step-20").exists()
    assert names(tmp_path / "checkpoints") == ["step-20"]
    manifest = json.loads((tmp_path / "checkpoints" / "step-20" / "manifest.json").read_text())
    assert manifest.pop("checksum")
    assert manifest == {
        "format": 1,
        "step": 20,
        "files": {
            "empty": {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()},
            "tokenizer/qwen.tiktoken": {"size": 7, "sha256": hashlib.sha256(b"IQ== 0\n").hexdigest()},
        },
    }
    assert verify(tmp_path / "checkpoints" / "step-20")["files"] == manifest["files"]


def test_files_larger_than_a_block(tmp_path):
    data = bytes(range(256)) * (5 << 12) + b"end"  # 5 MB: hashed in two blocks
    with writing(tmp_path / "step-1") as partial:
        (partial / "large").write_bytes(data)
    assert verify(tmp_path / "step-1")["files"]["large"]["sha256"] == hashlib.sha256(data).hexdigest()


def test_other_folders_have_no_step(tmp_path):
    with writing(tmp_path / "adapter") as partial:
        (partial / "adapter_config.json").write_text("{}")
    assert verify(tmp_path / "adapter")["step"] is None


def test_an_exception_in_the_block_changes_nothing(tmp_path):
    save(tmp_path, 20, "old")
    for error in (RuntimeError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), writing(tmp_path / "step-20") as partial:
            (partial / "weights").write_text("new")
            raise error
    assert names(tmp_path) == ["step-20"]
    assert (tmp_path / "step-20" / "weights").read_text() == "old"


def test_replacing(tmp_path):
    save(tmp_path, 20, "old")
    save(tmp_path, 20, "new")
    assert names(tmp_path) == ["step-20"]
    assert (tmp_path / "step-20" / "weights").read_text() == "new"


class DiskLog:
    """The order of fsync and rename, by inode, from a folder's view."""

    def __init__(self, monkeypatch):
        self.events: list[tuple] = []
        fsync, rename, replace = os.fsync, os.rename, os.replace

        def logged_fsync(descriptor):
            fsync(descriptor)
            status = os.fstat(descriptor)
            self.events.append(("fsync", status.st_ino, status.st_size))

        def logged(operation):
            def rename(source, target):
                inode = Path(source).stat().st_ino
                operation(source, target)
                self.events.append(("rename", inode, Path(target).name))

            return rename

        monkeypatch.setattr(os, "fsync", logged_fsync)
        monkeypatch.setattr(os, "rename", logged(rename))
        monkeypatch.setattr(os, "replace", logged(replace))

    def renamed(self, name: str) -> int:
        [place] = [index for index, event in enumerate(self.events) if event[0] == "rename" and event[2] == name]
        return place

    def synced(self, path: Path) -> list[int]:
        """When it was synced; a file only with the size that it has in the end."""
        status = path.stat()
        return [
            index
            for index, event in enumerate(self.events)
            if event[:2] == ("fsync", status.st_ino) and (path.is_dir() or event[2] == status.st_size)
        ]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    save(tmp_path / "checkpoints", 20, "old")
    log = DiskLog(monkeypatch)
    with writing(tmp_path / "checkpoints" / "step-20") as partial:
        (partial / "deep" / "er").mkdir(parents=True)
        for name in ("weights", "deep/optimizer", "deep/er/random"):
            (partial / name).write_text(name)
    final = tmp_path / "checkpoints" / "step-20"
    renamed = log.renamed("step-20")
    for path in (final, *final.rglob("*")):
        assert any(place < renamed for place in log.synced(path)), path
    assert len(list(final.rglob("*"))) == 6
    parent = log.synced(final.parent)
    assert renamed + 1 in parent  # and the old one is deleted only then
    removed = [index for index, event in enumerate(log.events) if ".removed-" in str(event[2])]
    assert len(removed) == 1
    assert renamed + 1 < removed[0]
    assert removed[0] + 1 in parent


def test_new_parents_are_on_the_disk(tmp_path, monkeypatch):
    log = DiskLog(monkeypatch)
    save(tmp_path / "run" / "checkpoints", 1)
    assert log.synced(tmp_path)
    assert log.synced(tmp_path / "run")


def test_text_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    log = DiskLog(monkeypatch)
    write_text(tmp_path / "run.json", "{}\n")
    assert log.synced(tmp_path / "run.json") == [0]
    assert log.renamed("run.json") == 1
    assert log.synced(tmp_path) == [2]


def test_find_last_good(tmp_path):
    assert find_last_good(tmp_path / "none") == Found(None, 0, [])
    assert find_last_good(tmp_path) == Found(None, 0, [])
    for step in (9, 10, 100):
        save(tmp_path, step)
    (tmp_path / ".step-200.partial-0123abcd").mkdir()
    (tmp_path / "notes.txt").touch()
    assert find_last_good(tmp_path) == Found(tmp_path / "step-100", 100, [])  # by number, not by spelling
    (tmp_path / "step-300").mkdir()
    (tmp_path / "step-400").write_text("a file")
    damage(tmp_path / "step-100")
    found = find_last_good(tmp_path)
    assert (found.path, found.step) == (tmp_path / "step-10", 10)
    assert [path.name for path, _ in found.damaged] == ["step-400", "step-300", "step-100"]
    assert [reason.split(" (")[0] for _, reason in found.damaged] == [
        "manifest.json is missing, so it cannot be verified",
        "manifest.json is missing, so it cannot be verified",
        "weights is not what was saved",
    ]


def test_finding_changes_nothing_when_a_replacement_was_cut_short(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20).rename(tmp_path / ".step-20.replaced-0123abcd")
    (tmp_path / ".step-20.partial-4567cdef").mkdir()
    before = names(tmp_path)
    assert find_last_good(tmp_path) == Found(tmp_path / ".step-20.replaced-0123abcd", 20, [])
    assert names(tmp_path) == before
    clean_partials(tmp_path)
    assert names(tmp_path) == ["step-10", "step-20"]
    assert find_last_good(tmp_path) == Found(tmp_path / "step-20", 20, [])


def test_cleaning_leaves_what_it_does_not_know(tmp_path):
    clean_partials(tmp_path / "none")
    save(tmp_path, 10)
    kept = [".cache", ".step-20.partial", ".step-20.partial-xyz", "step-20.partial-0123abcd"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".run.json.partial-0123abcd").write_text("{")
    (tmp_path / ".step-10.replaced-0123abcd").mkdir()
    clean_partials(tmp_path)
    assert names(tmp_path) == sorted([*kept, "step-10"])


def test_verify_says_all_that_is_wrong(tmp_path):
    with writing(tmp_path / "step-1") as partial:
        for name in "abc":
            (partial / name).write_text(name)
    (tmp_path / "step-1" / "a").unlink()
    (tmp_path / "step-1" / "b").write_text("longer")
    (tmp_path / "step-1" / "pytorch_model.bin").touch()
    with pytest.raises(DamagedCheckpoint) as error:
        verify(tmp_path / "step-1")
    assert error.value.problems == [
        "a is missing",
        "pytorch_model.bin is not one of its files",
        "b has 6 bytes instead of 1",
    ]
    assert str(error.value).startswith(f"{tmp_path / 'step-1'} is damaged: a is missing; ")


def test_hidden_files_of_others_are_no_damage(tmp_path):
    checkpoint = save(tmp_path, 1)
    (checkpoint / ".DS_Store").touch()
    (checkpoint / ".nfs0001").touch()
    verify(checkpoint)


def test_own_hidden_files_count(tmp_path):
    with writing(tmp_path / "step-1") as partial:
        (partial / ".state").write_text("a")
    (tmp_path / "step-1" / ".state").write_text("b")
    with pytest.raises(DamagedCheckpoint, match=r"\.state is not what was saved"):
        verify(tmp_path / "step-1")


def test_a_newer_format_is_named(tmp_path):
    manifest = save(tmp_path, 1) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(DamagedCheckpoint, match="format 2 of a newer version"):
        verify(tmp_path / "step-1")


def test_a_copy_under_another_name(tmp_path):
    save(tmp_path, 20).rename(tmp_path / "best")
    assert verify(tmp_path / "best")["step"] == 20
    (tmp_path / "best").rename(tmp_path / "step-30")
    assert find_last_good(tmp_path).damaged == [
        (tmp_path / "step-30", "it is the checkpoint of step 20 under another name")
    ]


@pytest.mark.parametrize(
    ("keep", "also_keep", "left"),
    [
        (1, [], [40]),
        (2, [], [30, 40]),
        (9, [], [10, 20, 30, 40]),
        (1, [20], [20, 40]),
        (2, [40], [30, 40]),
    ],
)
def test_prune(tmp_path, keep, also_keep, left):
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    removed = prune(tmp_path, keep, {tmp_path / f"step-{step}" for step in also_keep})
    assert names(tmp_path) == [f"step-{step}" for step in left]
    assert removed == [tmp_path / f"step-{step}" for step in (10, 20, 30, 40) if step not in left]


@pytest.mark.parametrize(
    ("keep", "passing", "left"),
    [
        (2, [10, 30, 50], [20, 40, 50]),  # the newest that passes, beside those that are counted
        (2, [10, 30], [40, 50]),
        (1, [20, 30, 40, 50], [10, 50]),
        (1, [10, 20, 30, 40, 50], [40, 50]),
        (None, [10, 20, 40], [30, 50]),
        (None, [10, 20, 40, 50], [30, 50]),
        (None, [], [10, 20, 30, 40, 50]),
    ],
)
def test_prune_takes_what_passes_first(tmp_path, keep, passing, left):
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step)
    prune(tmp_path, keep, passing={tmp_path / f"step-{step}" for step in passing})
    assert names(tmp_path) == [f"step-{step}" for step in left]


def test_prune_keeps_the_last_good(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    damage(tmp_path / "step-40")
    damage(tmp_path / "step-30")
    assert prune(tmp_path, 1) == [tmp_path / "step-10", tmp_path / "step-30"]
    assert find_last_good(tmp_path).step == 20
    damage(tmp_path / "step-20")
    assert prune(tmp_path, 1) == []
    with pytest.raises(ValueError, match="keep=0"):
        prune(tmp_path, 0)


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (1, 2, 3):
        save(Path("checkpoints"), step)
    prune("checkpoints", 1, {tmp_path / "checkpoints" / "step-1"})
    assert names(tmp_path / "checkpoints") == ["step-1", "step-3"]


def test_a_folder_that_cannot_be_deleted_has_no_name_any_more(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1)

    def fail(*_, **__):
        raise PermissionError("not yours")

    monkeypatch.setattr("shutil.rmtree", fail)
    remove(tmp_path / "step-1")
    assert "could not be deleted (not yours)" in caplog.text
    assert find_last_good(tmp_path) == Found(None, 0, [])
    monkeypatch.undo()
    clean_partials(tmp_path)
    assert names(tmp_path) == []


def test_a_file_gives_way_to_a_folder(tmp_path):
    (tmp_path / "export").write_text("a file")
    with writing_folder(tmp_path / "export") as partial:
        (partial / "config.json").write_text("{}")
    assert names(tmp_path) == ["export"]
    assert names(tmp_path / "export") == ["config.json"]  # the manifest is the checkpoints' own
