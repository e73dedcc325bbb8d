"""log.txt: all that was said, with times, from the moment the run is known to be this one."""

import logging
import re
import warnings

import pytest

from finetune.errors import Interrupted, UserError
from finetune.run.log_file import run_log
from finetune.terminal import say_nothing


def texts(file):
    """The lines without their times, each of which is checked."""
    pattern = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d (.*)")
    return [pattern.fullmatch(line)[1] for line in file.read_text().splitlines()]


def test_what_is_said_before_the_run_is_known_comes_first(tmp_path):
    file = tmp_path / "log.txt"
    file.write_text("2026-01-01T00:00:00+00:00 an earlier part\n")
    with run_log() as log:
        say = log.heard(say_nothing)
        say("model", "tiny\nin two lines")
        assert len(texts(file)) == 1
        log.open(file)
        say("note", "\x1b[31mred")
        log.write("step 1/8")
        # As soon as it is said: a killed run has lost nothing.
        assert texts(file) == [
            "an earlier part",
            "model       tiny",
            "in two lines",
            "note        ␛[31mred",
            "step 1/8",
        ]


@pytest.mark.parametrize("propagate", [False, True])  # True is Transformers' own where the environment has CI=1
def test_warnings_and_the_last_sentence(tmp_path, caplog, monkeypatch, propagate):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", propagate)
    caplog.set_level(logging.WARNING, logger="transformers")
    file = tmp_path / "log.txt"
    before = warnings.showwarning, list(logging.getLogger().handlers)
    with pytest.raises(UserError), warnings.catch_warnings(), run_log() as log:
        warnings.simplefilter("always")
        log.open(file)
        warnings.warn("old", FutureWarning, stacklevel=1)
        logging.getLogger("transformers.trainer").warning("of %s", "theirs")
        logging.getLogger("finetune.run").info("not shown")
        raise UserError("data.train: no rows")
    assert texts(file) == [
        "warning     FutureWarning: old",
        "warning     transformers.trainer: of theirs",
        "data.train: no rows",
    ]
    assert before == (warnings.showwarning, list(logging.getLogger().handlers))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Interrupted(15, saved=True), "interrupted by SIGTERM; the state is saved"),
        (Interrupted(2, saved=False, said="not since step 3"), "interrupted by SIGINT; not since step 3"),
        (ZeroDivisionError("x"), "ZeroDivisionError: x"),
    ],
)
def test_how_it_ended(tmp_path, error, said):
    with pytest.raises(type(error)), run_log() as log:
        log.open(tmp_path / "log.txt")
        raise error
    assert texts(tmp_path / "log.txt")[-1] == said


def test_a_refused_run_leaves_no_line(tmp_path):
    with pytest.raises(UserError), run_log() as log:
        log.heard(say_nothing)("model", "another")
        raise UserError("it holds a run of another recipe")
    assert not list(tmp_path.iterdir())
