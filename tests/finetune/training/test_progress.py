"""What is written while a model trains, to the character: on a terminal, into a file, at the end."""

import io
import math
import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from finetune.quantities import (
    format_duration,
)
from finetune.training import progress as progress_module
from finetune.training.progress import Progress

LOGS = {
    "loss": 1.23456,
    "grad_norm": 0.8,
    "learning_rate": 1e-4,
    "tokens_per_second": 1234.5,
    "images_per_second": 3.14,
    "peak_memory_bytes": 5_300_000_000,
    "supervised_tokens": 4000,
}


class Training:
    """Calls a callback as the trainer does; `seconds` pass when a test says so."""

    def __init__(self, stream, *, max_steps=1000, by_steps=False, start=0, history=(), main=True, **options):
        self.seconds = 0.0
        self.progress = Progress(stream, clock=lambda: self.seconds, **options)
        self.args = SimpleNamespace(max_steps=max_steps if by_steps else -1, num_train_epochs=3.0)
        self.state = TrainerState(
            epoch=start * 3 / max_steps,
            global_step=start,
            max_steps=max_steps,
            num_train_epochs=3,
            log_history=list(history),
            is_world_process_zero=main,
        )

    def call(self, event, **kwargs):
        getattr(self.progress, event)(self.args, self.state, TrainerControl(), **kwargs)

    def begin(self):
        self.call("on_train_begin")
        return self

    def steps(self, count, seconds=1.0):
        for _ in range(count):
            self.call("on_step_begin")
            self.seconds += seconds
            self.state.global_step += 1
            self.state.epoch = 3 * self.state.global_step / self.state.max_steps
            self.call("on_step_end")

    def log(self, **logs):
        logs = {**logs, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.call("on_log", logs=logs)

    def evaluate(self, loss, seconds=0.0, batches=3, **scores):
        for _ in range(batches):
            self.call("on_prediction_step", eval_dataloader=range(batches))
        self.seconds += seconds
        metrics = {"eval_loss": loss, "eval_runtime": 1.5, "eval_seconds": 1.5, **scores}
        self.log(**metrics)
        self.call("on_evaluate", metrics=metrics)


class FakeTerminal(io.StringIO):
    def isatty(self):
        return True

    @property
    def screen(self):
        return Screen(self.getvalue())


class Screen:
    """What a terminal shows after a text with the control sequences that are allowed here; any other is an error."""

    def __init__(self, text):
        self.lines, self.row, self.column, self.cursor_visible = [""], 0, 0, True
        for control, character in re.findall(r"\x1b(\[[?0-9;]*[A-Za-z])|([\s\S])", text):
            if control:
                self._control(control)
            elif character == "\r":
                self.column = 0
            elif character == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            else:
                assert character.isprintable(), repr(character)
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
                self.column += 1

    def _control(self, control):
        if control == "[2K":
            self.lines[self.row] = ""
        elif control in ("[?25l", "[?25h"):
            self.cursor_visible = control == "[?25h"
        elif control == "[1A":
            self.row -= 1
        else:
            assert control.endswith("m"), control  # colour


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm-256color")
    return FakeTerminal()


# --- plain lines -----------------------------------------------------------------------------------------------------


def test_plain_lines_of_a_whole_training(tmp_path):
    stream = io.StringIO()
    training = Training(stream, max_steps=40, checkpoints=tmp_path).begin()
    training.steps(10)
    training.log(**LOGS)
    training.steps(10)
    training.log(loss=1.0, learning_rate=0.0)
    training.evaluate(0.98765, eval_anls=0.5)
    training.call("on_save")
    training.steps(10)
    training.log(loss=0.00012)
    training.evaluate(1.021)
    training.steps(10)
    training.log(loss=math.nan)
    training.evaluate(0.9)
    training.log(train_runtime=40.0, train_loss=1.1, total_flos=1e12)
    training.call("on_train_end")
    assert stream.getvalue().splitlines() == [
        "step 10/40 | epoch 0.75/3 | loss 1.2346 | lr 1.00e-04 | 1.2k tok/s | 3.1 img/s | peak 5.3 GB | 30s left",
        "step 20/40 | epoch 1.50/3 | loss 1.0000 | lr 0 | 20s left",
        "step 20/40 | eval loss 0.9877, best so far | eval anls 0.5000",
        f"step 20/40 | checkpoint saved: {tmp_path / 'step-20'}",
        "step 30/40 | epoch 2.25/3 | loss 1.20e-04 | 10s left",
        "step 30/40 | eval loss 1.0210, best 0.9877 at step 20",
        "step 40/40 | epoch 3.00/3 | loss nan | 0s left",
        "step 40/40 | eval loss 0.9000, best so far",
    ]


def test_with_max_steps_the_epochs_are_no_goal():
    stream = io.StringIO()
    training = Training(stream, max_steps=40, by_steps=True).begin()
    training.steps(1)
    training.log(loss=1.0)
    assert stream.getvalue() == "step 1/40 | epoch 0.07 | loss 1.0000\n"


@pytest.mark.parametrize("logs", [None, {}, {"epoch": 0.5}, {"loss": "high"}, {"loss": None}, {"train_loss": 1.0}])
def test_nothing_to_say_is_not_said(logs):
    stream = io.StringIO()
    training = Training(stream).begin()
    training.call("on_log", logs=logs)
    assert stream.getvalue() == ""


def test_the_logs_are_left_as_they_are():
    logs = dict(LOGS)
    Training(io.StringIO()).begin().call("on_log", logs=logs)
    assert logs == LOGS


def test_an_evaluation_before_training():
    stream = io.StringIO()
    training = Training(stream)
    training.state = TrainerState(epoch=None)
    training.call("on_log", logs={"eval_loss": 2.0})
    training.call("on_evaluate", metrics={})
    training.state = TrainerState(global_step=0, max_steps=10)
    training.begin()
    training.steps(1)
    training.evaluate(2.5)
    assert stream.getvalue().splitlines() == [
        "step 0 | eval loss 2.0000, best so far",
        "step 1/10 | eval loss 2.5000, best 2.0000 at step 0",
    ]


def test_an_evaluation_that_fails_is_never_the_best():
    stream = io.StringIO()
    training = Training(stream, max_steps=10).begin()
    training.evaluate(math.nan)
    training.evaluate(1.5)
    training.evaluate(math.nan)
    assert stream.getvalue().splitlines() == [
        "step 0/10 | eval loss nan",
        "step 0/10 | eval loss 1.5000, best so far",
        "step 0/10 | eval loss nan, best 1.5000 at step 0",
    ]


def test_a_resumed_run_goes_on_counting_and_remembers_its_best():
    stream = io.StringIO()
    history = [{"step": 300, "eval_loss": 0.8}, {"step": 400, "eval_loss": 0.9}, {"step": 400, "loss": 1.0}]
    training = Training(stream, start=400, history=history).begin()
    training.steps(10)
    training.log(loss=1.0)
    training.evaluate(0.85)
    assert stream.getvalue().splitlines() == [
        "resumed at step 400/1000",
        "step 410/1000 | epoch 1.23/3 | loss 1.0000 | 9m 50s left",
        "step 410/1000 | eval loss 0.8500, best 0.8000 at step 300",
    ]


def test_an_early_end_is_said():
    stream = io.StringIO()
    training = Training(stream).begin()
    training.steps(3)
    training.call("on_train_end")
    assert stream.getvalue() == "stopped at step 3 of 1000\n"


def test_only_the_main_process_speaks(terminal):
    for stream in (terminal, io.StringIO()):
        training = Training(stream, main=False).begin()
        training.steps(3)
        training.log(**LOGS)
        training.evaluate(1.0)
        training.call("on_save")
        training.call("on_train_end")
        assert stream.getvalue() == ""


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    training = Training(terminal).begin()
    training.steps(1)
    training.log(loss=1.0)
    assert terminal.getvalue() == "step 1/1000 | epoch 0.00/3 | loss 1.0000\n"


# --- time left -------------------------------------------------------------------------------------------------------


def time_left(training):
    return training.progress._fields(training.args, training.state).get("left")


def test_time_left_does_not_count_the_first_step():
    training = Training(io.StringIO(), max_steps=100).begin()
    training.steps(1, seconds=300)
    assert time_left(training) is None
    training.steps(1)
    assert time_left(training) == "1m 38s left"


def test_time_left_follows_the_last_steps():
    training = Training(io.StringIO(), max_steps=1000).begin()
    training.steps(100, seconds=10)
    training.steps(100, seconds=2)
    assert time_left(training) == f"{format_duration(800 * 2)} left"


def test_a_gpu_that_lags_behind_the_program_does_not_shorten_the_time_left():
    training = Training(io.StringIO(), max_steps=100).begin()
    training.steps(1)
    for _ in range(4):  # nine steps are only queued, the tenth waits for all
        training.steps(9, seconds=0.1)
        training.steps(1, seconds=9.1)
    assert time_left(training) == "59s left"


def test_evaluations_are_spread_over_all_steps():
    training = Training(io.StringIO(), max_steps=100).begin()
    training.evaluate(1.0, seconds=500)  # before the first step, and not again
    training.steps(10)
    assert time_left(training) == "1m 30s left"
    training.evaluate(1.0, seconds=20)
    training.call("on_save")
    training.steps(10)
    # 80 steps of a second, and 20 seconds of evaluation for each 20 steps so far.
    assert time_left(training) == "2m 40s left"


# --- the terminal ----------------------------------------------------------------------------------------------------


def test_one_live_line_below_the_lines_that_stay(terminal):
    training = Training(terminal, max_steps=40).begin()
    assert terminal.screen.lines == ["waiting for the first step"]
    training.steps(10)
    training.log(**LOGS)
    live = "step 10/40 | epoch 0.75/3 | loss 1.2346 | lr 1.00e-04 | 1.2k tok/s | 3.1 img/s | peak 5.3 GB | 30s left"
    assert terminal.screen.lines == [live]
    training.evaluate(0.5)
    training.call("on_save")
    training.steps(1)
    live = live.replace("10/40", "11/40").replace("0.75", "0.82").replace("30s", "29s")
    assert terminal.screen.lines == [
        "step 10/40 | eval loss 0.5000, best so far",
        "step 10/40 | checkpoint saved",
        live,
    ]
    training.call("on_train_end")
    assert terminal.screen.lines[2:] == [live, "stopped at step 11 of 40", ""]


def test_the_line_counts_evaluation_batches(terminal):
    training = Training(terminal, max_steps=40).begin()
    training.steps(2)
    training.seconds += 1
    training.call("on_prediction_step", eval_dataloader=range(12))
    assert terminal.screen.lines == ["step 2/40 | evaluating, batch 1/12"]
    training.seconds += 1
    training.call("on_prediction_step", eval_dataloader=iter(()))  # a stream, whose length is not known
    assert terminal.screen.lines == ["step 2/40 | evaluating, batch 2"]
    training.call("on_evaluate", metrics={})
    assert terminal.screen.lines == ["step 2/40 | epoch 0.15/3 | 1m 16s left"]


def test_redraws_are_few(terminal):
    training = Training(terminal, max_steps=1000).begin()
    training.steps(1, seconds=1)
    before = terminal.getvalue().count("step ")
    training.steps(500, seconds=0.001)
    assert terminal.getvalue().count("step ") - before <= 0.5 / progress_module.REDRAW_SECONDS


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (100, "step 10/40 | epoch 0.75/3 | loss 1.2346 | lr 1.00e-04 | 1.2k tok/s | peak 5.3 GB | 30s left"),
        (80, "step 10/40 | epoch 0.75/3 | loss 1.2346 | lr 1.00e-04 | 1.2k tok/s | 30s left"),
        (70, "step 10/40 | loss 1.2346 | lr 1.00e-04 | 1.2k tok/s | 30s left"),
        (40, "step 10/40 | loss 1.2346 | 30s left"),
        (12, "step 10/40"),
        (6, "step …"),
    ],
)
def test_a_narrow_terminal_gets_less_and_still_one_line(terminal, monkeypatch, columns, line):
    monkeypatch.setenv("COLUMNS", str(columns))
    training = Training(terminal, max_steps=40).begin()
    training.steps(10)
    training.log(**LOGS)
    assert [shown for shown in terminal.screen.lines if shown] == [line]


def test_the_cursor_is_never_left_hidden(terminal):
    training = Training(terminal).begin()
    assert terminal.screen.cursor_visible
    training.steps(5)
    training.log(**LOGS)
    assert terminal.screen.cursor_visible


def test_closing_hands_the_terminal_back_and_twice_does_no_harm(terminal):
    streams = sys.stdout, sys.stderr
    training = Training(terminal).begin()
    training.steps(5)
    training.progress.close()
    written = terminal.getvalue()
    training.progress.close()
    assert terminal.getvalue() == written
    assert (sys.stdout, sys.stderr) == streams
    assert terminal.screen.column == 0 and terminal.screen.lines[-1] == ""
    assert terminal.screen.lines[0].startswith("step 5/1000")


def test_an_interrupted_program_leaves_a_clean_terminal(tmp_path):
    """A real terminal, a real interpreter, and nobody who calls close()."""
    program = """
import sys
from types import SimpleNamespace
from transformers import TrainerState
from finetune.training.progress import Progress
progress = Progress()
args, state = SimpleNamespace(max_steps=9, num_train_epochs=1), TrainerState(max_steps=9, global_step=0, epoch=0.0)
progress.on_train_begin(args, state, None)
state.global_step = 1
progress.on_step_end(args, state, None)
print("a library speaks")
print("and warns", file=sys.stderr)
raise KeyboardInterrupt
"""
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    done = subprocess.Popen(
        [sys.executable, "-c", program], stdin=slave, stdout=slave, stderr=slave, env=environment, close_fds=True
    )
    os.close(slave)
    written = b""
    while True:
        try:
            written += os.read(master, 65536) or b""
        except OSError:  # how Linux says that the other end is closed
            break
    os.close(master)
    assert done.wait() != 0
    screen = Screen(written.decode())
    spoken = screen.lines.index("a library speaks")
    assert screen.lines[spoken + 1] == "and warns"
    assert screen.lines[spoken + 2].startswith("Traceback")
    assert screen.lines[-3:] == ["KeyboardInterrupt", "step 1/9 | epoch 0.00", ""]
    assert screen.cursor_visible and screen.column == 0


def test_scores_of_sources_stand_behind_that_of_all_in_a_line():
    stream = io.StringIO()
    training = Training(stream, max_steps=40).begin()
    training.evaluate(0.5, eval_anls=0.45, eval_anls_boarding=0.02, eval_anls_old_images=0.88)
    line = "step 0/40 | eval loss 0.5000, best so far | eval anls 0.4500 (boarding 0.0200, old_images 0.8800)"
    assert stream.getvalue().splitlines() == [line]
