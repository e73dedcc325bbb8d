"""Work in several processes: in order, the same for any number, no hang and nothing left when one dies."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import work_for_tests as work

from finetune.data import worker_processes
from finetune.data.worker_processes import WorkerDied, default_processes, map_chunks, map_in_processes

CHUNKS = [range(start, start + 3) for start in range(0, 60, 3)]


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    # A process that has ended but whom nobody has asked about it yet is not alive.
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds: float = 30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_are_those_of_one_process_in_order(processes):
    assert list(map_chunks(work.add, 100, CHUNKS, processes)) == [[100 + index for index in c] for c in CHUNKS]


def test_a_slow_chunk_does_not_change_the_order():
    results = list(map_in_processes(work.slow_first, None, CHUNKS, 2))
    assert [start for start, _ in results] == [chunk.start for chunk in CHUNKS]
    processes = {process for _, process in results}
    assert len(processes) == 2 and os.getpid() not in processes
    assert not any(map(is_alive, processes))


def test_nothing_to_do():
    assert list(map_chunks(work.add, 0, [], 4)) == list(map_chunks(work.add, 0, [], None)) == []


def test_little_work_stays_in_this_process(monkeypatch):
    monkeypatch.setattr(worker_processes, "default_processes", lambda: 4)
    assert {process for _, process in map_chunks(work.slow_first, None, CHUNKS[1:], None)} == {os.getpid()}


def test_much_work_is_shared(monkeypatch):
    monkeypatch.setattr(worker_processes, "default_processes", lambda: 2)
    monkeypatch.setattr(worker_processes, "WORTHWHILE_SECONDS", 0)
    processes = [process for _, process in map_chunks(work.slow_first, None, CHUNKS, None)]
    assert processes[0] == os.getpid() and os.getpid() not in processes[1:]


def test_processes_of_a_run_share_the_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert default_processes() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert default_processes() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert default_processes() == 1


def test_a_killed_process_is_told_with_its_place():
    seen = []
    with pytest.raises(WorkerDied, match=r"was ended by SIGKILL \(.*memory.*\), at samples 31 to 33"):
        for start in map_in_processes(work.die, 30, CHUNKS, 2):
            seen.append(start)
    assert seen == [chunk.start for chunk in CHUNKS][: len(seen)]
    with pytest.raises(WorkerDied, match="ended with exit code 3"):
        list(map_in_processes(work.leave, None, CHUNKS, 2))


def test_an_error_is_raised_here():
    with pytest.raises(ValueError, match=r"no 0|no 3") as caught:
        list(map_in_processes(work.refuse, None, CHUNKS, 2))
    assert "in refuse" in caught.value.__notes__[0]


def test_leaving_early_ends_the_processes():
    with closing(map_in_processes(work.slow_first, None, CHUNKS, 2)) as results:
        _, process = next(results)
        assert is_alive(process)
    assert not is_alive(process)


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGINT, 1000), (signal.SIGKILL, 1.5)])
def test_nothing_is_left_of_an_interrupted_check(tmp_path, number, seconds):
    """Ctrl-C goes to the whole group, as from a terminal. SIGKILL goes to the parent alone: its workers end with what
    they are at."""
    note = tmp_path / "processes"
    script = tmp_path / "check.py"
    script.write_text(
        "import signal\n"
        "import work_for_tests as work\n"
        "from finetune.data.worker_processes import map_in_processes\n"
        "if __name__ == '__main__':\n"
        # Tests that a shell runs in the background ignore Ctrl-C, and their children after them.
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"    list(map_in_processes(work.say_who_and_wait, {(str(note), seconds)!r}, [range(1), range(1, 2)], 2))\n"
    )
    path = os.pathsep.join([str(Path(work.__file__).parent), str(Path(__file__).parents[3])])
    environment = {**os.environ, "PYTHONPATH": path}
    parent = subprocess.Popen(
        [sys.executable, script], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_until(lambda: note.exists() and len(note.read_text().split()) == 2)
        processes = [int(line) for line in note.read_text().split()]
        (os.killpg if number == signal.SIGINT else os.kill)(parent.pid, number)
        said = parent.communicate(timeout=30)[1]
        if number == signal.SIGINT:
            assert said.count("KeyboardInterrupt") == 1, "only this process speaks of it"
            assert not any(map(is_alive, processes))
        wait_until(lambda: not any(map(is_alive, processes)))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
