"""Real runs that encode images: killed at it, two at once, and two processes of one run."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from forked_finetune import Started
from huggingface_hub import constants
from PIL import Image
from recipes_for_tests import finetune, write_recipe
from safetensors.torch import load_file
from said import collect

from finetune.recipe import load_recipe
from finetune.training.train import train
from finetune.vision_cache.store import FEATURES, JOURNAL
from tests.reliability.test_resume import wait_for

IMAGES = 72
RECORD_BYTES = 256 * 256 * 4
LINE_BYTES = 40
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port")


@pytest.fixture
def many(tmp_path, monkeypatch) -> Path:
    """A recipe over as many images as take some seconds to encode, with a cache of its own."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))  # read from the environment when it is imported
    file = write_recipe(
        tmp_path, data__images_root=None, data__vision_cache="disk", train__max_steps=2, train__save_strategy="no"
    )
    rows = []
    for number in range(IMAGES):
        noise = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
        messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": f"Number {number}."}]
        rows.append(json.dumps({"messages": messages, "images": [f"{number}.png"]}))
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    return file


def images_there(home: Path) -> int:
    """Lines of all journals: images whose features are there."""
    return sum(file.stat().st_size // LINE_BYTES for file in home.glob(f"**/*{JOURNAL}"))


def run(file: Path, *overrides: str) -> str:
    """A run in this process; what it said."""
    said: list[str] = []
    train(load_recipe(file, overrides), say=collect(said))
    return "\n".join(said)


def bytes_of(file: Path, run: str) -> bytes:
    return (file.parent / run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_killed_while_it_encodes(many, tmp_path):
    """What was encoded stays, and the run that goes on from there is the one that was never killed, bit for bit."""
    process = Started([many, f"output={tmp_path / 'killed'}"])
    wait_for(lambda: images_there(tmp_path / "home") >= 16, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    there = images_there(tmp_path / "home")
    assert 16 <= there < IMAGES, "it was killed in the middle"
    said = run(many, f"output={tmp_path / 'killed'}")
    assert f"{IMAGES - there} of {IMAGES} images to encode" in said
    assert f"{IMAGES - there} images encoded" in said
    (tmp_path / "home").rename(tmp_path / "old")
    assert f"{IMAGES} images encoded" in run(many, f"output={tmp_path / 'whole'}")
    assert bytes_of(many, "killed") == bytes_of(many, "whole")


def test_two_runs_at_once(many, tmp_path):
    """Each finishes as it would by itself, and of what one has encoded the other takes over."""
    processes = [Started([many, f"output={tmp_path / name}"]) for name in ("one", "two")]
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.wait() for process in processes] == [0, 0], told
    assert bytes_of(many, "one") == bytes_of(many, "two")
    records = sum(file.stat().st_size for file in (tmp_path / "home").glob(f"**/*{FEATURES}")) / RECORD_BYTES
    assert IMAGES <= records <= 2 * IMAGES  # how many they share follows from how they are started
    assert f"the features of {IMAGES} images are in" in run(many, f"output={tmp_path / 'three'}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_two_processes_of_one_run(many, tmp_path, kind):
    """Each encodes a half and has all: their adapter is that of one process with twice the accumulation."""
    settings = ["adapter.dropout=0.0", "data.shuffle=false", f"data.vision_cache={kind}"]
    run(many, *settings, f"output={tmp_path / 'one'}", "data.vision_cache=off")
    port = str(20000 + os.getpid() % 20000)
    half = ["train.gradient_accumulation_steps=2", f"output={tmp_path / 'two'}"]
    done = finetune(many, *settings, *half, launcher=(*TORCHRUN, port))
    assert f"{IMAGES} of {IMAGES} images to encode" in done.stdout and f"{IMAGES} images encoded" in done.stdout
    assert done.stdout.count("the vision side was removed from the model") == 1
    segments = [file.stat().st_size for file in (tmp_path / "home").glob(f"**/*{FEATURES}")]
    assert segments == ([IMAGES // 2 * RECORD_BYTES] * 2 if kind == "disk" else [])
    ours, theirs = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("two", "one"))
    assert all((ours[name] - theirs[name]).abs().max() <= 1e-4 for name in theirs)
