"""The run folder: its lock between real processes, its files, and what tells two runs apart."""

import errno
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.files.disk_space import NotEnoughDiskSpace, check_disk_space
from finetune.run.environment import describe_environment
from finetune.run.folder import RunFolder
from finetune.run.identity import compare_runs
from finetune.run.lock import RunLocked

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "first")
    folder.path.mkdir(parents=True)
    return folder


@pytest.fixture(autouse=True)
def not_distributed(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


# The lock

HOLD = """
import sys
from finetune.run.folder import RunFolder
from finetune.run.lock import RunLocked

try:
    with RunFolder(sys.argv[1]).lock():
        print("held", flush=True)
        sys.stdin.readline()
    print("released", flush=True)
except RunLocked as error:
    print(error, flush=True)
"""

# A child that outlives its killed parent, as a loader worker may.
HOLD_WITH_CHILD = """
import os, sys, time
from finetune.run.folder import RunFolder

with RunFolder(sys.argv[1]).lock():
    if os.fork() == 0:
        print("held", flush=True)
        os.close(1)
        sys.stdin.readline()
        os._exit(0)
    time.sleep(600)
"""


@pytest.fixture
def start():
    started = []

    def start(path: Path, program: str = HOLD) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(path)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_one_process_holds_it_and_the_other_names_it(run, start):
    processes = [start(run.path) for _ in range(4)]  # at the same time
    said = {process: process.stdout.readline().strip() for process in processes}
    [holder] = [process for process in processes if said[process] == "held"]
    for process in processes:
        if process is not holder:
            assert f"{run.path} is in use by process {holder.pid} on {socket.gethostname()} since 20" in said[process]
            assert "choose another output" in said[process]
    with pytest.raises(RunLocked) as error, run.lock():
        pass
    assert error.value.holder["pid"] == holder.pid
    assert sys.executable in error.value.holder["command"]
    holder.communicate("\n")
    with run.lock():
        pass


def test_a_killed_process_holds_nothing(run, start):
    first = start(run.path)
    assert first.stdout.readline() == "held\n"
    first.kill()
    first.wait()
    assert json.loads(run.lock_file.read_text())["pid"] == first.pid  # what is left means nothing
    second = start(run.path)
    assert second.stdout.readline() == "held\n"
    third = start(run.path)
    assert f"process {second.pid} on" in third.stdout.readline()


def test_a_stopped_process_still_holds_it(run, start):
    first = start(run.path)
    assert first.stdout.readline() == "held\n"
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(RunLocked, match=f"process {first.pid}"), run.lock():
        pass


def test_children_of_a_killed_process_hold_nothing(run, start):
    first = start(run.path, HOLD_WITH_CHILD)
    assert first.stdout.readline() == "held\n"
    first.kill()
    first.wait()
    with run.lock():  # the child lives until its standard input is closed
        pass


def test_the_lock_ends_with_the_block(run):
    for error in (None, RuntimeError, KeyboardInterrupt):
        try:
            with run.lock():
                with pytest.raises(RunLocked, match=f"process {os.getpid()}"), run.lock():
                    pass
                if error:
                    raise error
        except (RuntimeError, KeyboardInterrupt) as caught:
            assert type(caught) is error
    assert run.lock_file.read_text() == ""


def test_a_holder_who_has_not_written_yet(run, monkeypatch):
    """Between the taking of the lock and the writing of the name the file is empty, or names someone dead."""
    monkeypatch.setattr("finetune.run.lock.HOLDER_WAIT", 0.05)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for text in ("", json.dumps({"pid": ended.pid, "host": socket.gethostname(), "since": "then", "command": "x"})):
        with run.lock():
            run.lock_file.write_text(text)
            with pytest.raises(RunLocked, match="is in use by"), run.lock():
                pass


def test_the_name_of_a_dead_holder_is_not_given(run, monkeypatch):
    """The new holder writes its name a moment after it took the lock."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    looks = []

    def sleep(_):
        looks.append(run.lock_file.read_text())
        run.lock_file.write_text(mine)

    monkeypatch.setattr("time.sleep", sleep)
    with run.lock():
        mine = run.lock_file.read_text()
        run.lock_file.write_text(mine.replace(f'"pid": {os.getpid()},', f'"pid": {ended.pid},'))
        with pytest.raises(RunLocked, match=f"process {os.getpid()} on"), run.lock():
            pass
    assert [json.loads(text)["pid"] for text in looks] == [ended.pid]


def test_only_the_main_process_locks(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    with run.lock(), run.lock():
        assert not run.path.exists()
    monkeypatch.setenv("RANK", "0")
    with run.lock():
        assert run.lock_file.exists()


# Its files


def test_names(tmp_path):
    run = RunFolder(str(tmp_path))
    files = (run.recipe_file, run.run_file, run.metrics_file, run.checkpoints, run.adapter, run.report_file)
    assert [path.relative_to(tmp_path).as_posix() for path in (*files, run.lock_file)] == [
        *("recipe.yaml", "run.json", "metrics.jsonl", "checkpoints", "adapter", "report.html", "run.lock")
    ]


def test_run_json(tmp_path):
    run = RunFolder(tmp_path / "new" / "run")
    assert run.read_run() is None
    run.write_run({"status": "running", "base": "通义千问", "best": -math.inf, "parts": (1, 2)})
    run.write_run({"status": "finished", "base": "通义千问", "best": -math.inf, "parts": (1, 2)})
    assert run.read_run() == {"status": "finished", "base": "通义千问", "best": -math.inf, "parts": [1, 2]}
    assert "通义千问" in run.run_file.read_text(encoding="utf-8")
    run.write_recipe("seed: 1\n")
    assert run.recipe_file.read_text() == "seed: 1\n"
    assert sorted(path.name for path in run.path.iterdir()) == ["recipe.yaml", "run.json"]


def test_a_value_that_is_not_json_leaves_the_old_file(run):
    run.write_run({"status": "running"})
    with pytest.raises(TypeError):
        run.write_run({"status": object()})
    assert run.read_run() == {"status": "running"}
    assert [path.name for path in run.path.iterdir()] == ["run.json"]


def test_a_damaged_run_json(run):
    run.run_file.write_text('{"status": "run')
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        run.read_run()


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_metrics(run):
    assert run.read_metrics() == []
    records = [
        {"step": 1, "loss": 2.5, "note": "a\u2028b\nc"},
        {"step": 2, "loss": math.inf, "grad_norm": -math.inf, "deep": {"values": [0.0, math.inf]}},
        {"step": 3, "loss": 1e-300},
    ]
    for record in records:
        run.append_metrics(record)
    assert run.read_metrics() == records
    lines = run.metrics_file.read_bytes().decode().split("\n")
    assert len(lines) == 4
    assert [json.loads(line, parse_constant=refuse) for line in lines[:3]][1]["loss"] == "Infinity"


def test_not_a_number_in_metrics(run):
    run.append_metrics({"step": 1, "loss": math.nan})
    assert run.metrics_file.read_text() == '{"step": 1, "loss": "NaN"}\n'
    assert math.isnan(run.read_metrics()[0]["loss"])


def test_a_half_last_line_is_left_out_and_said(run, caplog):
    line = json.dumps({"step": 2, "loss": 1.5, "note": "é" * 5000}, ensure_ascii=False).encode()
    for size in (1, 7, 5000, 5001, len(line)):
        run.metrics_file.write_bytes(b'{"step": 1}\n' + line[:size])
        caplog.clear()
        assert run.read_metrics() == [{"step": 1}]
        assert f"left out its half last line ({size} bytes)" in caplog.text
        run.append_metrics({"step": 2})
        assert f"removed its half last line ({size} bytes)" in caplog.text
        assert run.metrics_file.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
        run.metrics_file.write_bytes(line[:size])  # a first line
        run.append_metrics({"step": 2})
        assert run.metrics_file.read_bytes() == b'{"step": 2}\n'


@pytest.mark.parametrize("line", ["{", "[1]", "", "\0\0", '{"step": 2} {"step": 3}'])
def test_another_bad_line_is_an_error(run, line):
    run.metrics_file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=re.escape(f"{run.metrics_file}, line 2: not a JSON object")):
        run.read_metrics()


def test_forgetting_the_steps_that_will_be_repeated(run):
    assert run.forget_metrics_after(0) == 0
    records = [{"note": "no step"}, *({"step": step, "loss": math.inf} for step in (10, 20, 20, 30, 25))]
    for record in records:
        run.append_metrics(record)
    assert run.forget_metrics_after(30) == 0
    assert run.forget_metrics_after(20) == 2
    assert run.read_metrics() == records[:4]
    assert run.forget_metrics_after(0) == 3
    assert run.read_metrics() == records[:1]
    assert [path.name for path in run.path.iterdir()] == ["metrics.jsonl"]


def test_disk_space(tmp_path):
    folder = tmp_path / "not" / "yet"
    check_disk_space(folder, 1, "the checkpoints")
    with pytest.raises(
        NotEnoughDiskSpace, match=r"not/yet: [0-9.]+ [GT]B are free, but [0-9.]+ [A-Z]B are needed"
    ) as error:
        check_disk_space(folder, 10**18, "the checkpoints")
    assert error.value.errno == errno.ENOSPC
    assert isinstance(error.value, OSError)
    assert not folder.exists()


def test_disk_space_from_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_disk_space("runs/first", 1, "the checkpoints")


# What a run is


def test_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = describe_environment("a device")
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(re.match(r"\d+\.", found["versions"][name]) for name in ("torch", "transformers", "peft"))
    assert found["versions"].keys() >= {"trl", "qwenvl-finetune"}
    assert (found["host"], found["device"], found["commit"]) == (socket.gethostname(), "a device", None)
    json.dumps(found)


def test_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "a"], [*who, "commit", "-q", "-m", "a"], ["tag", "a-tag"]):
        (tmp_path / "a").write_text("a")
        subprocess.run(["git", *arguments], check=True)
    commit = describe_environment()["commit"]
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    (tmp_path / "a").write_text("b")
    assert describe_environment()["commit"] == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert describe_environment()["commit"] is None


def test_importing_is_light():
    program = (
        "import sys, finetune.run.folder, finetune.run.checkpoints;"
        " print([n for n in ('torch', 'peft') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr


IDENTITY = {
    "recipe": {
        "model": {"path": "Qwen/Qwen-VL", "dtype": "bfloat16"},
        "adapter": {"r": 8, "targets": ["c_attn"]},
        "data": {"train": [{"path": "a.jsonl", "weight": 1.0}, {"path": "b.jsonl", "weight": 1.0}]},
        "evaluate": None,
        "output": "runs/a",
        "train": {"learning_rate": 1e-4, "logging_steps": 1},
    },
    "data": {"train": "1234"},
    "base": "abcd",
}


def test_a_run_is_equal_to_its_stored_self(run):
    run.write_run({"identity": IDENTITY})
    as_tuples = IDENTITY | {"recipe": IDENTITY["recipe"] | {"adapter": {"r": 8, "targets": ("c_attn",)}}}
    assert compare_runs(run.read_run()["identity"], as_tuples) == []
    assert compare_runs({"loss": math.nan}, {"loss": math.nan}) == []
    assert compare_runs({}, {}) == []


def test_every_difference_is_a_line():
    now = json.loads(json.dumps(IDENTITY))
    now["recipe"]["train"] |= {"learning_rate": 2e-4, "logging_steps": 5}
    now["recipe"]["data"]["train"][1]["path"] = "ć.jsonl"
    now["recipe"]["adapter"] = None
    now["recipe"]["evaluate"] = {"data": ["c.jsonl"], "patience": 2}
    now["recipe"]["output"] = "runs/b"
    now["recipe"]["freeze"] = {"vision": True, "resampler": {"queries": False}}
    del now["recipe"]["model"]["dtype"]
    now["base"] = "ef01"
    differences = compare_runs(IDENTITY, now, ignore=("recipe.output", "recipe.train.logging_steps"))
    assert differences == [
        'recipe.model.dtype: "bfloat16" -> (absent)',
        'recipe.adapter: {"r": 8, "targets": ["c_attn"]} -> null',
        'recipe.data.train[1].path: "b.jsonl" -> "ć.jsonl"',
        'recipe.evaluate: null -> {"data": ["c.jsonl"], "patience": 2}',
        "recipe.train.learning_rate: 0.0001 -> 0.0002",
        "recipe.freeze.vision: (absent) -> true",
        "recipe.freeze.resampler.queries: (absent) -> false",
        'base: "abcd" -> "ef01"',
    ]
    assert compare_runs(IDENTITY, now, ignore=("recipe", "base")) == []
    assert len(compare_runs(IDENTITY, now, ignore=("recipe.out", "recipe.train.logging"))) == len(differences) + 2


def test_lists_of_other_lengths_are_shown_whole():
    assert compare_runs({"a": [1, 2]}, {"a": [1]}) == ["a: [1, 2] -> [1]"]
    assert compare_runs({"a": []}, {}) == ["a: [] -> (absent)"]
    assert compare_runs({"a": {}}, {}) == ["a: {} -> (absent)"]
