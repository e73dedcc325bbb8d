"""A signal to one of two processes, or to both, at the same place: both stop together, and the run goes on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from recipes_for_tests import finetune, scored_questions, write_recipe

TWO = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port")
HELPER = Path(__file__).parent.parent / "helpers" / "signal_at.py"


def make(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    evaluate = scored_questions(folder, 4)
    settings = {"train__eval_strategy": "steps", "train__eval_steps": 2, "train__max_steps": 5, "evaluate": evaluate}
    settings |= {"train__save_steps": 500, "train__logging_steps": 2, "train__per_device_eval_batch_size": 1}
    return write_recipe(folder, **settings | changes)


def results(run: Path) -> dict:
    facts = json.loads((run / "run.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "eval_loss", "eval_anls", "supervised_tokens", "learning_rate")
    return {
        "adapter": (run / "adapter" / "adapter_model.safetensors").read_bytes(),
        "records": [{key: one[key] for key in kept if key in one} for one in records if "train_runtime" not in one],
        "trained_on": facts["trained_on"],
        "steps": facts["steps"],
    }


def stopped(rank: str, kind: str, call: int, port: int, *arguments) -> str:
    command = [sys.executable, *TWO, str(port), str(HELPER), rank, kind, str(call), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode != 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    finetune(make(folder), launcher=(*TWO, "29611"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "kind", "call", "step", "port"),
    [
        ("1", "batch", 10, 2, 29612),  # inside of the third step, one process alone
        ("0,1", "batch", 11, 2, 29613),
        ("1", "loss", 1, 2, 29614),
        ("0", "token", 2, 2, 29615),
        ("0,1", "token", 6, 4, 29616),
    ],
)
def test_both_stop_after_the_same_step(whole, tmp_path, rank, kind, call, step, port):
    shutil.copy(whole / "recipe.yaml", tmp_path / "recipe.yaml")
    run, output = tmp_path / "run", f"output={tmp_path / 'run'}"
    said = stopped(rank, kind, call, port, tmp_path / "recipe.yaml", output)
    assert "interrupted by SIGTERM; the state" in said and "is saved" in said
    assert "finetune/training" not in said, "no traceback of ours"
    assert max(path.name for path in (run / "checkpoints").iterdir()) == f"step-{step}"
    finetune(tmp_path / "recipe.yaml", output, launcher=(*TWO, str(port + 10)))
    assert results(run) == results(whole / "run")


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["1", "0,1"])
def test_a_signal_while_images_are_encoded_leaves_no_process_waiting(tmp_path, rank):
    recipe = make(tmp_path, data__vision_cache="memory")
    said = stopped(rank, "image", 1, 29640 + len(rank), recipe)
    assert "interrupted by SIGTERM" in said
