"""What the operating system says about paths becomes sentences, whoever writes."""

import errno
import os
import pickle
from pathlib import Path

import pytest

from finetune.errors import Failed, UserError
from finetune.files.atomic_writes import (
    clean_partials,
    make_folder,
    remove,
    write_text,
    writing_file,
    writing_folder,
    writing_large_folder,
)
from finetune.files.disk_space import check_disk_space
from finetune.files.output_paths import refuse_unwritable_file, refuse_unwritable_folder
from finetune.files.path_errors import DiskError, PathError, path_errors, write_error, write_errors
from finetune.run.folder import RunFolder
from finetune.run.lock import lock_folder


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOENT, "it does not exist. Give another path"),
        (errno.EISDIR, "it is a folder. Give another path"),
        (errno.EACCES, "you have no permission in {}. Give a path that you may write to, or ask for it"),
        (errno.EPERM, "you have no permission in {}. Give a path that you may write to, or ask for it"),
        (errno.EROFS, "{} is on a read-only disk. Give a path on another disk"),
        (errno.ENAMETOOLONG, "the name is too long. Give a shorter one"),
        (errno.ELOOP, "its symbolic links form a loop. Give another path"),
        (errno.ENOSPC, "the disk is full. Make room there, or give a path on another disk"),
        (errno.EDQUOT, "your quota on the disk is used up. Make room there, or give a path on another disk"),
        (errno.ENOLCK, "its file system cannot do this (No locks available). Give a path on another disk"),
        (errno.EBUSY, "Device or resource busy. Give another path"),
    ],
)
def test_reasons(tmp_path, number, reason):
    told = PathError(tmp_path / "a", "write", error(number))
    assert str(told) == f"cannot write {tmp_path / 'a'}: " + reason.format(tmp_path)
    assert isinstance(told, UserError) and isinstance(told, OSError) and told.errno == number


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_in_the_middle_of_the_work_is_not_the_users_input(number):
    told = write_error("a/b", error(number))
    assert str(told) == f"[Errno {number}] {os.strerror(number)}: 'a/b'"
    assert isinstance(told, Failed) and isinstance(told, OSError) and told.errno == number


def test_the_part_of_a_path_that_is_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nothing")
    for path, reason in {
        tmp_path / "file": "it is a file",
        tmp_path / "file" / "a" / "b": f"{tmp_path / 'file'} is a file",
        tmp_path / "link": "it is a symbolic link to nothing, which does not exist",
        tmp_path / "link" / "a": f"{tmp_path / 'link'} is a symbolic link to nothing, which does not exist",
        tmp_path / "none" / "a": f"there is no folder {tmp_path / 'none'}",
        tmp_path: "it exists already",
    }.items():
        for number in (errno.EEXIST, errno.ENOTDIR, errno.ENOENT):
            own = path == tmp_path / "file" and number == errno.EEXIST
            expected = "a file of this name is in the way" if own else reason
            assert f"cannot write {path}: {expected}. " in str(PathError(path, "write", error(number)))


def test_the_callers_words(tmp_path):
    remedy = "Give another --to"
    with pytest.raises(PathError) as told, path_errors("a", "write the model to", remedy):
        raise error(errno.EROFS)
    assert str(told.value) == "cannot write the model to a: . is on a read-only disk. Give another --to"
    # They take the place of the general ones, for paths above, at and below the caller's, and of no others.
    to = tmp_path / "a" / "b"
    for number in (errno.EISDIR, errno.ENOSPC):
        for path, name in ((to.parent, to.parent), (to, "it"), (to / "config.json", to / "config.json")):
            with pytest.raises(PathError) as told, path_errors(to, "write to", remedy), write_errors(path):
                raise error(number)
            reason = f"{name} is a folder" if number == errno.EISDIR else "the disk is full"
            assert str(told.value) == f"cannot write to {to}: {reason}. {remedy}"
        with pytest.raises(OSError) as passed, path_errors(to, "write to", remedy), write_errors(tmp_path / "c"):
            raise error(number)
        assert str(tmp_path / "c") in str(passed.value)
    with pytest.raises(PathError, match="cannot read a: "), path_errors("a", "write", "x"):
        raise PathError("a", "read", error(errno.EISDIR), "Give another --data")


def test_other_errors_pass(tmp_path):
    for other in (UserError("a"), ValueError("a"), Failed("a"), KeyboardInterrupt()):
        with pytest.raises(type(other)) as passed, path_errors(tmp_path, "read", "x"):
            raise other
        assert passed.value is other


def test_they_pass_between_processes():
    for number in (errno.EROFS, errno.ENOSPC):
        told = write_error("a", error(number))
        back = pickle.loads(pickle.dumps(told))
        assert (type(back), str(back), back.errno) == (type(told), str(told), number)


def write_a_file(path: Path):
    with writing_file(path) as partial:
        partial.write_text("a")


def write_a_folder(path: Path):
    with writing_folder(path) as partial:
        (partial / "a").write_text("a")


def write_a_large_folder(path: Path):
    with writing_large_folder(path) as partial:
        (partial / "a").write_text("a")


def hold(path: Path):
    with lock_folder(path):
        pass


WRITERS = {
    "write_text": lambda path: write_text(path, "a"),
    "writing_file": write_a_file,
    "writing_folder": write_a_folder,
    "writing_large_folder": write_a_large_folder,
    "make_folder": make_folder,
    "lock_folder": hold,
    "write_recipe": lambda path: RunFolder(path).write_recipe("a"),
    "write_run": lambda path: RunFolder(path).write_run({}),
    "append_metrics": lambda path: RunFolder(path).append_metrics({}),
    "remove": remove,
    "check_disk_space": lambda path: check_disk_space(path, 1, "it"),
    "refuse_unwritable_folder": lambda path: refuse_unwritable_folder(path, "it", "--to"),
    "refuse_unwritable_file": lambda path: refuse_unwritable_file(path, "it", "--html"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_says_it_in_a_sentence(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nothing")
    (tmp_path / "circle").symlink_to("circle")
    before = sorted(tmp_path.rglob("*"))
    paths = [tmp_path / "file" / "a", tmp_path / "link" / "a", tmp_path / "circle" / "a", tmp_path / ("x" * 300)]
    if name == "check_disk_space":  # it asks the nearest folder that exists
        paths = paths[-1:]
    for path in paths:
        with pytest.raises(PathError, match=r"^cannot .* .*\. .*"):
            WRITERS[name](path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("name", [name for name in WRITERS if name != "check_disk_space"])
def test_every_writer_on_a_disk_that_refuses(tmp_path, monkeypatch, name, number):
    def refuse(path=tmp_path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    for operation in ("mkdir", "open", "rename", "replace"):
        monkeypatch.setattr(os, operation, refuse)
    monkeypatch.setattr("io.open", refuse)
    with pytest.raises(DiskError if number == errno.ENOSPC and "refuse" not in name else PathError) as told:
        WRITERS[name](tmp_path / "a")
    assert told.value.errno == number
    assert str(tmp_path) in str(told.value)


def test_the_lock_file_cannot_be_opened(tmp_path):
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(PathError, match=f"cannot write to the folder {tmp_path}: "):
        hold(tmp_path)


def test_a_block_may_fail_by_other_files(tmp_path):
    """Only what is about the file or folder being written is told as such."""
    for writing in (writing_file, writing_folder):
        for other in (FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "rows.json")), error(errno.EIO)):
            with pytest.raises(OSError) as passed, writing(tmp_path / "a"):
                raise other
            assert passed.value is other
        with pytest.raises(DiskError, match=f"No space left on device: '{tmp_path / 'a'}'"), writing(tmp_path / "a"):
            raise error(errno.ENOSPC)
        told = f"cannot write {tmp_path / 'a'}: you have no permission"
        with pytest.raises(PathError, match=told), writing(tmp_path / "a") as partial:
            raise OSError(errno.EACCES, "Permission denied", str(partial))
        assert list(tmp_path.iterdir()) == []


def test_cleaning_where_it_is_not_allowed(tmp_path, monkeypatch):
    def refuse(*_):
        raise error(errno.EACCES)

    (tmp_path / ".a.partial-00000000").touch()
    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(PathError, match=f"cannot remove unfinished files from {tmp_path}: you have no permission"):
        clean_partials(tmp_path)


def test_places_that_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "page.html").touch()
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    for folder in ("new", "new/deep/er", "full", tmp_path, tmp_path / "new", "full/../new"):
        refuse_unwritable_folder(Path(folder), "it", "--to")
        refuse_unwritable_folder(Path(folder), "it", "output", replaced=False)
    for file in ("full/page.html", "new.html", "new/page.html", tmp_path / "full" / "page.html"):
        refuse_unwritable_file(Path(file), "it", "--html")
    refuse_unwritable_folder(Path(), "it", "output", replaced=False)
    with pytest.raises(UserError, match="give the folder by its name"):
        refuse_unwritable_folder(Path(), "it", "--to")
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("replaced", [True, False])
def test_a_folder_that_is_replaced_is_written_beside_and_another_one_inside(tmp_path, monkeypatch, replaced):
    there = tmp_path / "there"
    there.mkdir()
    mkdir = os.mkdir

    def refuse(path, *arguments):
        if Path(path).parent == (tmp_path if replaced else there):
            raise error(errno.EACCES)
        mkdir(path, *arguments)

    monkeypatch.setattr(os, "mkdir", refuse)
    refuse_unwritable_folder(there, "it", "--to", replaced=not replaced)
    with pytest.raises(PathError, match="you have no permission"):
        refuse_unwritable_folder(there, "it", "--to", replaced=replaced)


def test_a_folder_for_a_file_and_a_file_for_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PathError, match=f"cannot write the page to {tmp_path}: it is a folder"):
        refuse_unwritable_file(tmp_path, "the page", "--html")
    for replaced in (True, False):
        with pytest.raises(PathError, match=f"cannot write the run to {tmp_path / 'file'}: a file of this name is in"):
            refuse_unwritable_folder(tmp_path / "file", "the run", "output", replaced=replaced)
    with pytest.raises(PathError, match=f"cannot write {tmp_path}: it is a folder"):
        write_text(tmp_path, "a")
