"""Damaged checkpoints: every kind is found and named, and the one before is used."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.run.checkpoints import DamagedCheckpoint, checkpoint_path, find_last_good, verify
from finetune.run.folder import RunFolder
from tests.reliability.test_checkpoint_faults import (
    content,
    failing_with,
    no_waiting_for_the_disk,  # noqa: F401 (acts on every test here)
    prepare_two,
    save,
    strikes,
    versions,
)


@pytest.fixture
def two(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    prepare_two(run)
    return run


def flip(byte: int) -> Callable[[Path], None]:
    def damage(file: Path):
        data = bytearray(file.read_bytes())
        data[byte if byte >= 0 else len(data) + byte] ^= 1 << 4
        file.write_bytes(data)

    return damage


def flip_middle(file: Path):
    flip(file.stat().st_size // 2)(file)


def cut_to(size: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, size(file.stat().st_size))


def lengthen(file: Path):
    file.write_bytes(file.read_bytes() + b"\0")


def zeros(file: Path):
    file.write_bytes(bytes(file.stat().st_size))


def folder_instead(file: Path):
    file.unlink()
    file.mkdir()


def other_checkpoints(file: Path):
    shutil.copy(str(file).replace("step-20", "step-10"), file)


DAMAGES = {
    "first byte": flip(0),
    "middle byte": flip_middle,
    "last byte": flip(-1),
    "half": cut_to(lambda size: size // 2),
    "one byte less": cut_to(lambda size: size - 1),
    "empty": cut_to(lambda _: 0),
    "one byte more": lengthen,
    "zeros": zeros,
    "missing": Path.unlink,
    "a folder": folder_instead,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", *content(20, "old")])
def test_damage_is_found_and_named(two, name, damage):
    folder = checkpoint_path(two.checkpoints, 20)
    damage(folder / name)
    with pytest.raises(DamagedCheckpoint) as error:
        verify(folder)
    assert [problem.split()[0] for problem in error.value.problems] == [name]
    found = find_last_good(two.checkpoints)
    assert (found.step, found.path) == (10, checkpoint_path(two.checkpoints, 10))
    assert found.damaged == [(folder, error.value.problems[0])]


def test_every_byte_of_a_manifest_counts(two):
    folder = checkpoint_path(two.checkpoints, 20)
    intact = (folder / "manifest.json").read_bytes()
    for place in range(len(intact)):
        data = bytearray(intact)
        data[place] ^= 1 << (place % 8)
        (folder / "manifest.json").write_bytes(data)
        with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
            verify(folder)
    (folder / "manifest.json").write_bytes(intact)
    verify(folder)


def test_a_manifest_of_another_checkpoint(two):
    folder = checkpoint_path(two.checkpoints, 20)
    other_checkpoints(folder / "manifest.json")
    with pytest.raises(DamagedCheckpoint, match="step 10 under another name"):
        verify(folder)


@pytest.mark.parametrize("text", ["null", "[]", "{}", '{"checksum": 1}', "[" * 100_000, '{"format": NaN}'])
def test_hostile_manifests(two, text):
    folder = checkpoint_path(two.checkpoints, 20)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        verify(folder)


def test_a_manifest_that_is_a_fifo_does_not_block(two):
    for name in ("manifest.json", "optimizer.pt"):
        folder = checkpoint_path(two.checkpoints, 20)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(DamagedCheckpoint, match=f"{name} is missing"):
            verify(folder)
        save(two, 20, "new")


def test_unreadable_blocks_are_damage(two):
    """EIO while reading names the file; other errors (permissions, a network) are for the user to see."""
    folder = checkpoint_path(two.checkpoints, 20)
    for number in (errno.EIO, errno.EACCES):
        n, problems = 0, []
        while True:
            n += 1
            with strikes(n, failing_with(number)) as seen:
                try:
                    verify(folder)
                except DamagedCheckpoint as error:
                    problems += error.problems
                except OSError as error:
                    assert error.errno == number == errno.EACCES
            if len(seen) < n:
                break
        assert (n > 10) and bool(problems) == (number == errno.EIO)
        assert {problem.split()[0] for problem in problems} in (set(), {"manifest.json", *content(20, "old")})


def test_all_damaged(two):
    for step in (10, 20):
        flip_middle(checkpoint_path(two.checkpoints, step) / "optimizer.pt")
    found = find_last_good(two.checkpoints)
    assert (found.path, found.step) == (None, 0)
    assert [path.name for path, _ in found.damaged] == ["step-20", "step-10"]
    assert all("optimizer.pt is not what was saved" in reason for _, reason in found.damaged)


def test_a_damaged_checkpoint_is_replaced_by_the_resumed_run(two):
    flip_middle(checkpoint_path(two.checkpoints, 20) / "optimizer.pt")
    assert find_last_good(two.checkpoints).step == 10
    save(two, 20, "new")
    found = find_last_good(two.checkpoints)
    assert (found.step, found.damaged, versions(found.path, 20)) == (20, [], ["new"])
