"""Which fingerprints are taken from before, and which are not."""

import os
import shutil

import pytest
from changed_bases import edit_json, flip_a_bit
from huggingface_hub import constants

from qwenvl import base_check
from qwenvl.base_check import identify_base
from qwenvl.checkpoint import fingerprint_cache
from qwenvl.checkpoint.fingerprint_cache import cache_folder, keep_fingerprints, stamp_files


@pytest.fixture
def base(tiny_folder, tmp_path, monkeypatch):
    """A copy whose files count as old, and a cache of its own."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fingerprint_cache, "COARSEST_TIME", -1)
    monkeypatch.setattr(fingerprint_cache, "_known", {})
    shutil.copytree(tiny_folder, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def hashed(monkeypatch):
    """How often all values were read."""
    count, original = [], base_check.hash_tensors
    monkeypatch.setattr(base_check, "hash_tensors", lambda *a, **b: count.append(1) or original(*a, **b))
    return count


def forget(monkeypatch):
    """As a new process."""
    monkeypatch.setattr(fingerprint_cache, "_known", {})


def test_the_same_files_are_read_once_and_only_for_those_who_allow_it(base, hashed, monkeypatch):
    first = identify_base(base)
    assert identify_base(base, cached=True) == first and len(hashed) == 1
    forget(monkeypatch)
    assert identify_base(base, cached=True) == first and len(hashed) == 1
    assert identify_base(base) == first and len(hashed) == 2
    # The configuration is read each time.
    edit_json(base / "config.json", seq_length=9)
    changed = identify_base(base, cached=True)
    assert changed.computation["seq_length"] == 9 and changed.weights == first.weights and len(hashed) == 2


def touch(file):
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def replace(file):
    stat = file.stat()
    shutil.copy2(file, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)
    assert file.stat().st_ino != stat.st_ino and file.stat().st_mtime_ns == stat.st_mtime_ns


@pytest.mark.parametrize("change", [touch, replace, flip_a_bit], ids=["mtime", "inode", "ctime"])
def test_another_time_or_inode_is_read_again(base, hashed, monkeypatch, change):
    first = identify_base(base, cached=True)
    change(base / "model.safetensors")
    forget(monkeypatch)
    found = identify_base(base, cached=True)
    assert len(hashed) == 2 and (found == first) == (change is not flip_a_bit)


def test_each_part_of_a_stamp_counts(base, hashed, monkeypatch):
    identify_base(base)
    (stamp,) = stamp_files([base / "model.safetensors"])
    for place, value in enumerate(stamp):
        other = f"{value}/" if place == 0 else value + 1
        forged = (*stamp[:place], other, *stamp[place + 1 :])
        forget(monkeypatch)
        assert fingerprint_cache.find_fingerprints((stamp,)) is not None
        assert fingerprint_cache.find_fingerprints((forged,)) is None
    base.rename(base.with_name("moved"))
    identify_base(base.with_name("moved"), cached=True)
    assert len(hashed) == 2


def test_a_file_that_was_just_written_is_not_trusted(base, hashed, monkeypatch):
    monkeypatch.setattr(fingerprint_cache, "COARSEST_TIME", 3600)
    identify_base(base, cached=True)
    identify_base(base, cached=True)
    assert len(hashed) == 2 and not cache_folder().exists()


def test_a_file_that_changes_while_it_is_read_is_not_kept(base, hashed, monkeypatch):
    original = base_check.hash_tensors

    def touched(*given, **settings):
        os.utime(base / "model.safetensors", ns=(1, 1))
        return original(*given, **settings)

    monkeypatch.setattr(base_check, "hash_tensors", touched)
    identify_base(base)
    assert not cache_folder().exists() and not fingerprint_cache._known


def test_a_damaged_or_unwritable_cache_costs_only_time(base, hashed, monkeypatch):
    first = identify_base(base)
    (entry,) = cache_folder().iterdir()
    for content in ("", "[]", '{"files": 5}', entry.read_text().replace("weights", "other")):
        entry.write_text(content)
        forget(monkeypatch)
        assert identify_base(base, cached=True) == first
    assert len(hashed) == 5
    shutil.rmtree(cache_folder())
    cache_folder().write_text("in the way")
    forget(monkeypatch)
    for _ in range(2):  # of this process it is known
        assert identify_base(base, cached=True) == first
    assert len(hashed) == 6


def test_a_disk_that_is_full_leaves_nothing_half_written(base, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    stamps = stamp_files([base / "model.safetensors"])
    monkeypatch.setattr(fingerprint_cache.json, "dump", full)
    keep_fingerprints(stamps, fingerprint_cache.WeightsFingerprints("a", "b"))
    assert list(cache_folder().iterdir()) == []
