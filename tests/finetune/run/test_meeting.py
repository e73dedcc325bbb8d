"""What processes tell each other without a process group, and that none waits for one that is gone."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from finetune.errors import Failed, Interrupted, UserError
from finetune.run import meeting as meeting_module
from finetune.run.meeting import Meeting
from finetune.run.sent_files import receive_files, send_files


@pytest.fixture
def two():
    """Two processes' meetings at one store."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    other = dist.TCPStore("localhost", store.port, is_master=False, timeout=timedelta(seconds=20))
    yield Meeting(store, 0, 2), Meeting(other, 1, 2)


def beside(work):
    """Start it in a thread."""
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_what_is_told_is_heard(two):
    main, other = two
    heard = []
    thread = beside(lambda: heard.append(other.from_all("all", other.from_main("name", None))))
    assert main.from_main("name", lambda: {"a": [1, None]}) == {"a": [1, None]}
    assert main.from_all("all", "mine") == ["mine", {"a": [1, None]}]
    thread.join()
    assert heard == [["mine", {"a": [1, None]}]]
    assert main.take("reply") is None
    other.tell("reply", 3)
    assert main.take("reply") == 3 and main.take("reply") is None


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (UserError("a row is bad"), UserError, "process 1: a row is bad"),
        (Failed("no room"), Failed, "process 1: no room"),
        (Interrupted(15, saved=False), Interrupted, "SIGTERM"),
        (ZeroDivisionError("by zero"), Failed, "process 1: ZeroDivisionError: by zero"),
    ],
)
def test_a_failure_ends_those_that_wait(two, error, raised, said):
    main, other = two
    with pytest.raises(type(error)), other.telling_failure():
        raise error
    with pytest.raises(raised, match=said):
        main.hear("never told")
    other.raise_if_failed()  # its own is raised already


def test_a_process_without_signs_of_life_is_not_waited_for(two, monkeypatch):
    main, other = two
    monkeypatch.setattr(meeting_module, "BEAT", 0.01)
    monkeypatch.setattr(meeting_module, "DEAD_AFTER", 0.2)
    with other.giving_signs_of_life():
        thread = beside(lambda: (time.sleep(0.5), other.tell("late", value=True)))
        assert main.hear("late")
        thread.join()
    # One that has left is not dead: others tell what is missing.
    thread = beside(lambda: (time.sleep(0.5), other.tell("later", value=True)))
    assert main.hear("later")
    thread.join()


def test_a_killed_process_is_not_waited_for(two, monkeypatch):
    main, other = two
    monkeypatch.setattr(meeting_module, "BEAT", 0.01)
    monkeypatch.setattr(meeting_module, "DEAD_AFTER", 0.2)
    other.count("beats/1")  # once, and then never again
    with pytest.raises(Failed, match="process 1 has given no sign of life"):
        main.hear("never told")


@pytest.mark.parametrize("sizes", [[], [0], [7], [10, 0, 25, 3]])
def test_files_are_sent_whole(two, tmp_path, monkeypatch, sizes):
    """In more pieces than may be on the way at a time."""
    monkeypatch.setattr("finetune.run.sent_files.CHUNK", 4)
    main, other = two
    (tmp_path / "ours" / "in").mkdir(parents=True)
    files = [tmp_path / "ours" / ("in" if n % 2 else ".") / f"{n}.bin" for n in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        file.write_bytes(bytes(range(size)))
    thread = beside(lambda: receive_files(other, "run", tmp_path / "theirs"))
    send_files(main, "run", tmp_path / "ours", files, 1)
    thread.join()
    found = {file.relative_to(tmp_path / "theirs"): file.read_bytes() for file in (tmp_path / "theirs").rglob("*.bin")}
    assert found == {file.relative_to(tmp_path / "ours"): file.read_bytes() for file in files}
