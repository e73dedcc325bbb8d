"""The store of image features: what is written comes back, whoever wrote it; what is damaged never does."""

import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.files.path_errors import PathError
from finetune.vision_cache.store import FEATURES, JOURNAL, Damaged, FeatureStore, Record

RECORD = Record((2, 3), torch.float32)


def key(text: str) -> bytes:
    # Ending in zeros, which must not be taken for padding.
    return text.encode().ljust(16, b"\0")


def features(number: int, count: int = 1) -> torch.Tensor:
    return torch.arange(6.0 * count).view(count, 2, 3) + 100 * number


def write(store: FeatureStore, *numbers: int):
    for number in numbers:
        store.add([(key(f"handle {number}"), key(f"content {number}"))], features(number))


def fresh(folder: Path) -> FeatureStore:
    store = FeatureStore(folder, RECORD)
    store.refresh()
    return store


def only(folder: Path, ending: str) -> Path:
    (file,) = folder.glob(f"*{ending}")
    return file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_comes_back(tmp_path, dtype):
    store = FeatureStore(tmp_path / "new" / "folder", Record((2, 3), dtype))
    given = torch.randn(3, 2, 3).to(dtype)
    store.add([(key(f"h{n}"), key(f"c{n}")) for n in range(3)], given)
    store.name([(key("another"), key("c1"))])
    again = FeatureStore(tmp_path / "new" / "folder", Record((2, 3), dtype))
    again.refresh()
    for one in (store, again, pickle.loads(pickle.dumps(again))):
        assert all(torch.equal(one.read(key(f"c{n}")), given[n]) for n in range(3))
        assert one.has(key("h2")) and one.has(key("another")) and not one.has(key("c1"))
        assert one.handles[key("another")] == key("c1")
    with pytest.raises(KeyError):
        again.read(key("c9"))


def test_nothing_is_made_before_there_is_something_to_write(tmp_path):
    store = FeatureStore(tmp_path / "folder", RECORD)
    store.refresh()
    store.name([])
    assert not (tmp_path / "folder").exists()


def test_several_write_side_by_side(tmp_path):
    stores = [FeatureStore(tmp_path, RECORD) for _ in range(3)]
    for number in range(9):
        write(stores[number % 3], number)
    for store in stores:
        store.refresh()
        assert all(torch.equal(store.read(key(f"content {n}")), features(n)[0]) for n in range(9))
    assert len(list(tmp_path.glob(f"*{FEATURES}"))) == 3


def test_of_two_records_of_one_content_the_last_to_be_learned_counts(tmp_path):
    first, second = FeatureStore(tmp_path, RECORD), FeatureStore(tmp_path, RECORD)
    write(first, 1)
    second.add([(key("handle 1"), key("content 1"))], features(7))
    first.refresh()
    assert torch.equal(first.read(key("content 1")), features(7)[0])


def test_every_flipped_byte_is_found(tmp_path):
    """In records and lines: what is read is right, or `Damaged`, or no longer known. Never the features of another."""
    write(FeatureStore(tmp_path, RECORD), 0, 1, 2)
    lost = 0
    for ending in (FEATURES, JOURNAL):
        file = only(tmp_path, ending)
        whole = file.read_bytes()
        for place in range(len(whole)):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
            store, intact = fresh(tmp_path), 0
            for number in range(3):
                content = store.handles.get(key(f"handle {number}"))
                if content not in store.places:
                    continue
                try:
                    assert torch.equal(store.read(content), features(number)[0])
                    intact += 1
                except Damaged:
                    pass
            assert intact >= 2, f"{ending}, byte {place}: one flipped byte is one image"
            lost += intact == 2
        file.write_bytes(whole)
    assert lost > 3 * RECORD.nbytes, "the damage was seen"


@pytest.mark.parametrize("ending", [FEATURES, JOURNAL])
def test_cut_off_anywhere(tmp_path, ending):
    """What a killed process, or a full disk, leaves: everything before the cut is there."""
    write(FeatureStore(tmp_path, RECORD), 0, 1, 2)
    file = only(tmp_path, ending)
    whole = file.read_bytes()
    size = len(whole) // 3
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        store = fresh(tmp_path)
        there = [number for number in range(3) if store.has(key(f"handle {number}"))]
        assert there == list(range(length // size)), length
        assert all(torch.equal(store.read(key(f"content {n}")), features(n)[0]) for n in there)


def test_files_that_are_cut_off_or_gone_while_they_are_read(tmp_path):
    write(FeatureStore(tmp_path, RECORD), 0, 1)
    store, file = fresh(tmp_path), only(tmp_path, FEATURES)
    os.truncate(file, RECORD.nbytes + 5)
    assert torch.equal(store.read(key("content 0")), features(0)[0])
    with pytest.raises(Damaged, match="record 1 is not as it was written"):
        store.read(key("content 1"))
    file.unlink()
    with pytest.raises(Damaged, match="No such file"):
        store.read(key("content 0"))
    assert not fresh(tmp_path).places


def test_a_damaged_record_is_written_anew(tmp_path):
    write(FeatureStore(tmp_path, RECORD), 0)
    file = only(tmp_path, FEATURES)
    file.write_bytes(b"x" + file.read_bytes()[1:])
    store = fresh(tmp_path)
    with pytest.raises(Damaged):
        store.read(key("content 0"))
    store.forget(key("content 0"))
    assert not store.has(key("handle 0"))
    write(store, 0)
    assert torch.equal(fresh(tmp_path).read(key("content 0")), features(0)[0])


def test_a_full_disk(tmp_path):
    """What does not fit is not there, what was there stays, and with room again it goes on."""
    store = FeatureStore(tmp_path, RECORD)
    write(store, 0, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * RECORD.nbytes + 7, before[1]))
    try:
        with pytest.raises(PathError, match="cannot write the vision cache to"):
            write(store, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for one in (store, fresh(tmp_path)):
        assert one.has(key("handle 1")) and not one.has(key("handle 2"))
    write(store, 3)
    again = fresh(tmp_path)
    assert [torch.equal(again.read(key(f"content {n}")), features(n)[0]) for n in (0, 1, 3)] == [True] * 3
    assert not again.has(key("handle 2"))


def test_in_memory_and_across_processes():
    """Nothing on any disk; another process of the machine reads what this one has, by `adopt` or pickled."""
    store = FeatureStore(None, RECORD)
    assert store.own_segment() is None
    write(store, 0, 1)
    store.refresh()
    assert torch.equal(store.read(key("content 1")), features(1)[0])
    adopted = FeatureStore(None, RECORD)
    adopted.adopt(*store.own_segment())
    program = (
        "import pickle, sys, torch\n"
        "for store in pickle.load(sys.stdin.buffer):\n"
        "    print(store.read(b'content 0'.ljust(16, b'\\0')).sum().item(), len(store.places))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps([store, adopted]), capture_output=True, check=True
    )
    assert done.stdout.decode().split() == ["15.0", "2", "15.0", "2"], done.stderr


def test_keep_only(tmp_path):
    store = FeatureStore(tmp_path, RECORD)
    write(store, 0, 1, 2)
    store.name([(key("same as 1"), key("content 1"))])
    store.keep_only([key("same as 1"), key("handle 2"), key("unknown")])
    assert set(store.handles) == {key("same as 1"), key("handle 2")}
    assert set(store.places) == {key("content 1"), key("content 2")}
