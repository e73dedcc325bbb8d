"""Runs by DeepSpeed over gloo, and what they made."""

import json
import random
import re
import shutil
import subprocess
import sys

from recipes_for_tests import ROOT, finetune, write_recipe
from safetensors.torch import load_file

from finetune.run.checkpoints import verify

ON_CPU = str(ROOT / "tests" / "helpers" / "zero_on_cpu.py")
FULL = {
    "adapter": None,
    "freeze": {"vision": False, "resampler": False, "language": False},
    "train__learning_rate": 1e-3,
    "train__learning_rates": {"vision": 3e-4},
    "train__vision_layer_decay": 0.9,
}
LORA = {"adapter": {"r": 4, "dropout": 0.0, "vision_targets": ["in_proj"]}}
WITH_EMBEDDINGS = {
    "adapter": {"r": 4, "dropout": 0.0, "train_embeddings": True},
    "freeze": {"vision": True, "resampler": False, "language": True},
}
Q_LORA = {"adapter": {"r": 4, "dropout": 0.0}, "model__quantization": "nf4"}
KINDS = {"full": FULL, "lora": LORA, "embeddings": WITH_EMBEDDINGS, "q-lora": Q_LORA}


def recipe_of(folder, kind, processes, **changes):
    """Six steps of the same eight samples, whatever the number of processes, in several packs, with evaluation of one
    row: fewer than there are processes."""
    settings = {
        "max_steps": 6,
        "save_steps": 2,
        "save_total_limit": 9,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4 // processes,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    changes = {f"train__{key}": value for key, value in settings.items()} | kind | changes
    changes = {"data__max_length": 640, "data__tokens_per_batch": 700} | changes
    data = [{"path": str(folder / "one.jsonl"), "format": "messages"}]
    changes |= {"evaluate": {"data": data, "max_new_tokens": 8}}
    recipe = write_recipe(folder, **changes)
    rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join([*rows, *rows[:2]]))  # 16: two steps an epoch
    (folder / "one.jsonl").write_text((folder / "eval.jsonl").read_text().splitlines(keepends=True)[0])
    return recipe


def command_of(recipe, processes, way):
    port = str(random.randint(20000, 40000))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port, ON_CPU]
    return [sys.executable, *launcher, str(recipe), f"train.parallel={way}"]


def train(recipe, processes, way="none", check=True):
    """Train with a number of processes."""
    if processes == 1:
        return finetune(recipe, check=check)
    command = command_of(recipe, processes, way)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def folder_of_result(folder):
    adapter = folder / "run" / "adapter"
    return adapter if adapter.exists() else folder / "run" / "model"


def weights_in(folder):
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


def result_of(folder):
    verify(folder_of_result(folder))
    return weights_in(folder_of_result(folder))


def logged(folder):
    """Losses, norms of gradients and losses of evaluation, by step."""
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    keys = ("loss", "grad_norm", "learning_rate", "eval_loss")
    return {(line["step"], key): line[key] for line in lines for key in keys if key in line}


def go_back(folder, step):
    """Make a finished run what it was when it was killed after a step."""
    run = folder / "run"
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    for result in ("adapter", "model"):
        shutil.rmtree(run / result, ignore_errors=True)
    (run / "run.json").write_text(
        (run / "run.json").read_text().replace('"status": "finished"', '"status": "running"')
    )


def accumulate(folder, steps):
    """Set the batches of a step, in the recipe and in what the run remembers of it."""
    for file in (folder / "recipe.yaml", folder / "run" / "run.json"):
        file.write_text(re.sub(r"(gradient_accumulation_steps\W+)\d+", rf"\g<1>{steps}", file.read_text()))


def largest_difference(one, other):
    """Of two sets of weights, which have to have the same names and dtypes."""
    assert one.keys() == other.keys()
    assert all(value.dtype == other[name].dtype for name, value in one.items())
    return max((value.float() - other[name].float()).abs().max().item() for name, value in one.items())
