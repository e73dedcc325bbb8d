"""One of the paper's stages, trained by its recipe as `finetune RECIPE` would, but with Muon and autocast."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from examples.nano.making.arithmetic import autocast
from examples.nano.making.optimizer import MuonAndAdamW
from finetune.recipe import load_recipe
from finetune.training.train import train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROCESSES = 1 if DEVICE.type == "cuda" else 2
# A GPU needs a whole step in one forward to be busy, and workers that read ahead.
ON_A_GPU = ("data.tokens_per_batch=16384", "data.workers=4")


def run_stage(recipe: Path, *changes: str) -> None:
    """Train on a GPU if there is one, else in two processes with a core each, which is faster than two threads.

    Args:
        changes: overrides of the recipe, as on the command line of `finetune`.

    Raises:
        SystemExit: the stage failed; its message has been printed.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    command = [sys.executable, *(launcher if PROCESSES > 1 else []), "-m", __name__, str(recipe), *changes]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> None:
    """What each process of a stage runs: RECIPE [key.path=value ...]."""
    path, changes = Path(sys.argv[1]), sys.argv[2:]
    if DEVICE.type == "cuda":
        changes = [*ON_A_GPU, *changes]
    batch = load_recipe(path, changes).train_arguments()["per_device_train_batch_size"]
    share = batch // int(os.environ.get("WORLD_SIZE", "1"))
    recipe = load_recipe(path, [*changes, f"train.per_device_train_batch_size={share}"])

    def optimizer(model: torch.nn.Module) -> MuonAndAdamW:
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        rates = recipe.train.learning_rates.model_dump()
        return MuonAndAdamW(trained, recipe.train_arguments()["learning_rate"], rates)

    with autocast(DEVICE):
        train(recipe, optimizer=optimizer)


if __name__ == "__main__":
    main()
