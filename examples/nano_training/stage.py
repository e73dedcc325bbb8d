"""One of the paper's stages by its recipe: as `finetune RECIPE`, but by Muon, in bfloat16, a process for each core."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from examples.nano_training.arithmetic import autocast
from examples.nano_training.optimizer import MuonAndAdamW
from finetune.recipe import load_recipe
from finetune.train import train

PROCESSES = 2


def run_stage(recipe: Path, *changes: str) -> None:
    """Train in processes of a core each: at this size two threads gain less.

    Args:
        changes: to the recipe, as on the command line of `finetune`.

    Raises:
        SystemExit: the stage failed, and has said why.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES))
    command = [sys.executable, *launcher, "-m", "examples.nano_training.stage", str(recipe), *changes]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> None:
    path, *changes = sys.argv[1:]
    batch = load_recipe(path, changes).train_arguments()["per_device_train_batch_size"]
    share = batch // int(os.environ.get("WORLD_SIZE", "1"))
    recipe = load_recipe(path, [*changes, f"train.per_device_train_batch_size={share}"])

    def optimizer(model: torch.nn.Module) -> MuonAndAdamW:
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        return MuonAndAdamW(trained, recipe.train_arguments()["learning_rate"])

    with autocast():
        train(recipe, optimizer=optimizer)


if __name__ == "__main__":
    main()
