"""The proof of a Q-LoRA step without a GPU: on the tiny checkpoint, and on one of the published widths (slow).

The proof itself, at the published size, takes 21 GB of disk and some minutes on one core:

    python examples/full_size_qlora.py --to random-full --size full
"""

import json
import runpy
import subprocess
import sys

import pytest
from recipes_for_tests import ROOT, TINY

SCRIPT = ROOT / "examples" / "full_size_qlora.py"
PHASES = ["start", "read", "load", "encode", "batches", "forward_backward", "optimizer", "checkpoint", "save"]


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def prove(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_on_a_checkpoint_that_is_there(tmp_path):
    # An odd width of the tiny tower would send bitsandbytes to a path that it compiles first.
    done = prove("--to", tmp_path / "proof", "--checkpoint", TINY, "model.quantize=[language,head]")
    figures = json.loads((tmp_path / "proof" / "figures.json").read_text())
    assert [path.name for path in (tmp_path / "proof").iterdir()] == ["figures.json"]
    assert set(figures["phases"]) == set(PHASES)
    for name, phase in figures["phases"].items():
        assert 0 < phase["anonymous"] < phase["resident"] and phase["seconds"] >= 0, name
    assert figures["peak"]["anonymous"] >= max(phase["anonymous"] for phase in figures["phases"].values())
    assert figures["checkpoint"]["tensors"] == 61 and figures["step"]["supervised_tokens"] > 0
    assert figures["step"]["grad_norm"] > 0 and figures["adapter"] > 4 * figures["parameters"]["adapter"]["trained"]
    assert "model.quantize=" in figures["command"] and TINY.joinpath("config.json").exists()
    for name in PHASES:
        assert f"\n{name} " in done.stdout
    assert "of its own: kept" in done.stdout


@pytest.mark.slow
def test_a_command_that_fails_ends_it_with_its_code(tmp_path):
    done = prove("--to", tmp_path / "proof", "--checkpoint", TINY, "train.learning_rat=1", code=2)
    assert "did you mean train.learning_rate" in done.stderr
    assert list((tmp_path / "proof").iterdir()) == []


@pytest.mark.slow
def test_a_folder_that_is_there_is_left_alone(tmp_path):
    assert "exists; give another folder" in prove("--to", tmp_path, code=2).stderr


def test_memory_by_phase(script):
    watched = script["Watched"]([(1.0, 10, 100), (2.0, 30, 110), (3.0, 20, 400), (5.0, 5, 50)])
    assert watched.between(1.5, 3.0) == {"seconds": 1.5, "anonymous": 30, "resident": 400}
    assert watched.between(3.5, 4.0) == {"seconds": 0.5, "anonymous": 20, "resident": 400}  # none was in it
    assert watched.peak() == {"anonymous": 30, "resident": 400}
    phase = {"seconds": 7.0, "began": "1970-01-01T00:00:02.500+00:00", "ended": "1970-01-01T00:00:09.000+00:00"}
    assert watched.of(phase) == {"seconds": 7.0, "anonymous": 20, "resident": 400}


def test_a_process_is_watched_to_its_end(script):
    held = 200_000_000
    code = f"import time; data = bytearray(b'x') * {held}; time.sleep(1)"
    peak = script["watch"]([sys.executable, "-c", code]).peak()
    assert held < peak["anonymous"] < held + 100_000_000


@pytest.mark.slow
def test_a_small_one_of_the_published_widths(tmp_path):
    """As at full size: the step is real, and no phase holds more than what stays and the largest tensor's work."""
    prove("--to", tmp_path / "proof", "--size", "small")
    figures = json.loads((tmp_path / "proof" / "figures.json").read_text())
    assert set(figures["phases"]) == {"write", *PHASES}
    assert figures["checkpoint"] == {"bytes": 3_640_852_480, "tensors": 61, "largest": 1_244_659_712}
    assert 0 < figures["step"]["loss"] < 20
    assert figures["phases"]["load"]["anonymous"] < 4_000_000_000 and figures["peak"]["anonymous"] < 5_000_000_000
